"""Draws latents on the device: the kernel of ``latents.cu``, put into the engine's stream before the run.

Only a row's seed, index, label and truncation are copied to the device, 32 bytes instead of all its latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.cuda import Device
from serve.engine.device_buffers import PairedMemory
from serve.latents import FIRST_KNOT, FRACTION_BITS, Span, blocks_per_row, knots_and_slopes, tail_beyond

SOURCE = Path(__file__).with_name("latents.cu")
FUNCTION = "draw"
# What the kernel takes: of each row, one copy for a batch; and of all.
ROWS = "rows"
ROW = np.dtype([("seed", np.uint64), ("index", np.uint64), ("label", np.int64), ("tail", np.float32)], align=True)
TABLES = ("knots", "slopes")
OF_THE_STREAM = -1  # in place of a label: the one that the row itself has


class DeviceLatents:
    """Draws up to ``largest`` rows of ``latent_size`` values, and of one label among ``labels``, or none of 0, in ``stream``.

    Raises EngineError when the kernel cannot be compiled or there is no memory left.
    """

    def __init__(self, device: Device, largest: int, latent_size: int, labels: int, stream: int) -> None:
        self._kernel = device.compile(SOURCE.read_text(encoding="utf-8"), FUNCTION, definitions())
        self._latent_size, self._labels = latent_size, labels
        self._blocks = blocks_per_row(latent_size + (labels > 0))
        self._memory = PairedMemory(device, stream)
        self._memory.add(ROWS, np.zeros((largest, ROW.itemsize), np.uint8))
        self._rows = self._memory.host[ROWS].view(ROW)[:, 0]
        for name, table in zip(TABLES, knots_and_slopes(), strict=True):
            self._memory.add(name, table.copy())
            self._memory.upload([name], len(table))

    def fill(self, spans: Sequence[Span]) -> None:
        """Note which rows are wanted, one span's after another's: what is done is done for all spans together."""
        seeds: NDArray[Any] = np.array([span.seed for span in spans], np.uint64)
        indices: NDArray[Any] = np.array([span.start for span in spans], np.uint64)
        counts = [span.count for span in spans]
        count = sum(counts)
        truncations = [span.truncation for span in spans]
        tails: Any = 0.0
        if any(truncations):
            tails = np.array([tail_beyond(truncation) if truncation else 0 for truncation in truncations], np.float32)
        if count > len(spans):  # else each span is one row
            firsts = np.cumsum([0, *counts[:-1]], dtype=np.uint64)
            seeds, indices = seeds.repeat(counts), (indices - firsts).repeat(counts) + np.arange(count, dtype=np.uint64)
            tails = np.repeat(tails, counts) if any(truncations) else tails
        rows = self._rows[:count]
        rows["seed"], rows["index"], rows["label"], rows["tail"] = seeds, indices, OF_THE_STREAM, tails
        if self._labels:
            row = 0
            for span in spans:
                if span.labels is not None:
                    rows["label"][row : row + span.count] = span.labels
                row += span.count

    def launch(self, rows: int, latents: int, labels: int) -> None:
        """Put the drawing of the first ``rows`` rows into the stream; ``latents`` and ``labels`` are device addresses, the
        latter 0 for a model without them."""
        memory = self._memory
        memory.upload([ROWS], rows)
        sizes = (rows, self._latent_size, self._blocks, self._labels)
        addresses = (*map(memory.address, (ROWS, *TABLES)), latents, labels)
        memory.device.launch(self._kernel, rows * self._blocks, (*sizes, *addresses), memory.stream)

    def release(self) -> None:
        """Give the memory back. Once it is done, nothing is left to do."""
        self._memory.release()


def definitions() -> list[str]:
    """What the source takes from ``serve.latents``, as a compiler's flags."""
    values = {"FRACTION_BITS": FRACTION_BITS, "FIRST_KNOT": FIRST_KNOT, "KNOTS": len(knots_and_slopes()[0])}
    return [f"-D{name}={value}" for name, value in values.items()]
