"""Fixed memory for a session's inputs and outputs: page-locked buffers on the host, each with a buffer on the device."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.cuda import Device
from serve.engine.onnx_runtime import ort
from serve.errors import EngineError, OutOfMemoryError
from serve.manifest import Manifest

# A run with this id is neither captured nor replayed (ONNX Runtime's CUDA provider, "Using CUDA Graphs").
NO_GRAPH = -1

# Answers from so many bytes on are lent to whoever reads them, in page-locked memory; smaller ones are copied out of it at once.
LENT_BYTES = 1 << 18
SLOTS = 4  # of each output; while all are lent, answers are copied


class OutputSlots:
    """Page-locked memory for one output, in slots that are lent as arrays and come back when nobody holds those any more."""

    def __init__(self, shape: tuple[int, ...], dtype: str, lock: Callable[[NDArray[Any]], None]) -> None:
        self._shape, self._dtype, self._lock = shape, dtype, lock
        self._made, self._most = 0, SLOTS
        self._free: deque[NDArray[Any]] = deque()  # its methods are atomic: an array may die in any thread
        self._free.append(self._new())

    def take(self) -> NDArray[Any]:
        """A slot to copy an answer into. One at least is free: the last one is never lent.

        Where there is no more memory to page-lock it stays at the slots that there are, and answers are copied.
        """
        if len(self._free) < 2 and self._made < self._most:
            try:
                return self._new()
            except (OutOfMemoryError, MemoryError):
                self._most = self._made
        return self._free.popleft()

    def answer(self, slot: NDArray[Any], rows: int) -> NDArray[Any]:
        """The first rows of a taken slot, as an array that is never written again: the slot's own memory, or a copy."""
        if self._free and rows * slot.strides[0] >= LENT_BYTES:
            lent: NDArray[Any] = np.asarray(_Loan(slot, self._free))
            return lent[:rows]
        copied = slot[:rows].copy()
        self._free.append(slot)
        return copied

    def _new(self) -> NDArray[Any]:
        slot = np.zeros(self._shape, self._dtype)
        self._lock(slot)
        self._made += 1
        return slot


class _Loan:
    """What numpy's arrays of a slot's memory keep alive; the slot is free again when the last of them is gone."""

    def __init__(self, slot: NDArray[Any], free: deque[NDArray[Any]]) -> None:
        self.__array_interface__ = slot.__array_interface__
        self._slot, self._free = slot, free

    def __del__(self) -> None:
        self._free.append(self._slot)


class PairedMemory:
    """Page-locked arrays in ``host``, each with as much on the device. Raises EngineError when the device has none left.

    Copies go through ``stream``, where the session's runs go as well: they keep their order without anybody waiting between them.
    """

    def __init__(self, device: Device, stream: int) -> None:
        self.device = device
        self.stream = stream
        self.host: dict[str, NDArray[Any]] = {}
        self._on_device: dict[str, Any] = {}
        self._locked: list[NDArray[Any]] = []
        # Not a method: memory must go when its engine does, without a cycle.
        self._lock = partial(_lock_pages, device, self._locked)

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Page-lock an array and take memory on the device for it."""
        self._on_device[name] = self.device.allocate(array)
        self._lock(array)
        self.host[name] = array

    def release(self) -> None:
        """Give the memory back. Once it is done, nothing is left to do; a lost device takes nothing back."""
        while self._locked:
            with suppress(EngineError):
                self.device.unlock_pages(self._locked.pop())
        self._on_device.clear()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # then the process's memory goes as a whole, and modules are gone that this takes
            self.release()

    def address(self, name: str) -> int:
        """Where on the device the rows of that name are."""
        return int(self._on_device[name].data_ptr())

    def upload(self, names: Iterable[str], rows: int) -> None:
        """Copy the first rows of arrays to the device, before what is put into the stream after it."""
        for name in names:
            array = self.host[name]
            self.device.copy_to_device(self.address(name), array.ctypes.data, rows * array.strides[0], self.stream)

    def fetch(self, name: str, rows: int) -> None:
        """Copy the first rows of an array back from the device: they are in ``host`` once the stream has been waited for."""
        array = self.host[name]
        self.device.copy_to_host(array.ctypes.data, self.address(name), rows * array.strides[0], self.stream)


class DeviceBuffers(PairedMemory):
    """Memory for up to ``largest`` rows of every input and output; the inputs' host sides are in ``host``."""

    def __init__(self, manifest: Manifest, largest: int, device: Device, stream: int) -> None:
        super().__init__(device, stream)
        self.inputs = tuple(spec.name for spec in manifest.inputs)
        self.specs = {spec.name: spec for spec in (*manifest.inputs, *manifest.outputs)}
        self._slots: dict[str, OutputSlots] = {}
        for spec in self.specs.values():
            array = np.zeros((largest, *spec.shape), spec.dtype)
            if spec.name in self.inputs:
                self.add(spec.name, array)
            else:
                self._on_device[spec.name] = device.allocate(array)
                self._slots[spec.name] = OutputSlots(array.shape, spec.dtype, self._lock)

    def download(self, names: Sequence[str], rows: int) -> dict[str, NDArray[Any]]:
        """Put copies of the first rows of outputs into the stream, each into a slot of its own, which ``answers`` takes."""
        taken = {name: self._slots[name].take() for name in names}
        for name, slot in taken.items():
            self.device.copy_to_host(slot.ctypes.data, self.address(name), rows * slot.strides[0], self.stream)
        return taken

    def answers(self, taken: Mapping[str, NDArray[Any]], rows: int) -> dict[str, NDArray[Any]]:
        """What was downloaded, once all that is in the stream is done, as arrays that are never written again."""
        self.device.wait(self.stream)
        return {name: self._slots[name].answer(slot, rows) for name, slot in taken.items()}


def _lock_pages(device: Device, locked: list[NDArray[Any]], array: NDArray[Any]) -> None:
    device.lock_pages(array)
    locked.append(array)


class Binding:
    """A session bound to the first ``size`` rows of its buffers, for some of its outputs."""

    def __init__(self, session: ort.InferenceSession, buffers: DeviceBuffers, size: int, outputs: tuple[str, ...]) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._options: dict[tuple[int, bool], ort.RunOptions] = {}
        place = buffers.device.name
        for names, bind in ((buffers.inputs, self._binding.bind_input), (outputs, self._binding.bind_output)):
            for name in names:
                spec = buffers.specs[name]
                bind(name, place, buffers.device.number, np.dtype(spec.dtype).type, [size, *spec.shape], buffers.address(name))

    def run(self, graph_id: int = NO_GRAPH, *, wait: bool = True) -> None:
        """Run the bound rows. With a ``graph_id`` the first run is captured. Returns when the outputs are there, or, without
        ``wait``, when the run is in the session's stream."""
        options = self._options.get((graph_id, wait))
        if options is None:
            options = self._options[graph_id, wait] = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
            if not wait:
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._session.run_with_iobinding(self._binding, options)
