"""The records of the core: a request of any protocol, its result, and the holder of its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from serve.batching.ticket import Priority
from serve.models.model import Model

PIXELS = ("pixels",)
IMAGES = ("images",)


class Addresses(msgspec.Struct, frozen=True, eq=False):
    """Consecutive rows of a seed's stream; a ``seed`` that is None is drawn. ``truncation`` 0: none."""

    seed: int | None
    start: int
    count: int
    truncation: float = 0.0


class Latents(msgspec.Struct, frozen=True, eq=False):
    """Rows that the caller brings: float32 (n, z), or flat; ``count`` says how many, or 0 as many as there are."""

    values: NDArray[np.float32]
    count: int = 0


class Interpolation(msgspec.Struct, frozen=True, eq=False):
    """``steps`` rows on the arc from one address, (seed, index), to another."""

    begin: tuple[int, int]
    end: tuple[int, int]
    steps: int
    truncation: float = 0.0


class DigitsRequest(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """One request. ``encoding`` is what the protocol will make of the rows: for limits, metrics and error texts.

    ``row_bytes`` is what each row takes up in memory until the answer has been sent.
    """

    rows: Addresses | Latents | Interpolation
    model: str = ""  # the default model
    version: int = 0  # as the model's route has it
    labels: Sequence[int] | NDArray[np.int64] = ()  # one for all rows, or one each; empty: the addresses' own
    outputs: Sequence[str] = PIXELS
    encoding: str = "uint8"
    priority: Priority = Priority.INTERACTIVE
    deadline: float | None = None  # on time.monotonic()
    row_bytes: int = 0

    @property
    def count(self) -> int:
        """How many images are asked for; 0 for latents whose number is known to the model alone."""
        return self.rows.steps if isinstance(self.rows, Interpolation) else self.rows.count


class Digits(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """The result of a request: rows in order, in the pieces they were computed in, their address and timing."""

    model: Model  # that made them
    rows: Addresses | Latents | Interpolation  # as the request has them
    encoding: str  # as the request has it
    seed: int | None  # None for rows without an address
    start: int
    count: int
    pixels: Sequence[NDArray[np.uint8]]  # (k, 28, 28) each; empty where they were not asked for
    images: Sequence[NDArray[np.float32]]  # (k, 1, 28, 28) each, in [0, 1]; empty where they were not asked for
    labels: NDArray[np.int64] | None  # (count,); None of an unconditional model
    queued_at: float  # on time.monotonic()
    queue_seconds: float
    wait_seconds: float
    compute_seconds: float

    @property
    def joined_pixels(self) -> NDArray[np.uint8]:
        """The pixels as one array (count, 28, 28)."""
        return np.concatenate(self.pixels)


class Holder(Protocol):
    """The call that a request belongs to (``serve.access.budget.Hold``): what it holds is given back once its answer is sent."""

    @property
    def images_limit(self) -> int:
        """Of its caller, in flight; 0: none."""
        ...

    def take(self, images: int, size: int) -> None:
        """Hold so many images and bytes more. Raises CallerLimitError or OverloadedError."""
        ...
