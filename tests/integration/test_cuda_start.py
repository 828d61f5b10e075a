"""Starting where CUDA cannot be used: one line of why, a refusal or the CPU. Against a stand-in for NVIDIA's driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.engine.provider import described
from tests.conftest import SUBSET
from tests.server_process import ServerProcess

SOURCE = Path("tests/stub_driver.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the stand-in for the driver needs a C compiler")

REASONS = {
    "none": "the NVIDIA driver has no usable device (CUDA_ERROR_NO_DEVICE, 100)",
    "old": "the NVIDIA driver is for CUDA 12.8, and CUDA 13.0 needs driver 580 or newer",
    "hidden": "the NVIDIA driver shows no device (is CUDA_VISIBLE_DEVICES set?)",
    "one": "its device cannot be used: ",
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """The environment of a process that finds such a driver."""
    folder = tmp_path_factory.mktemp("driver")
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(SOURCE)], check=True)
    return lambda found: {"LD_LIBRARY_PATH": str(folder), "STUB_DRIVER": found}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment)


@pytest.mark.parametrize("found", REASONS)
def test_cuda_that_cannot_be_used_is_refused_in_one_line(found: str, driver: Callable[[str], dict[str, str]]) -> None:
    done = run(driver(found), "serve", "--grpc-port=0", "--http-port=0", "--provider=cuda")
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"error: --provider cuda: {REASONS[found]}")
    assert line.endswith("install the CUDA extra and a driver, or use --provider cpu")


def test_a_device_that_is_not_there_is_refused_by_its_number(driver: Callable[[str], dict[str, str]]) -> None:
    done = run(driver("two"), "serve", "--grpc-port=0", "--http-port=0", "--provider=cuda", "--device=2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --provider cuda: the NVIDIA driver shows no device 2, only 2, from 0 on")


def test_devices_are_called_as_the_driver_calls_them(driver: Callable[[str], dict[str, str]]) -> None:
    script = "from serve.engine import driver; print(driver.why_unusable(1), driver.device_names())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ | driver("two")
    )
    assert done.stdout == "None ['NVIDIA One', 'NVIDIA Two']\n"


@pytest.mark.parametrize("found", ["none", "one"])
def test_auto_serves_on_the_cpu_and_says_why(found: str, driver: Callable[[str], dict[str, str]]) -> None:
    server = ServerProcess(environment=driver(found))
    try:
        assert "on cpu: " in server.announced
    finally:
        status, log = server.terminate()
    assert status == 0
    assert f"provider auto: on the CPU, because {REASONS[found]}" in log
    assert "Traceback" not in log


@pytest.mark.long
def test_a_data_set_is_written_on_the_cpu(driver: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    done = run(driver("none"), "serve.dataset", "write", "--count=10", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "10 digits by rpgan/1" in done.stdout


@pytest.mark.long
def test_export_proves_what_it_can(driver: Callable[[str], dict[str, str]]) -> None:
    done = run(driver("one"), "export", "verify", "serve/bundled/mlp/1")
    assert done.returncode == 0, done.stderr
    assert "onnxruntime-cpu" in done.stdout
    assert "onnxruntime-cuda" not in done.stdout


@pytest.mark.long
def test_training_asked_for_cuda_is_refused_in_one_line(driver: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    done = run(driver("none"), "train", "mlp", "--device=cuda", f"--data-dir={SUBSET}", f"--runs-dir={tmp_path}")
    assert done.returncode == 2
    assert "error: --device cuda: PyTorch finds no usable CUDA device here" in done.stderr.strip().splitlines()[-1]


def test_cudas_own_failure_is_taken_out_of_the_text() -> None:
    text = (
        "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime/core/providers/cuda/cuda_call.cc:129 ... [with ERRTYPE = cudaError] "
        "CUDA failure 100: no CUDA-capable device is detected ; GPU=0 ; hostname=box ; file=/x.cc ; line=286 ; expr=cudaSetDevice"
    )
    assert described(RuntimeError(text)) == "CUDA failure 100: no CUDA-capable device is detected"
    assert described(RuntimeError("Failed to load library libcudnn.so.9\nand a trace")) == "Failed to load library libcudnn.so.9"
    assert described(RuntimeError("")) == "RuntimeError"
