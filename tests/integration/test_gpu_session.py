"""The ten minutes on a GPU with the CPU in its place: stages, their limits, and what is left when one hangs or dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bench.report import Target
from tests.gpu import session
from tests.gpu.__main__ import DRY, no_gpu
from tests.gpu.checks import Plan
from tests.gpu.session import STAGES, Stage
from tests.gpu.stages import Notes


def finds(plan: Plan, notes: Notes) -> str:
    notes.figure("rate", 7)
    notes.aim(Target("an aim", 1, 2))
    return "seven"


def raises(plan: Plan, notes: Notes) -> str:
    notes.figure("before", 1)
    raise RuntimeError("CUDA failure 700\nand a trace")


def hangs(plan: Plan, notes: Notes) -> str:
    notes.figure("before", 2)
    child = subprocess.Popen(["sleep", "600"])
    notes.figure("child", child.pid)
    time.sleep(600)
    return "never"


def dies(plan: Plan, notes: Notes) -> str:
    os._exit(9)


def test_a_stage_that_hangs_raises_or_dies_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "STOP_S", 0.5)
    named = {"hangs": hangs, "raises": raises, "dies": dies, "finds": finds}
    out = tmp_path / "session.json"
    stages = tuple(Stage(name, 1.0, run) for name, run in named.items())
    assert session.run(DRY, out, 60.0, stages) == 1
    written = json.loads(out.read_text())
    assert written["failed"] == ["hangs", "raises", "dies"]
    assert written["decided"]["hangs"].startswith("nothing: it hung")
    assert written["decided"]["raises"] == "nothing: RuntimeError: CUDA failure 700"
    assert written["decided"]["dies"] == "nothing: its process ended with 9"
    assert written["decided"]["finds"] == "seven"
    assert written["figures"]["finds"] == {"rate": 7}
    assert written["figures"]["raises"] == {"before": 1}, "what was measured before is kept"
    child = written["figures"]["hangs"].pop("child")
    assert written["figures"]["hangs"] == {"before": 2}
    gone = Path(f"/proc/{child}/stat")
    assert not gone.exists() or gone.read_text().split()[2] == "Z", "its servers end with it"
    assert [(target["name"], target["met"]) for target in written["targets"]] == [("an aim", False)]
    said = capsys.readouterr().out
    assert "finds: seven" in said
    assert "an aim" in said
    assert "MISSED" in said
    assert not list(tmp_path.glob("*-*.json")), "nothing is left beside the report"


def test_a_session_ends_when_its_time_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "STOP_S", 0.2)
    monkeypatch.setattr(session, "LEAST_S", 0.5)
    out = tmp_path / "session.json"
    assert session.run(DRY, out, 1.0, (Stage("hangs", 600.0, hangs), Stage("finds", 1.0, finds))) == 0
    written = json.loads(out.read_text())
    assert written["decided"]["hangs"] == "cut off, the session's time is spent; measured: before, child"
    assert written["failed"] == []
    assert "finds" not in written["figures"]


@pytest.mark.skipif(no_gpu() is None, reason="this machine has a GPU")
def test_a_session_without_a_gpu_says_so_and_exits_three(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu", "--session", f"--out={tmp_path / 'out.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("no GPU to check on: ")


STAGE = {stage.name: stage for stage in STAGES}
SERVING = ("served", "chosen", "rest")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name if name not in SERVING else pytest.param(name, marks=pytest.mark.long) for name in STAGE])
def test_a_stage_runs_dry_and_decides_something(name: str) -> None:
    if name == "latents":
        pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    noted: list[Any] = []
    # Until its first finding: a deadline that has passed ends a stage after what it is at.
    decided = STAGE[name].run(DRY, Notes(noted.append, time.monotonic() + (3.0 if name not in SERVING else 30.0)))
    assert decided
    assert any(each.get("figures") for each in noted)


def test_the_stages_before_the_last_fit_into_the_time_and_leave_some() -> None:
    assert [stage.name for stage in STAGES] == [
        *("latents", "profile", "forms", "tf32x3", "yardstick", "served", "chosen", "rest"),
    ]
    assert sum(stage.limit_s for stage in STAGES[:-1]) < session.TOTAL_S - 60


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_whole_session_runs_dry(tmp_path: Path) -> None:
    out = tmp_path / "session.json"
    command = [sys.executable, "-m", "tests.gpu", "--session", "--dry-run", "--total=240", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    written = json.loads(out.read_text())
    assert set(written["decided"]) == set(STAGE), done.stderr
    assert not [name for name in written["failed"] if name not in SERVING], written["decided"]
