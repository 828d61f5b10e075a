"""Fixed memory that a session's inputs and outputs are bound to: page-locked on the host, with a buffer on the device each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.cuda import Device
from serve.engine.onnx_runtime import ort
from serve.manifest import Manifest

# A run with this id is neither captured nor replayed (ONNX Runtime's CUDA provider, "Using CUDA Graphs").
NO_GRAPH = -1


class DeviceBuffers:
    """Memory for up to ``largest`` rows of every input and output. Raises EngineError when the device has none left.

    Copies go through ``stream``, where the session's runs go as well: they keep their order without anybody waiting between them.
    """

    def __init__(self, manifest: Manifest, largest: int, device: Device, stream: int) -> None:
        self.device = device
        self.stream = stream
        self.inputs = tuple(spec.name for spec in manifest.inputs)
        self.host: dict[str, NDArray[Any]] = {}
        self._on_device: dict[str, Any] = {}
        self._locked: list[NDArray[Any]] = []
        for spec in (*manifest.inputs, *manifest.outputs):
            array = np.zeros((largest, *spec.shape), spec.dtype)
            self._on_device[spec.name] = device.allocate(array)
            device.lock_pages(array)
            self._locked.append(array)
            self.host[spec.name] = array

    def release(self) -> None:
        """Give the memory back. Once it is done, nothing is left to do."""
        while self._locked:
            self.device.unlock_pages(self._locked.pop())
        self._on_device.clear()

    def __del__(self) -> None:
        self.release()

    def address(self, name: str) -> int:
        """Where on the device the rows of an input or output are."""
        return int(self._on_device[name].data_ptr())

    def upload(self, rows: int) -> None:
        """Copy the first rows of every input to the device, before what is put into the stream after it."""
        for name in self.inputs:
            array = self.host[name]
            self.device.copy_to_device(self.address(name), array.ctypes.data, rows * array.strides[0], self.stream)

    def download(self, names: Sequence[str], rows: int) -> dict[str, NDArray[Any]]:
        """The first rows of outputs, as new arrays, once all that is in the stream is done."""
        for name in names:
            array = self.host[name]
            self.device.copy_to_host(array.ctypes.data, self.address(name), rows * array.strides[0], self.stream)
        self.device.wait(self.stream)
        return {name: self.host[name][:rows].copy() for name in names}


class Binding:
    """A session bound to the first ``size`` rows of its buffers, for some of its outputs."""

    def __init__(self, session: ort.InferenceSession, buffers: DeviceBuffers, size: int, outputs: tuple[str, ...]) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._options: dict[tuple[int, bool], ort.RunOptions] = {}
        place = buffers.device.name
        for names, bind in ((buffers.inputs, self._binding.bind_input), (outputs, self._binding.bind_output)):
            for name in names:
                rows = buffers.host[name][:size]
                bind(name, place, 0, rows.dtype.type, list(rows.shape), buffers.address(name))

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
