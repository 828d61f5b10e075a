"""Runs as their owner looks at them: listed, side by side, each on a page of its own."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.dataset.command import main as dataset_main
from tests.command_lines import in_process
from tests.conftest import SUBSET
from train.checkpoint import Run, latest_checkpoint, open_run, save_checkpoint
from train.cli import main
from train.evaluation import judge

SMALL = ["--generator-widths=16,32", "--discriminator-widths=32,16", "--batch-size=64", "--epochs=4", "--report-every=3"]
MACHINE = [f"--data-dir={SUBSET}", "--device=cpu", "--threads=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of the mlp that differ in their seed, the second judged, and one that was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    for flags in (["--seed=1"], ["--seed=2", "--latent-size=8"]):
        done = in_process(main, "mlp", *SMALL, *flags, *MACHINE, f"--runs-dir={folder}")
        assert done.returncode == 0, done.stderr
    second = folders(folder)[1]
    figures = {"label_accuracy": None, "frechet_distance": 12.345, "recall": 0.5, "classification_accuracy_score": 0.9876,
               "classification_accuracy_score_error": 0.0011, "precision": 0.7, "confident_share": 0.8, "class_imbalance": 0.01,
               "nearest_training_image": 4.0}  # fmt: skip
    judged = {"model": figures, "real": figures | {"recall": 0.9}}
    (second / "quality.json").write_text(json.dumps({"step": 16, "samples": 100, **judged, "second_judge": judged}))
    return folder


def folders(runs: Path) -> list[Path]:
    return sorted((runs / "mlp").iterdir())


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_list_tells_each_runs_state_time_and_quality(runs: Path) -> None:
    damaged = runs / "dcgan" / "20260101-000000"
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_text("{")
    done = in_process(main, "list", f"--runs-dir={runs}")
    assert done.returncode == 0, done.stderr
    head, _, *rows = map(cells, done.stdout.splitlines())
    assert head[:4] == ["run", "state", "steps", "trained for"]
    first, second = folders(runs)
    assert rows[0][:2] == [str(damaged), "damaged"]
    assert rows[1][:3] == [str(first), "finished", "16"]
    assert rows[1][3].endswith(" min")
    assert rows[1][4:] == ["–"] * 4
    assert rows[2][0] == str(second)
    assert rows[2][4:] == ["–", "12.35", "0.500", "98.76% ± 0.11"]


def test_list_without_runs_says_how_to_start_one(tmp_path: Path) -> None:
    done = in_process(main, "list", f"--runs-dir={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: there is no run in {tmp_path}; ")
    assert "make train PRESET=" in done.stderr


def test_compare_shows_what_differs_and_what_came_of_it(runs: Path) -> None:
    done = in_process(main, "compare", *map(str, folders(runs)))
    assert done.returncode == 0, done.stderr
    rows = {row[0]: row[1:] for row in map(cells, done.stdout.splitlines()[2:])}
    assert rows["seed"] == ["1", "2"]
    assert rows["latent_size"] == ["64", "8"]
    assert "batch_size" not in rows, "what is the same is left out"
    assert rows["steps"] == ["16", "16"]
    assert rows["Fréchet"] == ["–", "12.35"]
    losses = [float(each) for each in rows["last generator loss"]]
    assert losses[0] != losses[1]
    one = in_process(main, "compare", str(folders(runs)[0]))
    assert one.returncode == 2
    assert "--run" in one.stderr
    assert one.stderr.count("\n") == 1


class Page(HTMLParser):
    """What a page shows: its text, its pictures, and every address that it would load something from."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.sources: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data.strip())


def test_every_run_has_a_page_that_needs_no_server(runs: Path) -> None:
    first, second = folders(runs)
    page = Page((first / "report.html").read_text())
    assert "finished: 16 steps in" in " ".join(page.text)
    assert "Not judged yet:" in page.text
    assert len(page.sources) == 1 + 5, "the losses, and a grid for each of five log points"
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    changed = [line for line in (first / "report.html").read_text().splitlines() if '<tr class="changed">' in line]
    named = [line.split("<td>")[1].removesuffix("</td>") for line in changed]
    assert set(named) == {"generator_widths", "discriminator_widths", "batch_size", "epochs", "report_every", "seed"}
    done = in_process(main, "report", f"--run={second}")
    assert done.stdout == f"{second / 'report.html'}\n"
    judged = Page((second / "report.html").read_text()).text
    assert judged.count("12.35") == 4, "by both judges, of generated and of real digits"
    assert judged.count("98.76% ± 0.11") == 4


def test_a_page_of_a_run_that_was_stopped_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.trainer.loop.Trainer._stop_agreed", lambda trainer: trainer.step == 6)
    done = in_process(main, "mlp", *SMALL, *MACHINE, f"--runs-dir={tmp_path}")
    assert done.returncode == 130
    [run] = folders(tmp_path)
    assert "unfinished: 6 steps in" in " ".join(Page((run / "report.html").read_text()).text)
    monkeypatch.undo()
    before = latest_checkpoint(open_run(run))["seconds"]

    took_s = [0]

    def slow_save(run: Run, step: int, state: dict[str, Any]) -> Path:
        took_s[0] += 100 * (step == 16)
        return save_checkpoint(run, step, state)

    monkeypatch.setattr("train.trainer.loop.time", SimpleNamespace(monotonic=lambda: time.monotonic() + took_s[0]))
    monkeypatch.setattr("train.trainer.loop.save_checkpoint", slow_save)
    assert in_process(main, "mlp", *SMALL, *MACHINE, f"--runs-dir={tmp_path}", "--resume").returncode == 0
    result = json.loads((run / "result.json").read_text())
    assert result["seconds"] >= result["seconds_since_last_start"], "both starts together"
    assert result["seconds"] == pytest.approx(before + result["seconds_since_last_start"], abs=0.15)
    assert result["seconds_since_last_start"] >= 100, "the last save's time too"


@pytest.mark.long
def test_a_data_set_is_judged_as_a_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "ACCURACY_NEEDED", 0.0)
    flags = ["write", "--provider=cpu", "--model=cdcgan", "--count=400", f"--out={tmp_path / 'set'}"]
    assert dataset_main(flags) == 0
    assert dataset_main(["join", f"--out={tmp_path / 'set'}"]) == 0
    monkeypatch.chdir(tmp_path / "set")
    # A data set is none of the runs that --missing leaves out.
    done = in_process(main, "evaluate", "--dataset=.", "--missing", *MACHINE, f"--runs-dir={tmp_path}", "--scores=2")
    assert done.returncode == 0, done.stderr
    assert "2 classifiers" in done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()]
    names = ["| model", "| ---", "| set", "| real digits", "| set, second judge", "| real digits, second judge"]
    assert [row[0] for row in rows] == names
    assert re.fullmatch(r"\d+\.\d\d% ± \d+\.\d\d \|", rows[2][-1])
    assert float(rows[2][7]) > 2, "no training image is as near as that"
    done = in_process(main, "evaluate", "--dataset=.", f"--run={tmp_path}", *MACHINE)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not allowed with argument --dataset" in done.stderr


def test_a_data_set_without_labels_or_with_too_few_digits_is_refused(tmp_path: Path) -> None:
    done = in_process(main, "evaluate", f"--dataset={tmp_path}", *MACHINE, f"--runs-dir={tmp_path}")
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {tmp_path / 'MNIST' / 'raw'} .*train-images-idx3-ubyte\n", done.stderr)
    assert dataset_main(["write", "--provider=cpu", "--model=mlp", "--count=40", f"--out={tmp_path}"]) == 0
    assert dataset_main(["join", f"--out={tmp_path}"]) == 0
    done = in_process(main, "evaluate", f"--dataset={tmp_path}", *MACHINE, f"--runs-dir={tmp_path}")
    assert done.returncode == 2
    assert "label 255" in done.stderr
    few = tmp_path / "few"
    assert dataset_main(["write", "--provider=cpu", "--model=cdcgan", "--count=100", f"--out={few}"]) == 0
    assert dataset_main(["join", f"--out={few}"]) == 0
    done = in_process(main, "evaluate", f"--dataset={few}", *MACHINE, f"--runs-dir={tmp_path}")
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {few / 'MNIST' / 'raw'} .*\b100 .*\b128 .*--count\n", done.stderr)
    assert not (tmp_path / "judge").exists(), "nothing was trained for it"
