"""Fixed memory that a session's inputs and outputs are bound to: page-locked on the host, with a buffer on the device each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.cuda import Device
from serve.engine.onnx_runtime import ort
from serve.manifest import Manifest

# A run with this id is neither captured nor replayed (ONNX Runtime's CUDA provider, "Using CUDA Graphs").
NO_GRAPH = -1


class DeviceBuffers:
    """Memory for up to ``largest`` rows of every input and output. Raises EngineError when the device has none left."""

    def __init__(self, manifest: Manifest, largest: int, device: Device) -> None:
        self.device = device
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
        """Copy the first rows of every input to the device."""
        for name in self.inputs:
            array = self.host[name]
            self.device.copy_to_device(self.address(name), array.ctypes.data, rows * array.strides[0])

    def download(self, name: str, rows: int) -> NDArray[Any]:
        """The first rows of an output, as a new array."""
        array = self.host[name]
        self.device.copy_to_host(array.ctypes.data, self.address(name), rows * array.strides[0])
        return array[:rows].copy()


class Binding:
    """A session bound to the first ``size`` rows of its buffers, for some of its outputs."""

    def __init__(self, session: ort.InferenceSession, buffers: DeviceBuffers, size: int, outputs: tuple[str, ...]) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._options: dict[int, ort.RunOptions] = {}  # by graph id
        place = buffers.device.name
        for names, bind in ((buffers.inputs, self._binding.bind_input), (outputs, self._binding.bind_output)):
            for name in names:
                rows = buffers.host[name][:size]
                bind(name, place, 0, rows.dtype.type, list(rows.shape), buffers.address(name))

    def run(self, graph_id: int = NO_GRAPH) -> None:
        """Run the bound rows; returns when the outputs are there. With a ``graph_id`` the first run is captured."""
        options = self._options.get(graph_id)
        if options is None:
            options = self._options[graph_id] = ort.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(graph_id))
        self._session.run_with_iobinding(self._binding, options)
