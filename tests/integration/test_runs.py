"""Runs as their owner looks at them: listed, side by side, each on a page of its own."""

from __future__ import annotations

import fcntl
import json
import re
import shlex
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from export.cli import main as export_main
from serve.dataset.command import main as dataset_main
from tests.command_lines import in_process
from tests.conftest import SUBSET
from train.checkpoint import Run, create_run, held, latest_checkpoint, open_run, save_checkpoint
from train.cli import main
from train.errors import CheckpointError
from train.evaluation import judge
from train.models import trained_generator
from train.presets import preset
from train.progress import progress_bar
from train.reports import judging
from train.runs import runs_of

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
    assert rows[1][4:8] == ["–"] * 4
    assert rows[1][8].startswith("not MNIST ("), "it is the small set"
    assert rows[2][0] == str(second)
    assert rows[2][4:8] == ["–", "12.35", "0.500", "98.76% ± 0.11"]


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
    assert len(page.sources) == 1 + 6 + 3, "the losses, a grid for each of five log points and one at the end, three layers"
    assert "Inside the generator" in page.text
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    changed = [line for line in (first / "report.html").read_text().splitlines() if '<tr class="changed">' in line]
    named = [line.split("<td>")[1].removesuffix("</td>") for line in changed]
    assert set(named) == {"generator_widths", "discriminator_widths", "batch_size", "epochs", "report_every", "seed"}
    done = in_process(main, "report", f"--run={second}")
    assert done.stdout == f"{second / 'report.html'}\n"
    judged = Page((second / "report.html").read_text()).text
    assert judged.count("12.35") == 4, "by both judges, of generated and of real digits"
    assert "Worst and best digits" not in judged
    assert any("lower is better" in text for text in judged), "what a figure means"
    for name in ("worst", "best"):
        shutil.copy(next((second / "pictures").glob("*.png")), second / f"{name}.png")
    in_process(main, "report", f"--run={second}")
    assert "Worst and best digits" in Page((second / "report.html").read_text()).text
    assert judged.count("98.76% ± 0.11") == 4


def test_a_page_of_a_run_that_was_stopped_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.trainer.loop.Trainer._stop_agreed", lambda trainer: trainer.step == 6)
    done = in_process(main, "mlp", *SMALL, *MACHINE, f"--runs-dir={tmp_path}")
    assert done.returncode == 130
    [run] = folders(tmp_path)
    assert "unfinished: 6 of 16 steps in" in " ".join(Page((run / "report.html").read_text()).text)
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


def config_of(folder: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return stored


def rewrite(folder: Path, **provenance: Any) -> None:
    stored = config_of(folder)
    (folder / "config.json").write_text(json.dumps(stored | {"provenance": stored["provenance"] | provenance}))


def damage(folder: Path, how: str) -> None:
    """One of the ways that a run's folder has been found in."""
    stored = config_of(folder)
    if how == "newer":
        stored["config"]["momentum"] = 0.9
    if how == "older":
        del stored["config"]["grid_images"]
    (folder / "config.json").write_text(json.dumps(stored))
    if how == "named by hand":
        shutil.copy(next((folder / "checkpoints").glob("step-*.pt")), folder / "checkpoints" / "step-best.pt")
        shutil.copy(next((folder / "pictures").glob("fake-*")), folder / "pictures" / "fake-best.png")
    if how == "empty losses":
        (folder / "losses.npy").write_bytes(b"")
    if how == "result":
        (folder / "result.json").write_text('{"seconds": "long"}')
    if how == "damaged":
        for path in (folder / "checkpoints").glob("step-*.pt"):
            path.write_bytes(path.read_bytes()[:1000])
    if how == "another's":
        for path in (folder / "checkpoints").glob("step-*.pt"):
            torch.save({"step": 16, "generator": {"weight": torch.zeros(1)}}, path)
    if how == "no checkpoint":
        for path in (folder / "checkpoints").glob("step-*.pt"):
            torch.save([16], path)
    if how == "quality":
        (folder / "quality.json").write_text('{"model": 3}')


@pytest.mark.parametrize(
    ("how", "state"),
    [("newer", "other version"), ("older", "other version"), ("named by hand", "finished"), ("empty losses", "finished"),
     ("result", "finished"), ("quality", "finished")],
)  # fmt: skip
def test_one_bad_run_is_named_and_holds_up_no_other(how: str, state: str, runs: Path, tmp_path: Path) -> None:
    """Issue: list, activations, compare and export failed, and did not say at which run."""
    good, bad = (tmp_path / "mlp" / name for name in ("20260101-000000", "20260102-000000"))
    for place, run in zip((good, bad), folders(runs), strict=True):
        shutil.copytree(run, place)
    damage(bad, how)
    done = in_process(main, "list", f"--runs-dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    states = {row[0]: row[1] for row in map(cells, done.stdout.splitlines())}
    assert (states[str(good)], states[str(bad)]) == ("finished", state)
    assert ("is damaged" in done.stderr) == (how in ("result", "quality"))
    done = in_process(main, "activations", f"--runs-dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    of_other_version = how in ("newer", "older")
    assert str(good if of_other_version else bad) in done.stdout
    assert (f"skipped: {bad} was made by another version" in done.stderr) == of_other_version
    done = in_process(main, "compare", str(good), str(bad))
    assert done.returncode == 2 * of_other_version
    assert str(bad) in done.stdout + done.stderr
    done = in_process(main, "report", f"--run={bad}")
    assert done.returncode == 2 * of_other_version, done.stderr


@pytest.mark.parametrize("how", ["damaged", "another's", "no checkpoint"])
def test_a_checkpoint_that_cannot_be_used_is_a_line_and_holds_up_no_other_run(
    how: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = runs_of(runs, "mlp")[:2]
    shutil.copytree(bad.folder, tmp_path / "bad one")
    damage(tmp_path / "bad one", how)
    bad = open_run(tmp_path / "bad one")
    monkeypatch.setattr("train.cli._chosen_runs", lambda flags: [bad, good])
    done = in_process(main, "activations")
    assert (done.returncode, done.stdout.count(str(good.folder)) > 1) == (2, True)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(bad.folder) in line
    fake = SimpleNamespace(evaluate=lambda run: latest_checkpoint(run) and trained_generator(run.config, latest_checkpoint(run)))
    monkeypatch.setattr(judging, "_kept_evaluator", lambda *_: fake)
    assert [run for run, _ in judging.judge_runs([bad, good], SUBSET, runs, torch.device("cpu"))] == [good]
    done = in_process(main, "mlp", *MACHINE, f"--resume={bad.folder}", "--epochs=9")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert str(bad.folder) in done.stderr


def test_what_a_finished_run_has_lost_is_trained_again_as_it_is_advised(runs: Path, tmp_path: Path) -> None:
    """Its last checkpoint is damaged: the advice is to delete that, and then to train the rest again."""
    folder = tmp_path / "mlp" / "a run"
    shutil.copytree(folders(runs)[0], folder)
    *_, last = sorted((folder / "checkpoints").iterdir())
    whole = latest_checkpoint(open_run(folder))["generator"]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{last} cannot be read .*; delete it to use the one before"):
        latest_checkpoint(open_run(folder))
    last.unlink()
    done = in_process(export_main, f"--run={folder}", f"--models-dir={tmp_path}")
    assert done.returncode == 2
    [command] = re.findall("train it again with: (.*)", done.stderr)
    assert shlex.split(command) == ["make", "train", "PRESET=mlp", f"ARGS=--resume '{folder}'"]
    done = in_process(main, "mlp", *MACHINE, f"--resume={folder}")
    assert done.returncode == 0, done.stderr
    again = latest_checkpoint(open_run(folder))["generator"]
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_the_newest_run_is_the_one_that_began_last(runs: Path, tmp_path: Path) -> None:
    """Issue: a folder's name decided, a renamed run or one with a wrong clock won, and was published in silence."""
    early, late, future = (tmp_path / "mlp" / name for name in ("zz-best", "20260101-000000", "20260301-000000"))
    for place in (early, late, future):
        shutil.copytree(folders(runs)[0], place)
    rewrite(early, started="2026-01-01T00:00:00+00:00")
    rewrite(late, started="2026-02-01T00:00:00+00:00")
    rewrite(future, started="2062-01-01T00:00:00+00:00")
    done = in_process(export_main, f"--runs-dir={tmp_path}", f"--models-dir={tmp_path / 'models'}", "--min-quality=recall=2")
    assert f"{future} began at 2062-01-01 00:00 UTC by its clock: it counts as the oldest" in done.stderr
    assert f"the newest finished mlp run: {late}, begun 2026-02-01 00:00 UTC" in done.stderr
    assert [run.folder for run in runs_of(tmp_path, "mlp")] == [late, early, future]
    for folder, name in ((early, "20250102-030405"), (late, "20250102-030406-2")):  # as before they recorded it
        rewrite(folder, started=None)
        folder.rename(folder.with_name(name))
    assert [run.folder.name for run in runs_of(tmp_path, "mlp")][:2] == ["20250102-030406-2", "20250102-030405"]


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    """Issue: --resume auto beside a live run trained it twice, and its checkpoints were replaced and unlinked."""
    config = preset("mlp").replace({"epochs": 2})
    run = create_run(tmp_path, config, {"data": {}})
    save_checkpoint(run, 0, {"step": 0})
    left, live = (run.folder / "checkpoints" / f".step-00000007.pt-{digit * 16}" for digit in "ab")
    left.write_bytes(b"half")
    with live.open("wb") as writing, held(run):
        assert not left.exists(), "what a killed process left"
        fcntl.flock(writing, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for resume in ("--resume", "--resume=auto", f"--resume={run.folder}"):
            done = in_process(main, "mlp", *MACHINE, f"--runs-dir={tmp_path}", resume)
            assert done.returncode == 2
            assert done.stderr == f"error: {run.folder} is being trained by another process; let it end, or stop it first\n"
        assert not list(tmp_path.glob("mlp/*/result.json"))
    with held(run):
        pass


def test_a_finished_run_can_be_made_longer_and_ends_as_if_it_had_been_so_from_the_beginning(runs: Path, tmp_path: Path) -> None:
    longer = tmp_path / "mlp" / "longer"
    shutil.copytree(folders(runs)[0], longer)
    done = in_process(main, "mlp", *MACHINE, f"--resume={longer}")
    assert done.returncode == 2
    assert "is finished at step 16, and these numbers end at 16; name more --epochs" in done.stderr
    assert f'with: make train PRESET=mlp ARGS="--resume {longer}"' in in_process(main, "dcgan", f"--resume={longer}").stderr
    done = in_process(main, "mlp", *MACHINE, f"--resume={longer}", "--epochs=3")
    assert done.returncode == 2
    assert "is finished at step 16, and these numbers end at 12" in done.stderr
    done = in_process(main, "mlp", *MACHINE, f"--resume={longer}", "--epochs=6", "--seed=3")
    assert "--seed cannot be changed" in done.stderr
    assert (longer / "result.json").exists()
    done = in_process(main, "mlp", *MACHINE, f"--resume={longer}", "--epochs=6")
    assert done.returncode == 0, done.stderr
    whole = in_process(main, "mlp", *SMALL, "--epochs=6", "--seed=1", *MACHINE, f"--runs-dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    [other] = folders(tmp_path / "whole")
    assert np.load(longer / "losses.npy").tolist() == np.load(other / "losses.npy").tolist()
    ours, theirs = (latest_checkpoint(open_run(folder))["generator"] for folder in (longer, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert config_of(longer)["config"]["epochs"] == 6
    assert json.loads((longer / "result.json").read_text())["step"] == 24


def test_resuming_on_another_machine_is_said_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: the bits that are promised were lost in silence."""
    monkeypatch.setattr("train.trainer.loop.Trainer._stop_agreed", lambda trainer: trainer.step == 6)
    assert in_process(main, "mlp", *SMALL, *MACHINE, f"--runs-dir={tmp_path}").returncode == 130
    monkeypatch.undo()
    [run] = folders(tmp_path)
    row = cells(in_process(main, "list", f"--runs-dir={tmp_path}").stdout.splitlines()[2])
    assert row[1:3] == ["unfinished", "6 of 16"]
    assert row[3].endswith(" min")
    rewrite(run, cpu_threads=7)
    done = in_process(main, "mlp", *SMALL, *MACHINE, f"--runs-dir={tmp_path}", "--resume")
    assert done.returncode == 0, done.stderr
    assert f"cpu threads: 1 now, 7 when {run} began\nthe result will not have the bits" in done.stderr
    [start] = config_of(run)["provenance"]["resumed"]
    assert f"training mlp on cpu into {run}, from step 6\n" in done.stderr
    assert (start["step"], start["cpu_threads"], config_of(run)["provenance"]["cpu_threads"]) == (6, 1, 7)
    assert "resumed at step 6" in " ".join(Page((run / "report.html").read_text()).text)


def test_compare_takes_the_newest_run_that_is_long_enough(tmp_path: Path) -> None:
    """Issue: a short run that was newer was an error."""
    folder = []
    for last in (3500, 500):
        run = create_run(tmp_path, preset("mlp"), {"data": {}})
        losses = [[step, 1.0, 0.2] for step in range(500, last + 1, 500)]
        np.save(run.folder / "losses.npy", np.array(losses))
        folder.append(run.folder)
    done = in_process(main, "compare", f"--runs-dir={tmp_path}")
    assert done.returncode == 1
    assert done.stdout.startswith(f"{folder[0]}\n  step  generator")
    shutil.rmtree(folder[0])
    done = in_process(main, "compare", f"--runs-dir={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has come to step 3500; train one with: make train PRESET=mlp" in done.stderr


def test_a_log_file_has_a_line_a_minute_and_no_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Issue: 37 kB of carriage returns."""
    now = [0.0]
    monkeypatch.setattr("train.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress_bar(1000, "mlp", initial=100) as bar:
        for _ in range(900):
            now[0] += 1
            bar.update()
            bar.set_postfix(refresh=False, G="1.000")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 14
    assert said[0] == "mlp: step 160 of 1,000, about 14 min left, G 1.000"
