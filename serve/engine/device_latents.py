"""Latents drawn where the model runs: the kernel of ``latents.cu``, put into the engine's stream before the run.

What goes to the device for a row are its seed, its index and its truncation, 20 bytes, in place of all its latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.cuda import Device
from serve.latents import FIRST_KNOT, FRACTION_BITS, Span, blocks_per_row, knots_and_slopes, tail_beyond

SOURCE = Path(__file__).with_name("latents.cu")
FUNCTION = "draw"
OF_THE_STREAM = -1  # in place of a label: the one that the row itself has


class DeviceLatents:
    """Draws up to ``largest`` rows of ``latent_size`` values, and of one label among ``labels``, or none of 0, in ``stream``.

    Raises EngineError when the kernel cannot be compiled or there is no memory left.
    """

    def __init__(self, device: Device, largest: int, latent_size: int, labels: int, stream: int) -> None:
        self._locked: list[NDArray[Any]] = []
        self._on_device: dict[str, Any] = {}
        self._device, self._stream = device, stream
        self._kernel = device.compile(SOURCE.read_text(), FUNCTION, definitions())
        self._latent_size, self._labels = latent_size, labels
        self._blocks = blocks_per_row(latent_size + (labels > 0))
        self._rows: dict[str, NDArray[Any]] = {
            "seeds": np.zeros(largest, np.uint64),
            "indices": np.zeros(largest, np.uint64),
            "tails": np.zeros(largest, np.float32),
        }
        tables = dict(zip(("knots", "slopes"), map(np.copy, knots_and_slopes()), strict=True))
        for name, array in (self._rows | tables).items():  # in the order that the kernel takes them in
            self._on_device[name] = device.allocate(array)
            device.lock_pages(array)
            self._locked.append(array)
        for name, array in tables.items():
            self._upload(name, array)

    def fill(self, spans: Sequence[Span], labels: NDArray[np.int64] | None) -> None:
        """Note which rows are wanted, one span's after another's, and in ``labels`` (rows,) those that callers named."""
        row = 0
        for span in spans:
            rows = slice(row, row + span.count)
            self._rows["seeds"][rows] = span.seed
            self._rows["indices"][rows] = np.uint64(span.start) + np.arange(span.count, dtype=np.uint64)
            self._rows["tails"][rows] = tail_beyond(span.truncation) if span.truncation else 0.0
            if labels is not None:
                labels[rows] = OF_THE_STREAM if span.labels is None else span.labels
            row += span.count

    def launch(self, rows: int, latents: int, labels: int) -> None:
        """Put the drawing of the first ``rows`` rows into the stream; ``latents`` and ``labels`` are device addresses, or 0."""
        for name, array in self._rows.items():
            self._upload(name, array[:rows])
        sizes = (rows, self._latent_size, self._blocks, self._labels)
        addresses = (*map(self._address, self._on_device), latents, labels)
        self._device.launch(self._kernel, rows * self._blocks, (*sizes, *addresses), self._stream)

    def release(self) -> None:
        """Give the memory back. Once it is done, nothing is left to do."""
        while self._locked:
            self._device.unlock_pages(self._locked.pop())
        self._on_device.clear()

    def __del__(self) -> None:
        self.release()

    def _upload(self, name: str, array: NDArray[Any]) -> None:
        self._device.copy_to_device(self._address(name), array.ctypes.data, array.nbytes, self._stream)

    def _address(self, name: str) -> int:
        return int(self._on_device[name].data_ptr())


def definitions() -> list[str]:
    """What the source takes from ``serve.latents``, as a compiler's flags."""
    values = {"FRACTION_BITS": FRACTION_BITS, "FIRST_KNOT": FIRST_KNOT, "KNOTS": len(knots_and_slopes()[0])}
    return [f"-D{name}={value}" for name, value in values.items()]
