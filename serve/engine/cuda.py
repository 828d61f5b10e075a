"""What of CUDA ONNX Runtime's Python interface lacks: streams, page-locked memory, copies into it, kernels, memory in use.

By NVIDIA's own bindings, which come with the ``cuda`` extra and are imported only where there is a GPU to use. Knows no
session. Also the rule that nothing runs while a CUDA graph is captured.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.onnx_runtime import ort
from serve.errors import EngineError, ProviderError

THREADS_PER_BLOCK = 128
CAPTURE_WAIT_S = 10.0  # for the runs under way, before a capture; one of them may hang


class Device:
    """CUDA device 0, as far as the engine needs it. Every method raises EngineError with the runtime's own code."""

    name = "cuda"

    def allocate(self, like: NDArray[Any]) -> Any:
        """Memory on the device for as much as an array holds, as an OrtValue."""
        return ort.OrtValue.ortvalue_from_shape_and_type(list(like.shape), like.dtype.type, self.name, 0)

    def mind_own_captures(self) -> None:
        """Let this thread do what a capture in another one would forbid (stream capture modes, CUDA runtime API).

        ONNX Runtime captures in the global mode, in which an allocation on any thread breaks the capture. Whether this makes
        the gate below needless, a run on a GPU has to show (``make gpu-check``, captures).
        """
        _call("cudaThreadExchangeStreamCaptureMode", _bindings("runtime").cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)

    def lock_pages(self, array: NDArray[Any]) -> None:
        """Page-lock an array's memory, so that the GPU copies it at the bus's own speed."""
        _call("cudaHostRegister", array.ctypes.data, array.nbytes, 0)

    def unlock_pages(self, array: NDArray[Any]) -> None:
        """Undo ``lock_pages``, before the memory is freed."""
        _call("cudaHostUnregister", array.ctypes.data)

    def open_stream(self) -> int:
        """A stream, as the number that ONNX Runtime takes for it: what is put into it runs in order, and waits for no other."""
        runtime = _bindings("runtime")
        return int(_call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)[0])

    def close_stream(self, stream: int) -> None:
        """Give a stream back; what is still in it is done first."""
        _call("cudaStreamDestroy", stream)

    def copy_to_device(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        """Put a copy from a page-locked host address to a device address into a stream."""
        _call("cudaMemcpyAsync", to, source, size_bytes, _bindings("runtime").cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def copy_to_host(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        """Put a copy from a device address to a page-locked host address into a stream: it is done when ``wait`` returns."""
        _call("cudaMemcpyAsync", to, source, size_bytes, _bindings("runtime").cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def wait(self, stream: int) -> None:
        """Return when all that was put into a stream is done."""
        _call("cudaStreamSynchronize", stream)

    def compile(self, source: str, function: str, definitions: Sequence[str]) -> Any:
        """A kernel for this device from CUDA C, by NVRTC; no addition is fused with a multiplication."""
        attributes = _bindings("runtime").cudaDeviceAttr
        major, minor = (
            _call("cudaDeviceGetAttribute", getattr(attributes, f"cudaDevAttrComputeCapability{which}"), 0)[0]
            for which in ("Major", "Minor")
        )
        ptx = np.frombuffer(to_ptx(source, f"compute_{major}{minor}", definitions), np.uint8)  # ends with a zero
        module = _call("cuModuleLoadData", ptx.ctypes.data, of="driver")[0]
        return _call("cuModuleGetFunction", module, function.encode(), of="driver")[0]

    def launch(self, kernel: Any, threads: int, arguments: Sequence[int], stream: int) -> None:
        """Put a kernel into a stream, with at least so many threads; ``arguments`` are 64-bit numbers and device addresses."""
        values = np.array(arguments, np.uint64)
        places = values.ctypes.data + np.arange(len(values), dtype=np.uint64) * values.itemsize
        grid = (-(-threads // THREADS_PER_BLOCK), 1, 1)
        _call("cuLaunchKernel", kernel, *grid, THREADS_PER_BLOCK, 1, 1, 0, stream, places.ctypes.data, 0, of="driver")


def memory_in_use_bytes() -> float:
    """Of the current device, by all processes. NaN when the device does not say: it is asked when metrics are read."""
    try:
        free, total = _call("cudaMemGetInfo")
    except EngineError:
        return float("nan")
    return float(total - free)


def memory_total_bytes() -> int:
    """Of the current device. Raises EngineError, or ProviderError without NVIDIA's bindings."""
    return int(_call("cudaMemGetInfo")[1])


def to_ptx(source: str, architecture: str, definitions: Sequence[str]) -> bytes:
    """CUDA C compiled for an architecture such as ``compute_90``; no device is needed. Raises EngineError."""
    [program] = _call("nvrtcCreateProgram", source.encode(), b"kernel.cu", 0, [], [], of="nvrtc")
    flags = [flag.encode() for flag in ("--fmad=false", f"--gpu-architecture={architecture}", *definitions)]
    _call("nvrtcCompileProgram", program, len(flags), flags, of="nvrtc")
    ptx: bytes = b" " * _call("nvrtcGetPTXSize", program, of="nvrtc")[0]
    _call("nvrtcGetPTX", program, ptx, of="nvrtc")
    _call("nvrtcDestroyProgram", program, of="nvrtc")
    return ptx


def _call(function: str, *arguments: Any, of: str = "runtime") -> Any:
    code, *values = getattr(_bindings(of), function)(*arguments)
    if int(code):  # 0 is success in all three
        raise EngineError(f"{function} failed: {code.name}")
    return values


def _bindings(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")  # absent where there is no GPU
    except ImportError:
        raise ProviderError("CUDA needs the package cuda-bindings: install the cuda extra, or use --provider cpu") from None


class CaptureGate:
    """Runs go through together; a capture goes through alone, or not at all if one of them hangs.

    While a graph is captured, an allocation or a synchronous copy on any other thread breaks the capture or itself fails
    (CUDA programming guide, stream capture in the global mode, which ONNX Runtime uses).
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._capturing = False

    @contextmanager
    def run(self) -> Iterator[None]:
        """For a run: waits while there is a capture."""
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def capture(self, wait_s: float = CAPTURE_WAIT_S) -> Iterator[None]:
        """For a capture: keeps new runs out, and waits for those under way. Raises EngineError when they do not end in time."""
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing)
            self._capturing = True
            if not self._changed.wait_for(lambda: not self._running, wait_s):
                self._capturing = False
                self._changed.notify_all()
                raise EngineError(f"a run elsewhere has not ended within {wait_s:g} s: nothing can be captured")
        try:
            yield
        finally:
            with self._changed:
                self._capturing = False
                self._changed.notify_all()


CAPTURE_GATE = CaptureGate()  # one per process, as there is one CUDA context per process and device
