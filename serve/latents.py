"""The address rule: row ``index`` of ``seed``'s endless tape of latents, as a pure function of the two.

Bits: Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with key (seed, 0) and a
256-bit counter, as in ``numpy.random.Philox``. A row of z values takes ceil(z / 8) consecutive counter blocks, so row i
starts at block i * ceil(z / 8); numpy steps the counter before it draws, so block b is Philox of counter b + 1.
Each block gives four 64-bit words, read little-endian as eight 32-bit words, one for each value of the row in order;
the words beyond z in the last block are dropped.

Normal values: the word's top bit is the sign, the other 31 bits m give the tail probability (m + 0.5) / 2**32, and
the magnitude is the inverse normal distribution function there, linear between 128 knots in each octave of m + 0.5
(largest error 4e-6). That takes additions, multiplications and two table look-ups in float32 and nothing else:
no sine or logarithm whose last bit depends on the processor or the library. So the bits are the same everywhere,
which Box-Muller and ziggurat cannot promise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

VALUES_PER_BLOCK = 8
WORDS_PER_BLOCK = 4  # of 64 bits
KNOT_BITS = 7  # 2**7 knots in each octave: the leading mantissa bits of m + 0.5 as float32
FRACTION_BITS = 23 - KNOT_BITS
LOWEST_OCTAVE = -1  # m + 0.5 runs from 2**-1 ...
HIGHEST_OCTAVE = 31  # ... to 2**31 inclusive, by rounding to float32
FLOAT32_BIAS = 127
FIRST_KNOT = (LOWEST_OCTAVE + FLOAT32_BIAS) << KNOT_BITS
BLOCK_ROWS = 256  # rows transformed at a time: the temporaries stay in the processor's cache

INDEX_LIMIT = 1 << 63  # indices run from 0 to this, exclusive
SEED_LIMIT = 1 << 64


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows: of ``seed``'s tape from ``start`` on, or of ``explicit`` (n, z) from row ``start`` on."""

    seed: int
    start: int
    count: int
    explicit: NDArray[np.float32] | None = None

    def part(self, first: int, count: int) -> Span:
        """``count`` of these rows, from the ``first``-th on."""
        return Span(self.seed, self.start + first, count, self.explicit)


class LatentReader:
    """Writes spans into a batch. It holds generator state and scratch space, so each thread has its own."""

    def __init__(self, latent_size: int) -> None:
        self._latent_size = latent_size
        self._blocks = blocks_per_row(latent_size)
        self._philox = np.random.Philox(key=0)
        self._key = np.zeros(2, np.uint64)
        self._counter = np.zeros(4, np.uint64)
        self._state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": self._counter, "key": self._key},
            "buffer": np.zeros(WORDS_PER_BLOCK, np.uint64),
            "buffer_pos": WORDS_PER_BLOCK,  # nothing buffered: the next draw takes a new block
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._words = np.zeros((BLOCK_ROWS, self._blocks * WORDS_PER_BLOCK), np.uint64)

    def fill(self, out: NDArray[np.float32], spans: Iterable[Span]) -> None:
        """Write the spans' rows one after the other into ``out`` (rows, z), which they must fill exactly.

        All spans' bits are drawn first and transformed together: a batch of many callers' single digits costs
        little more than one span of the same size.
        """
        row = 0
        pending = 0
        explicit: list[tuple[int, Span]] = []
        for span in spans:
            if span.explicit is not None:
                explicit.append((row + pending, span))
            done = 0
            while done < span.count:
                rows = min(span.count - done, BLOCK_ROWS - pending)
                if span.explicit is None:
                    self._draw(span.seed, span.start + done, self._words[pending : pending + rows])
                pending += rows
                done += rows
                if pending == BLOCK_ROWS:
                    self._transform(out[row : row + pending])
                    row += pending
                    pending = 0
        if pending:
            self._transform(out[row : row + pending])
        for first, span in explicit:
            assert span.explicit is not None
            out[first : first + span.count] = span.explicit[span.start : span.start + span.count]

    def _draw(self, seed: int, start: int, out: NDArray[np.uint64]) -> None:
        block = start * self._blocks
        self._key[0] = seed
        self._counter[0] = block & 0xFFFFFFFFFFFFFFFF
        self._counter[1] = block >> 64
        # Setting the state of one generator costs a tenth of making a new one.
        self._philox.state = self._state
        out.ravel()[:] = self._philox.random_raw(out.size)

    def _transform(self, out: NDArray[np.float32]) -> None:
        words = self._words[: len(out)].astype("<u8", copy=False).view(np.uint32)
        to_normal(words[:, : self._latent_size], out)


def blocks_per_row(latent_size: int) -> int:
    """Counter blocks that one row takes."""
    return -(-latent_size // VALUES_PER_BLOCK)


def draw(seed: int, start: int, count: int, latent_size: int) -> NDArray[np.float32]:
    """Rows ``start`` to ``start + count`` of ``seed`` as a new float32 array (count, latent_size)."""
    out = np.empty((count, latent_size), np.float32)
    LatentReader(latent_size).fill(out, [Span(seed, start, count)])
    return out


def to_normal(words: NDArray[np.uint32], out: NDArray[np.float32]) -> None:
    """Map uniform 32-bit words to normal values of the same shape, as the module's text says."""
    knots, slopes = _table()
    position = (words & np.uint32(0x7FFFFFFF)).view(np.int32).astype(np.float32)
    position += np.float32(0.5)
    bits = position.view(np.int32)
    index = bits >> FRACTION_BITS
    index -= FIRST_KNOT
    fraction = (bits & ((1 << FRACTION_BITS) - 1)).astype(np.float32)
    np.take(slopes, index, out=out, mode="clip")
    out *= fraction
    out += np.take(knots, index, mode="clip")
    np.bitwise_or(out.view(np.uint32), words & np.uint32(0x80000000), out=out.view(np.uint32))


@cache
def _table() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Magnitude at each knot, and its slope per unit of the fraction bits."""
    positions = [
        2.0**octave * (1 + step / 2**KNOT_BITS) for octave in range(LOWEST_OCTAVE, HIGHEST_OCTAVE) for step in range(2**KNOT_BITS)
    ]
    exact = [-NormalDist().inv_cdf(position / 2**32) for position in positions]
    # 2**31 is probability one half: magnitude 0. That last knot needs a slope too, which is never used.
    # Rounding to 2**-20 keeps the last bit of a library's logarithm from reaching the table.
    grid = np.round(np.array([*exact, 0.0, 0.0]) * 2**20)
    knots = (grid[:-1] / 2**20).astype(np.float32)
    slopes = (np.diff(grid) / 2 ** (20 + FRACTION_BITS)).astype(np.float32)
    return knots, slopes
