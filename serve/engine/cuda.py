"""The parts of CUDA that ONNX Runtime's Python interface lacks: streams, page-locked memory, copies, kernels, memory in use.

Uses NVIDIA's own bindings, which come with the ``cuda`` extra and are imported only if there is a GPU. Knows no session.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.onnx_runtime import ort
from serve.errors import EngineError, ProviderError

THREADS_PER_BLOCK = 128
# What ONNX Runtime's CUDA provider is linked with, and cuDNN with its compiler, which it opens for convolutions.
LIBRARIES = ("cudart", "cublasLt", "cublas", "curand", "nvrtc", "cudnn")

_this_thread = threading.local()


class Device:
    """CUDA device 0, as far as the engine needs it. Every method raises EngineError with the runtime's own code."""

    name = "cuda"

    def allocate(self, like: NDArray[Any]) -> Any:
        """Memory on the device for as much as an array holds, as an OrtValue."""
        return ort.OrtValue.ortvalue_from_shape_and_type(list(like.shape), like.dtype.type, self.name, 0)

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


def load_libraries() -> None:
    """Load CUDA and cuDNN from wherever this machine has them, for ONNX Runtime to find. Raises ProviderError for a missing one.

    ``onnxruntime.preload_dlls`` looks beside its own package alone, and not in a PyTorch's or a CUDA toolkit's folder.
    """
    pathfinder = _imported("cuda.pathfinder")
    for name in LIBRARIES:
        try:
            pathfinder.load_nvidia_dynamic_lib(name)
        except pathfinder.DynamicLibNotFoundError:
            raise ProviderError(f"CUDA's library {name} is not found here") from None


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
    if of != "nvrtc" and not hasattr(_this_thread, "minds_own_captures"):
        _mind_own_captures()
    return _checked(function, *arguments, of=of)


def _mind_own_captures() -> None:
    """Let this thread do what a capture in another one would forbid (stream capture modes, CUDA runtime API).

    ONNX Runtime captures in the global mode, in which an allocation, a synchronous copy or a release on any other thread breaks
    the capture or fails itself, unless that thread minds its own captures alone: seen on a GPU (docs/decisions/0012-cuda.md).
    """
    mode = _bindings("runtime").cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    _checked("cudaThreadExchangeStreamCaptureMode", mode, of="runtime")
    _this_thread.minds_own_captures = True


def _checked(function: str, *arguments: Any, of: str) -> Any:
    code, *values = getattr(_bindings(of), function)(*arguments)
    if int(code):  # 0 is success in all three
        raise EngineError(f"{function} failed: {code.name}")
    return values


def _bindings(name: str) -> Any:
    return _imported(f"cuda.bindings.{name}")


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)  # absent where there is no GPU
    except ImportError:
        raise ProviderError("CUDA needs the package cuda-bindings: install the cuda extra, or use --provider cpu") from None
