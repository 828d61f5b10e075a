"""The GPU's checks with the CPU in its place: the code that will run there runs here, all but CUDA itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.report import Target
from tests.gpu import bundle, checks
from tests.gpu.__main__ import DRY, no_gpu, run
from tests.gpu.checks import CHECKS, Outcome, Plan

TWIN = replace(DRY, seconds=0.2, memory_seconds=1.0)
QUICK = ("strictness", "parity", "graphs", "releases")


@pytest.mark.skipif(no_gpu() is None, reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_exits_three(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu", f"--out={tmp_path / 'out.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("no GPU to check on: ")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.timeout(600)  # training in every precision takes minutes when the machine is busy
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CHECKS])
def test_a_check_runs_and_holds_on_the_cpu(name: str) -> None:
    # Every call of the slowest model must end within the measurement, on a busy machine too.
    outcome = CHECKS[name](replace(TWIN, seconds=2.0) if name == "served" else TWIN)
    assert outcome.figures
    assert all(target.met for target in outcome.fixed), outcome
    if name == "served":
        assert {target.name.split(":")[0] for target in outcome.aims} == {"mlp", "dcgan", "cdcgan", "rpgan", "one digit unloaded"}
        assert outcome.figures["dcgan"]["digits_per_s"] > 100
    if name == "wire":
        assert outcome.figures["bytes_per_s"] == outcome.figures["digits_per_s"] * 784 > 1e6


def test_the_report_names_what_is_missed_and_what_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(plan: Plan) -> Outcome:
        raise RuntimeError("CUDA failure 700")

    monkeypatch.setitem(checks.CHECKS, "wire", raising)
    monkeypatch.setitem(checks.CHECKS, "memory", lambda plan: Outcome({"growth": 1}, (Target("growth", 9, 2, at_most=True),)))
    monkeypatch.setitem(checks.CHECKS, "served", lambda plan: Outcome({"rate": 1}, (), (Target("an aim", 1, 2),)))
    out = tmp_path / "gpu-check.json"
    assert run(TWIN, ["served"], out) == 0, "an aim that is missed is no failure"
    assert run(TWIN, ["memory"], out) == 1
    assert run(TWIN, ["wire", "served"], out) == 1
    written = json.loads(out.read_text())
    assert written["raised"] == ["wire"]
    assert written["figures"]["wire"] == {"raised": "RuntimeError: CUDA failure 700"}
    assert [target["met"] for target in written["targets"]] == [False]
    assert "MISSED" in capsys.readouterr().out


def test_the_bundle_for_a_machine_without_a_network_is_whole(tmp_path: Path) -> None:
    """A dry run: wheels of our own making, a Python that says it has CUDA."""

    def fetch(folder: Path, python: str) -> None:
        assert python == "3.12"
        for name in (
            "onnxruntime_gpu-1.31.1-cp312-cp312-x.whl",
            "numpy-2.0-cp312.whl",
            "nvidia_cudnn_cu13-9.whl",
            "grpcio-1.85.whl",
        ):
            (folder / name).write_bytes(os.urandom(150_000))

    parts = bundle.write(tmp_path / "bundle", 100_000, "3.12", fetch)
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) <= 100_000
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python)}
    command = ["sh", str(tmp_path / "bundle" / "install.sh"), str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"next: PYTHONPATH={tmp_path}/there/packages make gpu-check PYTHON={python}" in done.stdout
    assert {path.name.partition("-")[0] for path in (tmp_path / "there" / "wheels").iterdir()} == {"onnxruntime_gpu", "grpcio"}
    assert "--no-index --no-deps --target" in (tmp_path / "asked").read_text()
    parts[0].write_bytes(b"cut short")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0, "a part that was cut on its way is found"


def test_the_bundle_asks_for_what_the_project_needs_and_nothing_that_is_there() -> None:
    asked = bundle.wanted()
    assert any(each.startswith("onnxruntime-gpu") for each in asked)
    assert any(each.startswith("cuda-bindings") for each in asked)
    assert not any(each.startswith(("torch", "numpy")) for each in asked)
