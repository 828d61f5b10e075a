"""Fixed memory that a session's inputs and outputs are bound to: one path for both providers.

On the CPU the session reads and writes the host arrays themselves. On CUDA each has a twin on the device; the host's are
page-locked, and only the rows that are used cross the bus.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve import cuda
from serve.manifest import Manifest
from serve.onnx_runtime import ort

# A run with this id is neither captured nor replayed (ONNX Runtime's CUDA provider, "Using CUDA Graphs").
NO_GRAPH = -1


class Buffers:
    """Memory for up to ``largest`` rows. Raises EngineError when the device has none left."""

    def __init__(self, manifest: Manifest, largest: int, on_cuda: bool) -> None:
        height, width = manifest.height, manifest.width
        self.latents: NDArray[np.float32] = np.zeros((largest, manifest.latent_size), np.float32)
        self.labels: NDArray[np.int64] = np.zeros(largest, np.int64)
        self.inputs = ("latents", "labels") if manifest.labels else ("latents",)
        self.pixels: NDArray[np.uint8] = np.zeros((largest, height, width), np.uint8)
        self.images: NDArray[np.float32] = np.zeros((largest, 1, height, width), np.float32)
        self.device = "cuda" if on_cuda else "cpu"
        self._twins: dict[str, Any] = {}
        self._locked: list[NDArray[Any]] = []
        if on_cuda:
            for name in (*self.inputs, "pixels", "images"):
                array = self.host(name)
                self._twins[name] = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype.type, "cuda", 0)
                cuda.lock_pages(array)
                self._locked.append(array)

    def __del__(self) -> None:
        for array in self._locked:
            cuda.unlock_pages(array)

    def host(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = getattr(self, name)
        return array

    def address(self, name: str) -> int:
        """Where the session finds or puts the rows."""
        twin = self._twins.get(name)
        return int(self.host(name).ctypes.data if twin is None else twin.data_ptr())

    def upload(self, rows: int) -> None:
        """Bring the first rows of the inputs to the device."""
        if self._twins:
            for name in self.inputs:
                array = self.host(name)
                cuda.copy(self.address(name), array.ctypes.data, rows * array.strides[0], cuda.HOST_TO_DEVICE)

    def download(self, name: str, rows: int) -> NDArray[Any]:
        """The first rows of an output, in an array of their own."""
        array = self.host(name)
        if self._twins:
            cuda.copy(array.ctypes.data, self.address(name), rows * array.strides[0], cuda.DEVICE_TO_HOST)
        return array[:rows].copy()


class Binding:
    """A session bound to the first ``size`` rows of its buffers, for some of its outputs."""

    def __init__(self, session: ort.InferenceSession, buffers: Buffers, size: int, outputs: tuple[str, ...]) -> None:
        self._session = session
        self._binding = session.io_binding()
        for name in buffers.inputs:
            rows = buffers.host(name)[:size]
            self._binding.bind_input(name, buffers.device, 0, rows.dtype.type, list(rows.shape), buffers.address(name))
        for name in outputs:
            rows = buffers.host(name)[:size]
            self._binding.bind_output(name, buffers.device, 0, rows.dtype.type, list(rows.shape), buffers.address(name))

    def run(self, graph_id: int = NO_GRAPH) -> None:
        """Run the bound rows; returns when the outputs are there. With a ``graph_id`` the first run is captured."""
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        self._session.run_with_iobinding(self._binding, options)
