"""The ten minutes on a GPU with the CPU in its place: stages, their limits, and what is left when one hangs or dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.bench.report import Target
from tests.gpu import __main__ as command
from tests.gpu import checks, session
from tests.gpu import stages as all_stages
from tests.gpu.__main__ import DRY, no_gpu
from tests.gpu.checks import Outcome, Plan, difference, engine_of
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
    stages = tuple(Stage(name, 4.0, run) for name, run in named.items())
    assert session.run(DRY, out, 60.0, stages, device="a stand-in") == 1
    written = json.loads(out.read_text())
    assert written["device"] == "a stand-in"
    assert written["failed"] == ["hangs", "raises", "dies"]
    assert written["decided"]["hangs"] == "nothing: it hung for 4 s; measured: before, child"
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
    assert session.run(DRY, out, 4.0, (Stage("hangs", 600.0, hangs), Stage("finds", 1.0, finds))) == 0
    written = json.loads(out.read_text())
    assert written["decided"]["hangs"] == "cut off, the session's time is spent; measured: before, child"
    assert written["failed"] == []
    assert "finds" not in written["figures"]


def test_cudas_libraries_are_loaded_in_each_stage_and_by_no_one_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch alone does not bring all that ONNX Runtime is linked with, and what one process has loaded another has not."""
    loaded = tmp_path / "loaded"

    def load() -> None:
        loaded.write_text(loaded.read_text() + f"{os.getpid()} " if loaded.exists() else f"{os.getpid()} ")

    monkeypatch.setattr(session, "load_libraries", load)
    stages = (Stage("first", 5.0, finds), Stage("second", 5.0, finds))
    assert session.run(DRY, tmp_path / "session.json", 60.0, stages) == 0
    assert not loaded.exists(), "there is no CUDA in a dry run"
    assert session.run(Plan(), tmp_path / "session.json", 60.0, stages) == 0
    assert len(set(loaded.read_text().split()) - {str(os.getpid())}) == 2


def test_a_probe_that_dies_is_told_and_waited_for_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "no_gpu", lambda: os._exit(11))
    monkeypatch.setattr(sys, "argv", ["gpu", "--session", f"--out={tmp_path / 'out.json'}"])
    assert command.main() == 3
    assert capsys.readouterr().err == "no GPU to check on: looking for one has ended its process\n"


@pytest.mark.parametrize("wrong", [0.25, np.nan])
def test_a_difference_is_that_of_the_worst_size(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size has plans of its own: ONNX Runtime may take TF32 for one alone."""
    engine = engine_of("mlp", DRY)
    assert engine.buckets() == [8, 4, 2, 1]
    assert difference(engine)["apart"] < 1e-6
    honest = engine.compute

    def compute(*given: Any) -> Any:
        made = honest(*given)
        if len(given[0]) == 4:
            made["images"][3] += wrong
        return made

    monkeypatch.setattr(engine, "compute", compute)
    assert difference(engine)["apart"] == pytest.approx(wrong, abs=1e-3, nan_ok=True)


def test_the_fastest_form_is_one_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is no small difference, and neither is one beyond the precision's own tolerance."""
    apart = {"last_as_3x3": 2e-5, "all_as_3x3": float("nan"), "gathered": 1e-6}
    rate = {"as_bundled": 1.0, "last_as_3x3": 9.0, "all_as_3x3": 8.0, "gathered": 2.0}
    asked: list[str] = []

    def measured(bundle: Any, plan: Plan, make: Any, options: Any, small: Any = ()) -> tuple[float, dict[str, Any]]:
        name = make()
        asked.append(name)
        a = options["cudnn_conv_algo_search"] == "HEURISTIC"
        per_s = {str(size): (3.0 if a else 2.0) for size in small}
        return rate.get(name, 0.5) * 1e6, {"apart": apart.get(name, 0.0), "per_s": per_s}

    named = {name: lambda model, name=name: name for name in all_stages.FORMS}
    monkeypatch.setattr(all_stages, "FORMS", named)
    only = {name: values for name, values in all_stages.ARITHMETICS.items() if name.startswith("fp32")}
    monkeypatch.setattr(
        all_stages, "ARITHMETICS", {name: (values[0], lambda it: it, *values[2:]) for name, values in only.items()}
    )
    monkeypatch.setattr(all_stages, "_measured", measured)
    noted: list[Any] = []
    decided = all_stages.forms(DRY, Notes(noted.append, time.monotonic() + 60))
    assert asked
    assert "dcgan exact gathered fp32 B, 1.0e-06 apart, 2,000,000" in decided
    assert "dcgan exact but for its difference last_as_3x3" in decided
    assert "dcgan 8 1.50" in decided, "the heuristics are compared at small sizes too"
    aims = {aim.name: (aim.value, aim.met) for note in noted for aim in note.get("aims", [])}
    assert aims["dcgan, exact: digits a second, millions"] == (2.0, True)


def test_what_serving_is_to_reach_is_known_before_three_instances_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a model of which no call was answered in the time is no division by zero."""
    tried: list[str] = []

    @contextmanager
    def server(plan: Plan, *flags: str) -> Iterator[SimpleNamespace]:
        tried.append(flags[0])
        if flags == ("--instances=3",):
            raise RuntimeError("did not start")
        yield SimpleNamespace(target="")

    monkeypatch.setattr(Plan, "server", server)
    monkeypatch.setattr(checks, "wire", lambda plan: Outcome({"digits_per_s": 200.0}))
    monkeypatch.setattr(checks, "_digits_per_s", lambda target, model, plan: 0.0 if model == "mlp" else 90.0)
    monkeypatch.setattr(all_stages, "_rate", lambda engine, size, plan: 100.0)
    noted: list[Any] = []
    notes = Notes(noted.append, time.monotonic() + 60)
    with pytest.raises(RuntimeError, match="did not start"):
        all_stages.served(DRY, notes)
    assert tried == ["--instances=2", "--instances=3"]
    shares = {aim.name.partition(":")[0]: aim.value for note in noted for aim in note.get("aims", [])}
    assert shares == {"mlp": 0.0, "dcgan": 0.9, "cdcgan": 0.9, "rpgan": 0.9}
    monkeypatch.setattr(Plan, "server", contextmanager(lambda plan, *flags: iter([SimpleNamespace(target="")])))
    assert all_stages.served(DRY, notes) == "three instances / two: dcgan 1.00, cdcgan 1.00, rpgan 1.00"


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
