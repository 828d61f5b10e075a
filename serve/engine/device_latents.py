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
    """Draws up to ``largest`` rows of ``latent_size`` values and a label, of ``labels`` to choose from; 0: none.

    Raises EngineError when the kernel cannot be compiled or there is no memory left.
    """

    def __init__(self, device: Device, largest: int, latent_size: int, labels: int) -> None:
        knots, slopes = knots_and_slopes()
        self._locked: list[NDArray[Any]] = []
        self._on_device: dict[str, Any] = {}
        self._device = device
        self._kernel = device.compile(SOURCE.read_text(), FUNCTION, definitions())
        self._latent_size, self._labels = latent_size, labels
        self._blocks = blocks_per_row(latent_size + (labels > 0))
        self._host: dict[str, NDArray[Any]] = {
            "seeds": np.zeros(largest, np.uint64),
            "indices": np.zeros(largest, np.uint64),
            "tails": np.zeros(largest, np.float32),
            "knots": knots.copy(),
            "slopes": slopes.copy(),
        }
        self._on_device = {name: device.allocate(array) for name, array in self._host.items()}
        for array in self._host.values():
            device.lock_pages(array)
            self._locked.append(array)
        self._uploaded = False

    def fill(self, spans: Sequence[Span], labels: NDArray[np.int64] | None) -> None:
        """Note which rows are wanted, one span's after another's, and in ``labels`` (rows,) those that callers named."""
        row = 0
        for span in spans:
            rows = slice(row, row + span.count)
            self._host["seeds"][rows] = span.seed
            self._host["indices"][rows] = np.uint64(span.start) + np.arange(span.count, dtype=np.uint64)
            self._host["tails"][rows] = tail_beyond(span.truncation) if span.truncation else 0.0
            if labels is not None:
                labels[rows] = OF_THE_STREAM if span.labels is None else span.labels
            row += span.count

    def launch(self, rows: int, latents: int, labels: int, stream: int) -> None:
        """Put the drawing of the first ``rows`` rows into a stream; ``latents`` and ``labels`` are device addresses, or 0."""
        for name, array in self._host.items():
            if not (self._uploaded and name in ("knots", "slopes")):
                part = array if name in ("knots", "slopes") else array[:rows]
                self._device.copy_to_device(self._address(name), array.ctypes.data, part.nbytes, stream)
        self._uploaded = True
        sizes = (rows, self._latent_size, self._blocks, self._labels)
        addresses = (*(self._address(name) for name in self._host), latents, labels)
        self._device.launch(self._kernel, rows * self._blocks, (*sizes, *addresses), stream)

    def release(self) -> None:
        """Give the memory back. Once it is done, nothing is left to do."""
        while self._locked:
            self._device.unlock_pages(self._locked.pop())
        self._on_device.clear()

    def __del__(self) -> None:
        self.release()

    def _address(self, name: str) -> int:
        return int(self._on_device[name].data_ptr())


def definitions() -> list[str]:
    """What the source takes from ``serve.latents``, as a compiler's flags."""
    values = {"FRACTION_BITS": FRACTION_BITS, "FIRST_KNOT": FIRST_KNOT, "KNOTS": len(knots_and_slopes()[0])}
    return [f"-D{name}={value}" for name, value in values.items()]
