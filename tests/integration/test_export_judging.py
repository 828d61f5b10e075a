"""``make export``: refuses first, says what it is about to judge and how to do without, and follows training on any data."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import cli
from export.bundle import Exported
from serve.models.repository import read_bundle
from tests.command_lines import in_process
from tests.conftest import SUBSET
from tests.other_data import write_patterns
from train.checkpoint import Run, create_run, save_checkpoint, write_json
from train.cli import main as train_main
from train.presets import preset

ROOT = Path(__file__).parents[2]
QUALITY = {"step": 7, "model": {"recall": 0.5}}
Judged = list[str]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    def make(name: str, digest: str = "", finished: bool = True, judged_step: int = 0) -> Run:
        run = create_run(tmp_path / "runs", preset(name), {"data": {"train-images-idx3-ubyte": digest}} if digest else {})
        save_checkpoint(run, 7, {"step": 7})
        if finished:
            write_json(run.folder / "result.json", {"step": 7})
        if judged_step:
            write_json(run.folder / "quality.json", QUALITY | {"step": judged_step})
        return run

    return make


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judged:
    """What was judged and exported, in order; neither is really done."""
    seen: Judged = []

    def judge_runs(runs: list[Run], *_: Any) -> None:
        seen.extend(f"judged {run.config.preset}" for run in runs)

    def export_run(run: Run, *_: Any) -> Exported:
        seen.append(f"exported {run.config.preset}")
        return Exported(tmp_path, 0.0, 0)

    monkeypatch.setattr(cli, "judge_runs", judge_runs)
    monkeypatch.setattr(cli, "export_run", export_run)
    return seen


def export(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    where = (f"--runs-dir={tmp_path / 'runs'}", f"--models-dir={tmp_path / 'models'}", f"--data-dir={SUBSET}")
    return in_process(cli.main, "--judge", *where, *flags)


def test_what_cannot_be_exported_is_refused_before_anything_is_judged(
    make_run: Callable[..., Run], done: Judged, tmp_path: Path
) -> None:
    good, unfinished = make_run("mlp"), make_run("dcgan", finished=False)
    blocker = tmp_path / "file"
    blocker.touch()
    for flags, message in (
        ([f"--run={unfinished.folder}"], f"{unfinished.folder} is not finished; finish it with: .*--resume"),
        ([f"--run={good.folder}", "--name=Über"], "--name 'Über'"),
        ([f"--run={good.folder}", f"--models-dir={blocker}"], f"cannot write a bundle to {blocker}"),
        ([f"--run={good.folder}", "--min-quality=label_accuracy=0.9"], "label_accuracy of .* without labels"),
        ([f"--run={good.folder}", "--min-quality=beauty=1"], "--min-quality: 'beauty'"),
    ):
        refused = export(tmp_path, *flags)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert re.search(f"^error: .*{message}", refused.stderr)
    assert done == []


@pytest.mark.parametrize("stale", [0, 6])
def test_what_was_not_judged_is_judged_first_and_it_is_said_how_to_do_without(
    stale: int, make_run: Callable[..., Run], done: Judged, tmp_path: Path
) -> None:
    """So is what was judged at another step than the run's last."""
    runs = {"mlp": make_run("mlp", judged_step=7), "dcgan": make_run("dcgan", judged_step=stale)}
    said = export(tmp_path)
    assert said.returncode == 0, said.stderr
    assert done == ["judged dcgan", "exported mlp", "exported dcgan"]
    [without] = re.findall(r"to export without judging: (.*)", said.stderr)
    assert without == f"make export RUN={runs['dcgan'].folder} ARGS=--no-judge"
    done.clear()
    command = subprocess.run(
        ["make", "-n", "-o", ".venv/.all", *shlex.split(without)[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    flags = shlex.split(command.partition("-m export ")[2])
    assert flags == ["--judge", "--run", str(runs["dcgan"].folder), "--no-judge"]
    assert in_process(cli.main, *flags, f"--models-dir={tmp_path / 'models'}").returncode == 0
    assert done == ["exported dcgan"]


def test_a_run_of_other_data_is_not_judged_by_mnist(make_run: Callable[..., Run], done: Judged, tmp_path: Path) -> None:
    other, own = make_run("mlp", digest="0" * 64), make_run("dcgan")
    refused = export(tmp_path, f"--run={other.folder}")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert re.match(rf"error: {other.folder} .*other data than {SUBSET} .*--data-dir.*ARGS=--no-judge\n", refused.stderr)
    assert done == []
    said = export(tmp_path)
    assert said.returncode == 0, said.stderr
    assert f"skipped: {other.folder} " in said.stderr
    assert done == ["judged dcgan", "exported dcgan"], own.folder


@pytest.mark.long
@pytest.mark.timeout(1600)  # three classifiers are trained, on a machine that may have other things to do
def test_after_training_on_other_data_the_advice_leads_to_a_bundle(tmp_path: Path) -> None:
    data = write_patterns(tmp_path / "data", 5, train=1000, test=128)
    small = [
        "--generator-widths=8,8,8",
        "--discriminator-widths=4,4,4",
        "--labels=5",
        "--epochs=1",
        "--device=cpu",
        "--threads=1",
    ]
    done = in_process(train_main, "rpgan", *small, f"--runs-dir={tmp_path / 'runs'}", f"--data-dir={data}")
    assert done.returncode == 0, done.stderr
    [advice] = re.findall(r"^next: (.*)$", done.stdout, re.MULTILINE)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    shutil.copy(ROOT / "Makefile", tmp_path)
    command = advice.replace("make ", "make -o .venv/.all ")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    followed = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    assert followed.returncode == 0, followed.stderr
    [kept] = re.findall(r"^the judge is kept as (.*)$", followed.stderr, re.MULTILINE)
    assert (tmp_path / kept).exists()
    bundle = read_bundle(tmp_path / "models" / "rpgan" / "1")
    assert bundle.manifest.labels == 5
    assert json.loads(bundle.quality_json)["labels"] == "the test set's"
