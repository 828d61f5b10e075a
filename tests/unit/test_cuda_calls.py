"""How CUDA is called, with names of its bindings that record in place of NVIDIA's: which thread, which libraries, which error."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from serve.engine import cuda, driver, provider
from serve.errors import EngineError, OutOfMemoryError, ProviderError
from serve.manifest import BUNDLED_DIR
from serve.models import loader
from serve.models.repository import Repository
from serve.observability.metrics import Metrics
from serve.settings import Settings
from tests.host_device import COMPILER

SET_DEVICE, EXCHANGE = "cudaSetDevice", "cudaThreadExchangeStreamCaptureMode"


class Recorded:
    """Bindings that note each call with its thread and succeed, but for those in ``failing``."""

    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread-local")  # noqa: N815
    cudaDeviceAttr = SimpleNamespace(  # noqa: N815
        cudaDevAttrComputeCapabilityMajor="Major", cudaDevAttrComputeCapabilityMinor="Minor"
    )

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, tuple[Any, ...]]] = []
        self.failing: set[str] = set()
        self.codes: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((threading.current_thread().name, name, arguments))
            code = _Code(self.codes.get(name, name in self.failing))
            return (code, *RETURNED[name]) if name in RETURNED else (code, f"from {name}")

        return call


class _Code(int):
    name = "cudaErrorUnknown"


RETURNED: dict[str, tuple[Any, ...]] = {
    "cudaMemGetInfo": (1, 5),
    "cudaDeviceGetAttribute": (9,),  # a device of capability 9.9
    "nvrtcGetSupportedArchs": ([75, 90, 100],),
    "nvrtcGetCUBINSize": (3,),
    "nvrtcGetPTXSize": (4,),
}


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setattr(cuda, "_bindings", lambda name: recorded)
    monkeypatch.setattr(cuda, "_this_thread", threading.local())
    cuda._kernel.cache_clear()
    return recorded


def test_every_thread_that_calls_cuda_minds_its_own_captures_alone(bindings: Recorded) -> None:
    """What it allocates or releases would break a capture in another thread."""

    def use() -> None:
        cuda.Device(3).wait(7)
        cuda.Device(3).memory_total_bytes()

    for name in ("one", "two"):
        thread = threading.Thread(target=use, name=name)
        thread.start()
        thread.join(30)
    taken = [(SET_DEVICE, (3,)), (EXCHANGE, ("thread-local",))]
    own = [*taken, ("cudaStreamSynchronize", (7,)), ("cudaMemGetInfo", ())]
    assert bindings.calls == [(name, *call) for name in ("one", "two") for call in own]


def test_a_thread_whose_mode_could_not_be_set_tries_again(bindings: Recorded) -> None:
    bindings.failing = {EXCHANGE}
    with pytest.raises(EngineError, match=f"{EXCHANGE} failed: cudaErrorUnknown"):
        cuda.Device().memory_total_bytes()
    bindings.failing = set()
    assert cuda.Device().memory_total_bytes() == 5
    assert [name for _, name, _ in bindings.calls] == [SET_DEVICE, EXCHANGE, SET_DEVICE, EXCHANGE, "cudaMemGetInfo"]


def test_a_thread_that_calls_two_devices_takes_each_in_turn(bindings: Recorded) -> None:
    for number in (0, 1, 1, 0):
        cuda.Device(number).wait(7)
    assert [arguments for _, name, arguments in bindings.calls if name == SET_DEVICE] == [(0,), (1,), (0,)]


def test_memory_that_lacks_is_told_from_a_device_that_fails(bindings: Recorded) -> None:
    bindings.codes = {"cudaHostRegister": 2, "cudaStreamSynchronize": 700}
    with pytest.raises(OutOfMemoryError, match="cudaHostRegister failed"):
        cuda.Device().lock_pages(np.zeros(1))
    with pytest.raises(EngineError) as caught:
        cuda.Device().wait(7)
    assert type(caught.value) is EngineError


def test_a_kernel_is_compiled_once_a_process_for_the_device_itself(bindings: Recorded) -> None:
    """Issue: PTX of NVRTC 13.2 is refused by the driver that is named as the least; and it was compiled for each engine."""
    flags: list[Any] = []
    threads = [threading.Thread(target=lambda: flags.append(cuda.Device().compile("src", "draw", ["-DA=1"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert flags == ["from cuModuleGetFunction"] * 4
    [(_, _, arguments)] = [call for call in bindings.calls if call[1] == "nvrtcCompileProgram"]
    assert arguments[2] == [b"--fmad=false", b"--gpu-architecture=sm_99", b"-DA=1"]
    assert "nvrtcGetCUBIN" in [name for _, name, _ in bindings.calls]
    cuda.Device(1).compile("src", "draw", ["-DA=1"])
    assert [name for _, name, _ in bindings.calls].count("cuModuleLoadData") == 2, "and once more for another device"


@pytest.mark.parametrize("fails", ["nvrtcGetCUBIN", "cuModuleLoadData"])
def test_where_there_is_no_machine_code_for_a_device_its_driver_compiles(fails: str, bindings: Recorded) -> None:
    """One that NVRTC does not know yet, or whose driver does not take the code."""

    class Once(set[str]):
        def __contains__(self, name: object) -> bool:
            there = super().__contains__(name)
            self.discard(str(name))
            return there

    bindings.failing = Once({fails})
    assert cuda.Device().compile("src", "draw", []) == "from cuModuleGetFunction"
    targets = [arguments[2][1] for _, name, arguments in bindings.calls if name == "nvrtcCompileProgram"]
    assert targets == [b"--gpu-architecture=sm_99", b"--gpu-architecture=compute_90"]
    names = [name for _, name, _ in bindings.calls]
    assert names.count("nvrtcDestroyProgram") == names.count("nvrtcCreateProgram") == 2


@pytest.mark.skipif(driver.why_unusable() is None, reason="with a GPU these calls would be made")
def test_nvidias_bindings_take_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver each call ends with its code, and with a TypeError where an argument is of the wrong kind."""
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    monkeypatch.setattr(cuda, "_this_thread", SimpleNamespace(device=0))
    device, array = cuda.Device(), np.zeros(64, np.uint8)
    mode = cuda._bindings("runtime").cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    calls: dict[str, Callable[[], Any]] = {
        "cudaSetDevice": device._take_thread,
        "cudaThreadExchangeStreamCaptureMode": lambda: device._call("cudaThreadExchangeStreamCaptureMode", mode),
        "cudaHostRegister": lambda: device.lock_pages(array),
        "cudaHostUnregister": lambda: device.unlock_pages(array),
        "cudaStreamCreateWithFlags": device.open_stream,
        "cudaStreamDestroy": lambda: device.close_stream(7),
        "cudaStreamSynchronize": lambda: device.wait(7),
        "cudaDeviceGetAttribute": lambda: device.capability,
        "cudaMemGetInfo": device.memory_total_bytes,
    }
    for name, call in calls.items():
        with pytest.raises(EngineError, match=rf"^{name} failed: cudaError"):
            call()
    for copy in (device.copy_to_device, device.copy_to_host):
        with pytest.raises(EngineError, match=r"^cudaMemcpyAsync failed: cudaError"):
            copy(4096, array.ctypes.data, 64, 7)
    assert math.isnan(device.memory_in_use_bytes())


@pytest.mark.skipif(COMPILER is None, reason="the stand-in for the driver needs a C compiler")
def test_a_kernel_is_launched_with_its_arguments_as_64_bits_each(tmp_path: Path) -> None:
    """By NVIDIA's own bindings and a driver that prints what it is asked for."""
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    assert COMPILER is not None
    flags = ["-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1"), "tests/stub_launch.c", "-ldl"]
    subprocess.run([COMPILER, *flags], check=True)
    script = """
from types import SimpleNamespace
from serve.engine import cuda

cuda._this_thread = SimpleNamespace(device=0)
device = cuda.Device()
kernel = device.load(b"elf of a kernel", "draw")
device.launch(kernel, 1000, (1, 2, 3, 4, 5, 6, 7, 8, 2**64 - 9), 5)
"""
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.stdout.splitlines() == [
        "load elf",
        "function 77 draw",
        "launch 88 of 8 1 1 by 128 1 1 shared 0 stream 5 extra 0: 1 2 3 4 5 6 7 8 18446744073709551607",
    ], done.stderr


def test_cudas_libraries_are_loaded_from_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside PyTorch, say, when onnxruntime is installed apart from it: its own search looks there only."""
    loaded: list[str] = []
    missing = ""

    class NotFoundError(Exception):
        pass

    def load(name: str) -> None:
        if name == missing:
            raise NotFoundError
        loaded.append(name)

    finder = SimpleNamespace(load_nvidia_dynamic_lib=load, DynamicLibNotFoundError=NotFoundError)
    monkeypatch.setattr(cuda, "_imported", lambda module: {"cuda.pathfinder": finder}[module])
    cuda.load_libraries()
    assert loaded == list(cuda.LIBRARIES)
    assert loaded.index("cublasLt") < loaded.index("cublas")
    missing = "curand"
    with pytest.raises(ProviderError, match="curand"):
        cuda.load_libraries()


def test_cuda_without_its_libraries_is_refused_or_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise ProviderError("CUDA's library cudnn is not found here")

    monkeypatch.setattr(provider.driver, "why_unusable", lambda device: None)
    monkeypatch.setattr(provider.Device, "memory_total_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(provider, "load_libraries", missing)
    with pytest.raises(ProviderError, match=r"--provider cuda: .*cudnn.*--provider cpu"):
        provider.choose_provider("cuda")
    with caplog.at_level("INFO"):
        assert provider.choose_provider("auto") == "cpu"
    assert "provider auto: on the CPU" in caplog.text
    assert "cudnn" in caplog.text
    monkeypatch.setattr(provider, "load_libraries", lambda: None)
    assert provider.choose_provider("auto") == "cuda"


def test_the_device_in_use_is_named_and_so_are_those_that_nobody_uses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Issue: a machine with several GPUs used the first and said nothing."""
    chosen: list[tuple[str, int]] = []
    monkeypatch.setattr(loader, "choose_provider", lambda wanted, device: chosen.append((wanted, device)) or "cuda")
    monkeypatch.setattr(loader, "device_names", lambda: ["NVIDIA One", "NVIDIA Two", "NVIDIA Three"])
    monkeypatch.setattr(loader.Device, "memory_total_bytes", lambda device: 100 + device.number)
    monkeypatch.setattr(loader.Device, "memory_in_use_bytes", lambda device: 10 + device.number)
    registry = CollectorRegistry()
    models = loader.Loader(Repository(BUNDLED_DIR), Settings(device=1), Metrics(registry))
    with caplog.at_level("INFO"):
        asyncio.run(models.choose_provider())
    assert chosen == [("auto", 1)]
    assert registry.get_sample_value("digits_device_info", {"number": "1", "name": "NVIDIA Two"}) == 1
    assert registry.get_sample_value("digits_gpu_memory_total_bytes") == 101
    assert registry.get_sample_value("digits_gpu_memory_used_bytes") == 11
    assert "uses CUDA device 1; start one more for each of: 0 (NVIDIA One), 2 (NVIDIA Three)" in caplog.text
    models.fall_back(ProviderError("planted"))
    assert registry.get_sample_value("digits_device_info", {"number": "", "name": "cpu"}) == 1
