"""Host memory in a CUDA device's place: the CUDA engine's whole logic beside a session on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

from numpy.typing import NDArray

from serve.engine.cuda import Device
from serve.engine.onnx_runtime import ort


class HostDevice(Device):
    """Buffers of their own in host memory; copies as from one address to another. Records what is page-locked."""

    name = "cpu"

    def __init__(self) -> None:
        self.locked: list[int] = []

    def allocate(self, like: NDArray[Any]) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(like)

    def lock_pages(self, array: NDArray[Any]) -> None:
        self.locked.append(array.ctypes.data)

    def unlock_pages(self, array: NDArray[Any]) -> None:
        self.locked.remove(array.ctypes.data)

    def copy_to_device(self, to: int, source: int, size_bytes: int) -> None:
        ctypes.memmove(to, source, size_bytes)

    copy_to_host = copy_to_device
