"""What takes a CUDA device's place in host memory, so that the engine's and the training step's whole logic runs on a CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from serve.engine.cuda import Device
from serve.errors import EngineError

COMPILER = shutil.which("cc") or shutil.which("gcc")


class HostDevice(Device):
    """Buffers of their own in host memory. Records what is page-locked and which streams are open.

    A copy to the host is made when its stream is waited for, and no sooner: what does not wait reads what was there before.
    """

    name = "cpu"

    def __init__(self) -> None:
        self.locked: list[int] = []
        self.streams: dict[int, list[tuple[int, int, int]]] = {}

    def lock_pages(self, array: NDArray[Any]) -> None:
        self.locked.append(array.ctypes.data)

    def unlock_pages(self, array: NDArray[Any]) -> None:
        self.locked.remove(array.ctypes.data)

    def open_stream(self) -> int:
        number = max(self.streams, default=0) + 1
        self.streams[number] = []
        return number

    def close_stream(self, stream: int) -> None:
        del self.streams[stream]

    def copy_to_device(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        assert stream in self.streams
        ctypes.memmove(to, source, size_bytes)

    def copy_to_host(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        self.streams[stream].append((to, source, size_bytes))

    def compile(self, source: str, function: str, definitions: Sequence[str]) -> Any:
        """The same source by a C compiler: what stands for the kernel goes through all threads one by one."""
        if COMPILER is None:
            raise EngineError("no C compiler")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "kernel.so"
            flags = ["-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-x", "c", *definitions]
            subprocess.run([COMPILER, *flags, "-o", str(library), "-"], input=source.encode(), check=True)
            return getattr(ctypes.CDLL(str(library)), function)

    def launch(self, kernel: Any, threads: int, arguments: Sequence[int], stream: int) -> None:
        assert stream in self.streams
        assert threads == arguments[0] * arguments[2], "rows × blocks"
        kernel(*map(ctypes.c_uint64, arguments))

    def wait(self, stream: int) -> None:
        for copy in self.streams[stream]:
            ctypes.memmove(*copy)
        self.streams[stream].clear()


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
