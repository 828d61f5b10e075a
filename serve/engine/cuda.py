"""The parts of CUDA that ONNX Runtime's Python interface lacks: streams, page-locked memory, copies, kernels, memory in use.

Uses NVIDIA's own bindings, which come with the ``cuda`` extra and are imported only if there is a GPU. Knows no session.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.onnx_runtime import ort
from serve.errors import EngineError, OutOfMemoryError, ProviderError

THREADS_PER_BLOCK = 128
# What ONNX Runtime's CUDA provider is linked with, and cuDNN with its compiler, which it opens for convolutions.
LIBRARIES = ("cudart", "cublasLt", "cublas", "curand", "nvrtc", "cudnn")

OUT_OF_MEMORY = 2  # in the runtime and in the driver; no error that stays

_this_thread = threading.local()
_compiling = threading.Lock()


class Device:
    """A CUDA device by its number among those that the process sees, as far as the engine needs it.

    Every method raises EngineError with the runtime's own code, and OutOfMemoryError where memory is all that is missing.
    """

    name = "cuda"
    number = 0

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def allocate(self, like: NDArray[Any]) -> Any:
        """Memory on the device for as much as an array holds, as an OrtValue."""
        return ort.OrtValue.ortvalue_from_shape_and_type(list(like.shape), like.dtype.type, self.name, self.number)

    def lock_pages(self, array: NDArray[Any]) -> None:
        """Page-lock an array's memory, so that the GPU copies it at the bus's own speed."""
        self._call("cudaHostRegister", array.ctypes.data, array.nbytes, 0)

    def unlock_pages(self, array: NDArray[Any]) -> None:
        """Undo ``lock_pages``, before the memory is freed."""
        self._call("cudaHostUnregister", array.ctypes.data)

    def open_stream(self) -> int:
        """A stream, as the number that ONNX Runtime takes for it: what is put into it runs in order, and waits for no other."""
        runtime = _bindings("runtime")
        return int(self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)[0])

    def close_stream(self, stream: int) -> None:
        """Give a stream back; what is still in it is done first."""
        self._call("cudaStreamDestroy", stream)

    def copy_to_device(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        """Put a copy from a page-locked host address to a device address into a stream."""
        self._call("cudaMemcpyAsync", to, source, size_bytes, _bindings("runtime").cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def copy_to_host(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        """Put a copy from a device address to a page-locked host address into a stream: it is done when ``wait`` returns."""
        self._call("cudaMemcpyAsync", to, source, size_bytes, _bindings("runtime").cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def wait(self, stream: int) -> None:
        """Return when all that was put into a stream is done."""
        self._call("cudaStreamSynchronize", stream)

    def compile(self, source: str, function: str, definitions: Sequence[str]) -> Any:
        """A kernel for this device from CUDA C, by NVRTC, once a process; no addition is fused with a multiplication."""
        with _compiling:
            return _kernel(self.number, source, function, tuple(definitions))

    def load(self, image: bytes, function: str) -> Any:
        """A kernel out of machine code or PTX, which the driver compiles if it is not older than the compiler that wrote it."""
        content = np.frombuffer(image, np.uint8)
        module = self._call("cuModuleLoadData", content.ctypes.data, of="driver")[0]
        return self._call("cuModuleGetFunction", module, function.encode(), of="driver")[0]

    @property
    def capability(self) -> int:
        """The compute capability: 90 for 9.0."""
        attributes = _bindings("runtime").cudaDeviceAttr
        major, minor = (
            self._call("cudaDeviceGetAttribute", getattr(attributes, f"cudaDevAttrComputeCapability{which}"), self.number)[0]
            for which in ("Major", "Minor")
        )
        return int(10 * major + minor)

    def memory_in_use_bytes(self) -> float:
        """By all processes. NaN when the device does not say: it is asked when metrics are read."""
        try:
            free, total = self._call("cudaMemGetInfo")
        except EngineError:
            return float("nan")
        return float(total - free)

    def memory_total_bytes(self) -> int:
        """Raises EngineError, or ProviderError without NVIDIA's bindings."""
        return int(self._call("cudaMemGetInfo")[1])

    def launch(self, kernel: Any, threads: int, arguments: Sequence[int], stream: int) -> None:
        """Put a kernel into a stream, with at least so many threads; ``arguments`` are 64-bit numbers and device addresses."""
        values = np.array(arguments, np.uint64)
        places = values.ctypes.data + np.arange(len(values), dtype=np.uint64) * values.itemsize
        grid = (-(-threads // THREADS_PER_BLOCK), 1, 1)
        self._call("cuLaunchKernel", kernel, *grid, THREADS_PER_BLOCK, 1, 1, 0, stream, places.ctypes.data, 0, of="driver")

    def _call(self, function: str, *arguments: Any, of: str = "runtime") -> Any:
        if getattr(_this_thread, "device", None) != self.number:
            self._take_thread()
        return _checked(function, *arguments, of=of)

    def _take_thread(self) -> None:
        """Make this device the thread's, and let the thread do what a capture in another one would forbid (CUDA runtime API).

        ONNX Runtime captures in the global mode, in which an allocation, a synchronous copy or a release on any other thread
        breaks the capture or fails itself, unless that thread minds its own captures alone: seen on a GPU
        (docs/decisions/0012-cuda.md).
        """
        _checked("cudaSetDevice", self.number, of="runtime")
        mode = _bindings("runtime").cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked("cudaThreadExchangeStreamCaptureMode", mode, of="runtime")
        _this_thread.device = self.number


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


@cache
def _kernel(number: int, source: str, function: str, definitions: tuple[str, ...]) -> Any:
    """Machine code for the device itself, and PTX where NVRTC does not know the device or the driver does not take the code.

    NVRTC 13.2 writes PTX 9.2, which the driver of CUDA 13.0 refuses; machine code of any CUDA 13 runs on it.
    """
    device = Device(number)
    capability = device.capability
    [architectures] = _checked("nvrtcGetSupportedArchs", of="nvrtc")
    try:
        return device.load(compiled(source, f"sm_{capability}", definitions), function)
    except EngineError:
        nearest = max((known for known in architectures if known <= capability), default=capability)
        return device.load(compiled(source, f"compute_{nearest}", definitions), function)


def compiled(source: str, architecture: str, definitions: Sequence[str]) -> bytes:
    """CUDA C as machine code for ``sm_90``, say, or PTX for ``compute_90``; no device is needed. Raises EngineError."""
    kind = "CUBIN" if architecture.startswith("sm_") else "PTX"
    [program] = _checked("nvrtcCreateProgram", source.encode(), b"kernel.cu", 0, [], [], of="nvrtc")
    try:
        flags = [flag.encode() for flag in ("--fmad=false", f"--gpu-architecture={architecture}", *definitions)]
        _checked("nvrtcCompileProgram", program, len(flags), flags, of="nvrtc")
        image: bytes = b" " * _checked(f"nvrtcGet{kind}Size", program, of="nvrtc")[0]
        _checked(f"nvrtcGet{kind}", program, image, of="nvrtc")
    finally:
        _checked("nvrtcDestroyProgram", program, of="nvrtc")
    return image


def _checked(function: str, *arguments: Any, of: str) -> Any:
    code, *values = getattr(_bindings(of), function)(*arguments)
    if int(code):  # 0 is success in all three
        kind = OutOfMemoryError if int(code) == OUT_OF_MEMORY and of != "nvrtc" else EngineError
        raise kind(f"{function} failed: {code.name}")
    return values


def _bindings(name: str) -> Any:
    return _imported(f"cuda.bindings.{name}")


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)  # absent where there is no GPU
    except ImportError:
        raise ProviderError("CUDA needs the package cuda-bindings: install the cuda extra, or use --provider cpu") from None
