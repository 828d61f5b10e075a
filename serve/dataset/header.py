"""``dataset.json``: how a data set was made, and which of its digits a shard contains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from serve.errors import SettingsError
from serve.files import locked, replace_file
from serve.latents import INDEX_LIMIT, SEED_LIMIT, LatentReader, Span, draw_span, in_turn

HEADER_FILE = "dataset.json"
MOST_SHARDS = 1 << 20
MOST_BYTES = 1 << 24  # of the header; labels take the most of it
ATTEMPTS = 100  # addresses from which a filter may choose each digit

Positive = Annotated[int, Meta(ge=1)]
Shards = Annotated[int, Meta(ge=1, le=MOST_SHARDS)]
Side = Annotated[int, Meta(ge=1, le=1 << 16)]
Share = Annotated[float, Meta(ge=0, le=1)]
Printed = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{0,64}\Z")]  # on terminals, and in a data set's card


class Dataset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a data set was generated from. ``digest`` is the model file's; a shard of another one is not mixed in."""

    model: Printed
    version: Positive
    digest: Printed
    seed: Annotated[int, Meta(ge=0)]
    start: Annotated[int, Meta(ge=0)]
    count: Positive
    shards: Shards
    height: Side
    width: Side
    latent_size: Side
    classes: Annotated[int, Meta(ge=0, le=256)]  # labels that the model can be asked for; 0 for an unconditional one
    labels: tuple[Annotated[int, Meta(ge=0)], ...] = ()  # the digit at index i is labels[i % n]; empty: the stream's own
    filter: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # least confidence of the judge in a digit's label; 0: unfiltered
    judge: Printed = ""  # SHA-256 of the judge's file, if filtered
    refused_share: Share | None = None  # of the digits that the judge was shown; known when a filtered data set is joined

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that are no data set together."""
        if self.seed >= SEED_LIMIT or self.start + self.count > INDEX_LIMIT:
            raise ValueError("seed, start or count is out of range")
        if any(label >= self.classes for label in self.labels):
            raise ValueError("a label is out of range")
        if self.filter and not (self.classes and self.judge and self.start + self.count * ATTEMPTS <= INDEX_LIMIT):
            raise ValueError("a filter needs labels, a judge and addresses to choose from")

    def rows(self, first: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
        """Latents (count, z) of stream indices, and their labels (count,) unless the model is unconditional."""
        latents, labels = draw_span(Span(self.seed, first, count), self.latent_size, self.classes)
        if self.labels:
            labels = in_turn(self.labels, first, count)
        return latents, labels

    def chosen_rows(
        self, indices: NDArray[np.int64], given: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
        """As ``rows``, of stream indices (n,) that stand in the places of the ``given`` ones."""
        latents = np.empty((len(indices), self.latent_size), np.float32)
        labels = np.empty(len(indices), np.int64) if self.classes else None
        LatentReader(self.latent_size, self.classes).fill(latents, [Span(self.seed, int(each), 1) for each in indices], labels)
        if self.labels:
            labels = np.asarray(self.labels, np.int64)[given % len(self.labels)]
        return latents, labels

    def shard_of(self, place: int) -> int:
        """The shard that holds the ``place``-th digit of the data set."""
        return ((place + 1) * self.shards - 1) // self.count

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First index of a shard in the stream, and how many digits it holds."""
        first = self.count * shard // self.shards
        return self.start + first, self.count * (shard + 1) // self.shards - first

    def shard_file(self, folder: Path, shard: int) -> Path:
        return folder / f"part-{shard:05d}-of-{self.shards:05d}.pixels"

    def indices_file(self, folder: Path, shard: int) -> Path:
        """Beside a filtered shard: the stream index of each of its digits, int64, little-endian."""
        return self.shard_file(folder, shard).with_suffix(".indices")


def read_header(folder: Path) -> Dataset:
    """The header of the folder's data set. Raises SettingsError."""
    path = folder / HEADER_FILE
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES)
    except OSError:
        raise SettingsError(f"{path} cannot be read; write a shard first") from None
    return parse_header(content, str(path))


def parse_header(content: bytes, where: str) -> Dataset:
    """A header's bytes. Raises SettingsError naming ``where``."""
    try:
        return msgspec.json.decode(content, type=Dataset)
    except (ValueError, RecursionError, msgspec.MsgspecError):
        raise SettingsError(f"{where} is no data set's header; write a shard into an empty folder") from None


def write_header(folder: Path, dataset: Dataset) -> None:
    """Write ``dataset.json``, whole."""
    replace_file(folder / HEADER_FILE, msgspec.json.format(msgspec.json.encode(dataset), indent=2) + b"\n", 0o644)


def agree(folder: Path, dataset: Dataset) -> None:
    """Check that the folder belongs to this data set: the first shard writes the header, the others must agree with it."""
    header = folder / HEADER_FILE
    with locked(folder):  # a job's shards all begin at once
        if not header.exists():
            write_header(folder, dataset)
    there = read_header(folder)
    for name in (each for each in Dataset.__struct_fields__ if each != "refused_share"):
        found, wanted = getattr(there, name), getattr(dataset, name)
        if found != wanted:
            raise SettingsError(f"{folder} holds a data set with {name} {found}, not {wanted}; name another --out")
