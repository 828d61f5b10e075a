"""The address rule: row ``index`` of ``seed``'s endless stream of latents and labels, as a pure function of the two.

Bits: Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with key (seed, 0) and a
256-bit counter, as in ``numpy.random.Philox``. A row of z values takes ceil(z / 8) consecutive counter blocks, so row i
starts at block i * ceil(z / 8); numpy steps the counter before it draws, so block b is Philox of counter b + 1.
Each block gives four 64-bit words, read little-endian as eight 32-bit words, one for each value of the row in order;
the words beyond z in the last block are dropped. A conditional model's row has one value more, after the others: its word
w gives the label floor(w * labels / 2**32), so that each comes up equally often.

Normal values: the word's top bit is the sign, the other 31 bits m give the tail probability (m + 0.5) / 2**32, and
the magnitude is the inverse normal distribution function there, linear between 128 knots in each octave of m + 0.5
(largest error 4e-6). That takes additions, multiplications and two table look-ups in float32 and nothing else:
no sine or logarithm whose last bit depends on the processor or the library. So the bits are the same everywhere,
which Box-Muller and ziggurat cannot promise.

Truncation at t (Brock et al. 2019, arXiv:1809.11096: no value beyond t) takes the tail probability p to
p_t + p * (1 - 2 p_t) before it is looked up, where p_t is the tail beyond t: the normal distribution cut off at t exactly,
with no value drawn anew, so that an address stays an address at any truncation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import c_float
from dataclasses import dataclass
from functools import cache, lru_cache
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
# As protobuf has it. Below it all digits are the same, and the tail's grid is too coarse to tell.
LEAST_TRUNCATION = float(np.float32(0.01))


@dataclass(slots=True, eq=False)  # not frozen: that triples the time to make one, and every request makes some
class Span:
    """Consecutive rows: of ``seed``'s stream from ``start`` on, or of ``explicit`` (n, z) from row ``start`` on.

    ``labels`` int64 (count,) stand in for the stream's own; ``truncation`` cuts the stream's values off there, unless it is 0.
    """

    seed: int
    start: int
    count: int
    explicit: NDArray[np.float32] | None = None
    labels: NDArray[np.int64] | None = None
    truncation: float = 0.0

    def part(self, first: int, count: int) -> Span:
        """``count`` of these rows, from the ``first``-th on."""
        if first == 0 and count == self.count:
            return self
        labels = None if self.labels is None else self.labels[first : first + count]
        return Span(self.seed, self.start + first, count, self.explicit, labels, self.truncation)


class LatentReader:
    """Writes spans into a batch. It holds generator state and scratch space, so each thread has its own.

    ``labels`` is how many there are to choose from; 0 for an unconditional model.
    """

    def __init__(self, latent_size: int, labels: int = 0) -> None:
        self._latent_size = latent_size
        self._labels = labels
        self._blocks = blocks_per_row(latent_size + (labels > 0))
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

    def fill(self, out: NDArray[np.float32], spans: Iterable[Span], labels: NDArray[np.int64] | None = None) -> None:
        """Write the spans' rows one after the other into ``out`` (rows, z), which they must fill exactly.

        The labels of a conditional model's rows go into ``labels`` (rows,).

        All spans' bits are drawn first and transformed together: a batch of many callers' single digits costs
        little more than one span of the same size.
        """
        row = pending = 0
        given: list[tuple[int, Span]] = []  # spans that bring latents or labels of their own
        tails: NDArray[np.float32] | None = None  # of this block's rows, if any is truncated

        for span in spans:
            if span.explicit is not None or span.labels is not None:
                given.append((row + pending, span))
            done = 0
            while done < span.count:
                rows = min(span.count - done, BLOCK_ROWS - pending)
                if span.explicit is None:
                    self._draw(span.seed, span.start + done, self._words[pending : pending + rows])
                if span.truncation:
                    tails = np.zeros((BLOCK_ROWS, 1), np.float32) if tails is None else tails
                    tails[pending : pending + rows] = tail_beyond(span.truncation)
                pending += rows
                done += rows
                if pending == BLOCK_ROWS:
                    self._transform(row, pending, out, labels, tails)
                    row += pending
                    pending, tails = 0, None
        if pending:
            self._transform(row, pending, out, labels, tails)
        for first, span in given:
            if span.explicit is not None:
                out[first : first + span.count] = span.explicit[span.start : span.start + span.count]
            if span.labels is not None and labels is not None:
                labels[first : first + span.count] = span.labels

    def _draw(self, seed: int, start: int, out: NDArray[np.uint64]) -> None:
        block = start * self._blocks
        self._key[0] = seed
        self._counter[0] = block & 0xFFFFFFFFFFFFFFFF
        self._counter[1] = block >> 64
        # Setting the state of one generator costs a tenth of making a new one.
        self._philox.state = self._state
        out.ravel()[:] = self._philox.random_raw(out.size)

    def _transform(
        self,
        first: int,
        rows: int,
        out: NDArray[np.float32],
        labels: NDArray[np.int64] | None,
        tails: NDArray[np.float32] | None,
    ) -> None:
        words = self._words[:rows].astype("<u8", copy=False).view(np.uint32)
        to_normal(words[:, : self._latent_size], out[first : first + rows], None if tails is None else tails[:rows])
        if labels is not None:
            chosen = words[:, self._latent_size].astype(np.uint64) * np.uint64(self._labels) >> np.uint64(32)
            labels[first : first + rows] = chosen


def blocks_per_row(values: int) -> int:
    """Counter blocks that one row takes."""
    return -(-values // VALUES_PER_BLOCK)


def draw(seed: int, start: int, count: int, latent_size: int) -> NDArray[np.float32]:
    """Rows ``start`` to ``start + count`` of ``seed`` as a new float32 array (count, latent_size)."""
    return draw_span(Span(seed, start, count), latent_size, 0)[0]


def draw_span(span: Span, latent_size: int, labels: int) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """A span's rows (count, latent_size), and for a model with ``labels`` to choose from its labels (count,), else None."""
    out = np.empty((span.count, latent_size), np.float32)
    chosen = np.empty(span.count, np.int64) if labels else None
    LatentReader(latent_size, labels).fill(out, [span], chosen)
    return out, chosen


def in_turn(labels: Sequence[int] | NDArray[np.int64], first: int, count: int) -> NDArray[np.int64]:
    """The labels of stream indices ``first`` … where the one at index i is ``labels[i % n]``: int64 (count,)."""
    own = np.asarray(labels, np.int64)
    turns: NDArray[np.int64] = own[(first % len(own) + np.arange(count)) % len(own)]
    return turns


def slerp(begin: NDArray[np.float32], end: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    """``steps`` rows float32 (steps, z) from ``begin`` (z,) to ``end`` (z,), both included, on the arc between them.

    Spherical interpolation (Shoemake 1985) keeps to the length that normal latents have, which a straight line leaves;
    lengths that differ are led over evenly. Where the two point the same way or opposite ways it is a straight line.
    """
    starts, ends = begin.astype(np.float64), end.astype(np.float64)
    share = np.linspace(0.0, 1.0, steps)[:, None]
    lengths = np.linalg.norm(starts), np.linalg.norm(ends)
    straight = (1 - share) * starts + share * ends
    if min(lengths) == 0.0:
        return straight.astype(np.float32)
    angle = np.arccos(np.clip(starts @ ends / (lengths[0] * lengths[1]), -1.0, 1.0))
    if np.sin(angle) < 1e-6:
        return straight.astype(np.float32)
    arc = np.sin((1 - share) * angle) * starts / lengths[0] + np.sin(share * angle) * ends / lengths[1]
    rows: NDArray[np.float32] = (((1 - share) * lengths[0] + share * lengths[1]) * arc / np.sin(angle)).astype(np.float32)
    return rows


def to_normal(words: NDArray[np.uint32], out: NDArray[np.float32], tails: NDArray[np.float32] | None = None) -> None:
    """Map uniform 32-bit words to normal values of the same shape, as the module's text says.

    ``tails`` float32 (rows, 1) are p_t of each row's truncation.
    """
    knots, slopes = knots_and_slopes()
    position = (words & np.uint32(0x7FFFFFFF)).view(np.int32).astype(np.float32)
    position += np.float32(0.5)
    if tails is not None:
        position *= 1 - 2 * tails
        position += tails * np.float32(2**32)
    bits = position.view(np.int32)
    index = bits >> FRACTION_BITS
    index -= FIRST_KNOT
    fraction = (bits & ((1 << FRACTION_BITS) - 1)).astype(np.float32)
    np.take(slopes, index, out=out, mode="clip")
    out *= fraction
    out += np.take(knots, index, mode="clip")
    np.bitwise_or(out.view(np.uint32), words & np.uint32(0x80000000), out=out.view(np.uint32))


@lru_cache(256)  # callers choose the number
def tail_beyond(truncation: float) -> np.float32:
    """The probability beyond ``truncation``, on a grid that keeps the last bit of a library's erf out of it."""
    as_asked = c_float(truncation).value  # as protobuf has it: by whichever protocol it came, the digits are the same
    return np.float32(round(NormalDist().cdf(-as_asked) * 2**20) / 2**20)


@cache
def knots_and_slopes() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
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
