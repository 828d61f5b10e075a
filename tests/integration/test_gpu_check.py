"""The GPU's checks with the CPU in its place: the code that will run there runs here, all but CUDA itself."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve.engine.onnx_runtime import ort
from tests.bench.report import Target
from tests.gpu import bundle, checks, fatbin
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
    assert "--no-index --no-deps --no-compile --target" in (tmp_path / "asked").read_text()
    parts[0].write_bytes(b"cut short")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0, "a part that was cut on its way is found"


def fat_binary(*entries: tuple[int, bytes]) -> bytes:
    """As a CUDA library has them: a header, and of each entry a header of 64 bytes and the code."""
    parts = []
    for architecture, code in entries:
        parts.append(struct.pack("<HHIQ12xI32x", 2, 0x101, 64, len(code), architecture) + code)
    together = b"".join(parts)
    return struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(together)) + together


def test_machine_code_of_other_architectures_is_left_out_and_nothing_else_moves() -> None:
    both = [(75, b"seventy5" * 4), (90, b"ninety.." * 3), (120, b"hundred." * 5)]
    plain, alone = fat_binary(*both), fat_binary((120, b"alone..." * 2))
    magic = struct.pack("<I", fatbin.MAGIC)
    longer = struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(plain) - 16 + 5) + plain[16:] + b"other"  # in part as one, not in all
    library = bytearray(b"text" + magic + b"no header" + longer + plain + b"data" + alone + b"end" + magic)
    whole = bytes(library)
    fatbin.keep_only(library, 90)
    assert len(library) == len(whole)
    kept = fat_binary(both[1])
    assert bytes(library) == whole.replace(plain, kept.ljust(len(plain), b"\0"))
    start = len(b"text" + magic + b"no header" + longer)
    assert [(at, [entry.architecture for entry in entries]) for at, entries in fatbin.fat_binaries(library)] == [
        (start, [90]),
        (whole.index(alone), [120]),
    ], "what has none of that architecture stays: no device of it looks there"
    with pytest.raises(ValueError, match="no machine code for 91; there is some for 90, 120"):
        fatbin.keep_only(library, 91)


def test_onnx_runtimes_own_library_is_made_of_such_fat_binaries() -> None:
    """Every byte of the section, or a format that has changed would be left whole in silence."""
    library = Path(ort.__file__).parent / "capi" / fatbin.LIBRARY
    if not library.exists():
        pytest.skip("this ONNX Runtime is built without CUDA")
    content = bytearray(library.read_bytes())
    entries = [entry for _, entries in fatbin.fat_binaries(content) for entry in entries]
    assert sum(entry.end - entry.start for entry in entries) > 0.5 * len(content)
    assert {80, 90} <= {entry.architecture for entry in entries}


def test_a_bundle_for_one_architecture_leaves_out_what_it_is_told_to(tmp_path: Path) -> None:
    code = fat_binary((80, os.urandom(80_000)), (90, os.urandom(8_000)))

    def fetch(folder: Path, python: str) -> None:
        with zipfile.ZipFile(folder / "onnxruntime_gpu-1.31.1-cp312-cp312-x.whl", "w") as wheel:
            wheel.writestr(f"onnxruntime/capi/{fatbin.LIBRARY}", code)
            wheel.writestr("onnxruntime/__init__.py", "")
        for name in ("grpcio-1.85.whl", "kiwi_solver-1.whl"):
            (folder / name).write_bytes(b"")

    parts = bundle.write(tmp_path, 1 << 20, "3.12", fetch, architecture=90, without=["kiwi-solver"])
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as wheels:
        names = {Path(name).name for name in wheels.getnames()} - {""}
        assert names == {"onnxruntime_gpu-1.31.1-cp312-cp312-x.whl", "grpcio-1.85.whl"}
        slim = wheels.extractfile("./onnxruntime_gpu-1.31.1-cp312-cp312-x.whl")
        assert slim is not None
        content = slim.read()
    assert len(content) < 20_000
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        [library] = [name for name in wheel.namelist() if name.endswith(".so")]
        assert len(wheel.read(library)) == len(code)


def test_an_architecture_without_machine_code_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "onnxruntime_gpu-1-x.whl", "w") as wheel:
            wheel.writestr(fatbin.LIBRARY, fat_binary((80, b"code....")))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bundle.subprocess, "run", run)
    with pytest.raises(SystemExit):
        bundle.main(["--architecture=91", f"--out={tmp_path}"])
    assert "--architecture 91: no machine code for 91; there is some for 80" in capsys.readouterr().err


def test_the_bundle_asks_for_what_the_project_needs_and_nothing_that_is_there() -> None:
    asked = bundle.wanted()
    assert any(each.startswith("onnxruntime-gpu") for each in asked)
    assert any(each.startswith("cuda-bindings") for each in asked)
    assert not any(each.startswith(("torch", "numpy")) for each in asked)
