"""Sentences that name a way out, taken by their word, from a path with a space."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from export.cli import build_parser as export_parser
from export.cli import main as export_main
from serve.settings import from_arguments
from tests.command_lines import in_process
from tests.conftest import SUBSET
from train.cli import build_parser, main
from train.trainer.loop import Trainer

ROOT = Path(__file__).parents[2]
SMALL = ["--generator-widths=8", "--discriminator-widths=8", "--batch-size=64", "--epochs=3", "--device=cpu", "--threads=1"]


def advised(text: str, before: str) -> str:
    """The command after some words, up to the end of the line or a semicolon."""
    found = re.search(rf"{re.escape(before)} ([^\n;]+)", text)
    assert found, text
    return found[1]


def recipe(command: str) -> list[str]:
    """The module's arguments that a make command comes to, which is read and not run."""
    assert command.startswith("make ")
    listed = subprocess.run(["sh", "-c", f"make -n {command[5:]}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return shlex.split(listed.strip().splitlines()[-1])[2:]


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    return tmp_path / "all my 'runs'"


def test_a_stopped_runs_advice_leads_to_a_served_model(
    runs_dir: Path, subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, models = subset.rename(tmp_path / "the data"), runs_dir / "models"
    train = ["mlp", *SMALL, f"--runs-dir={runs_dir}", f"--data-dir={data}"]
    monkeypatch.setattr(Trainer, "_stop_agreed", lambda trainer: trainer.step == 6)
    stopped = in_process(main, *train)
    assert stopped.stderr.endswith("add --resume to the same command to go on\n")
    monkeypatch.undo()
    [folder] = (runs_dir / "mlp").iterdir()
    refused = in_process(export_main, f"--run={folder}", f"--models-dir={models}")
    module, *finish = recipe(advised(refused.stderr, "finish it with:"))
    assert module == "train"
    done = in_process(main, *finish, f"--data-dir={data}", "--device=cpu", "--threads=1")
    assert done.returncode == 0, done.stderr
    module, *arguments = recipe(advised(done.stdout, "next:"))
    flags = export_parser().parse_args(["run", *arguments])
    assert (module, flags.run, flags.data_dir) == ("export", folder, data)
    done = in_process(export_main, f"--run={folder}", f"--models-dir={models}", "--no-judge")
    assert done.returncode == 0, done.stderr
    module, *arguments = recipe(advised(done.stdout, "next:"))
    assert module == "serve"
    assert from_arguments(arguments, {}).models_dir == models


def test_where_there_is_no_run_it_is_said_how_to_start_one(runs_dir: Path) -> None:
    for command in (["list"], ["activations"], ["compare"], ["mlp", "--resume"]):
        done = in_process(main, *command, f"--runs-dir={runs_dir}", *([f"--data-dir={SUBSET}"] if "mlp" in command else []))
        assert done.returncode == 2
        module, *arguments = recipe(advised(done.stderr, "with:"))
        assert module == "train"
        assert build_parser().parse_args(arguments).runs_dir == runs_dir


def test_a_runs_page_says_how_to_judge_it(runs_dir: Path) -> None:
    done = in_process(main, "mlp", *SMALL, "--steps=1", f"--runs-dir={runs_dir}", f"--data-dir={SUBSET}")
    assert done.returncode == 0, done.stderr
    [folder] = (runs_dir / "mlp").iterdir()
    page = (folder / "report.html").read_text(encoding="utf-8").replace("&#39;", "'").replace("&#34;", '"')
    found = re.search("<code>(make evaluate.*)</code>", page)
    assert found
    module, *arguments = recipe(found[1])
    assert (module, build_parser().parse_args(arguments).run) == ("train", folder)
