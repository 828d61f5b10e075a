"""What a client gets: digits, their address and the server's timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from serve.client.errors import unusable
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pictures import Origin, Way, to_grid, to_png

SHAPE = (28, 28)


@dataclass(eq=False)
class Digits:
    """Digits and their address: a sequence of arrays (28, 28), which a notebook shows as a picture.

    ``pixels`` is uint8 (n, 28, 28), or float32 in [0, 1] when that was asked for. It may be written to.
    """

    pixels: NDArray[Any]
    model: str
    version: int
    seed: int | None  # None for digits without an address: of explicit latents, or between two addresses
    start: int
    labels: NDArray[np.int64]  # (n,), empty for a model that cannot be asked for a digit
    queue_seconds: float
    compute_seconds: float
    origin: Origin | None = None  # what a picture of them says; None where the server does not name the model's file

    def __len__(self) -> int:
        return len(self.pixels)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return iter(self.pixels)

    def __getitem__(self, index: SupportsIndex | slice) -> NDArray[Any]:
        """The pixels of one digit (28, 28), or of several (k, 28, 28): the array's own, not a copy."""
        pixels: NDArray[Any] = self.pixels[index]
        return pixels

    def __repr__(self) -> str:
        address = "no address" if self.seed is None else f"seed {self.seed} from {self.start}"
        return f"<Digits: {len(self)} by {self.model}/{self.version}, {address}, {self.pixels.dtype}>"

    def to_png(self) -> bytes:
        """All digits as one grey PNG, in near-square rows. It says how they were made, whatever was done to ``pixels``."""
        pixels = self.pixels if self.pixels.dtype == np.uint8 else np.rint(self.pixels * 255).astype(np.uint8)
        return to_png(to_grid(pixels), self.origin)

    _repr_png_ = to_png  # IPython's name for it


Request = pb.GenerateRequest | pb.GenerateStreamRequest | pb.InterpolateRequest


def from_response(response: pb.GenerateResponse, request: Request, most: int) -> Digits:
    """An answer of the formats that the client asks for, of ``most`` digits at most. Raises DigitError for one that is none."""
    count = response.count
    kind = "<f4" if response.format == pb.IMAGE_FORMAT_FLOAT32 else np.uint8
    try:
        pixels = np.frombuffer(bytearray(response.images[0]), kind)  # a copy: bytes cannot be written to
        pixels = pixels.reshape(count, response.height, response.width)
    except (IndexError, ValueError):
        raise unusable("its pixels are not as many as it says") from None
    if not 0 < count <= most:
        raise unusable(f"it has {count} digits, and {most} were asked for")
    printable = (response.model + response.digest).isprintable()
    if pixels.shape[1:] != SHAPE or len(response.labels) not in (0, count) or not printable:
        raise unusable("it says of what size, label or model its digits are, and that cannot be")
    return Digits(
        pixels=pixels,
        model=response.model,
        version=response.version,
        seed=response.seed if response.HasField("seed") else None,
        start=response.start,
        labels=np.array(response.labels, np.int64),
        queue_seconds=response.timing.queue_seconds,
        compute_seconds=response.timing.compute_seconds,
        origin=_origin(response, request) if response.digest else None,
    )


def _origin(response: pb.GenerateResponse, request: Request) -> Origin:
    seed, index, way = response.seed if response.HasField("seed") else None, response.start, None
    if isinstance(request, pb.InterpolateRequest):
        seed, index = request.begin.seed, request.begin.index
        way = Way(request.end.seed, request.end.index, request.steps)
    made_by = response.model, response.version, response.digest
    return Origin(*made_by, seed, index, response.count, tuple(response.labels), request.truncation, way)
