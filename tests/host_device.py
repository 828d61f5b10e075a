"""What takes a CUDA device's place in host memory, so that the engine's and the training step's whole logic runs on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
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

    def mind_own_captures(self) -> None:
        pass

    def lock_pages(self, array: NDArray[Any]) -> None:
        self.locked.append(array.ctypes.data)

    def unlock_pages(self, array: NDArray[Any]) -> None:
        self.locked.remove(array.ctypes.data)

    def copy_to_device(self, to: int, source: int, size_bytes: int) -> None:
        ctypes.memmove(to, source, size_bytes)

    copy_to_host = copy_to_device


class ReplayedByHand:
    """A recording that runs the function again: what a CUDA graph does, without one. Recording executes nothing."""

    def __init__(self, noise: Any) -> None:
        self.noise = noise
        self.calls: list[str] = []

    def warm_up(self, step: Callable[[Any], Any], real: Any) -> Any:
        self.calls.append("warm up")
        return step(real)

    def record(self, step: Callable[[], None]) -> None:
        self.calls.append("record")
        self._recorded = step

    def replay(self) -> None:
        self.calls.append("replay")
        self._recorded()
