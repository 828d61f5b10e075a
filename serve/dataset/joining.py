"""Joins shards into files in common formats: MNIST's idx files, one npz file for numpy, or Parquet (hub.py)."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from serve.dataset.header import Dataset, read_header, write_header
from serve.errors import SettingsError
from serve.files import replacing

UNKNOWN_LABEL = 255
LABELS_AT_ONCE = 1 << 16
COPY_BYTES = 1 << 20
TEST_SHARE = 7  # one digit in so many goes to the test files, as in MNIST
IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801  # http://yann.lecun.com/exdb/mnist


class Whole(NamedTuple):
    """A data set whose shards are all there: what the formats are made of."""

    folder: Path
    dataset: Dataset
    parts: Sequence[Path]

    def pixels(self, first: int, count: int) -> Iterator[bytes]:
        """One byte a pixel, some at a time, from the ``first``-th digit on."""
        digit = self.dataset.height * self.dataset.width
        return _pieces(self.parts, first * digit, count * digit)

    def labels(self, first: int, count: int) -> Iterator[bytes]:
        """One byte a digit, some at a time, from the ``first``-th on."""
        dataset = self.dataset
        for begin in range(first, first + count, LABELS_AT_ONCE):
            some = min(LABELS_AT_ONCE, first + count - begin)
            labels: NDArray[np.int64] | None = np.full(some, UNKNOWN_LABEL)
            if dataset.classes:
                given = dataset.start + begin
                if dataset.filter:
                    labels = dataset.chosen_rows(self.indices(begin, some), given + np.arange(some))[1]
                else:
                    labels = dataset.rows(given, some)[1]
            assert labels is not None
            yield labels.astype(np.uint8).tobytes()

    def indices(self, first: int, count: int) -> NDArray[np.int64]:
        """Where in the stream the ``first``-th digit and those after it are, (count,)."""
        if not self.dataset.filter:
            return self.dataset.start + np.arange(first, first + count)
        return _stored_indices(self.folder, self.dataset, first, count)


def open_whole(folder: Path) -> Whole:
    """Raises SettingsError naming the first shard that is missing."""
    dataset = read_header(folder)
    parts = []
    for shard in range(dataset.shards):
        part, wanted = dataset.shard_file(folder, shard), dataset.shard_range(shard)[1] * dataset.height * dataset.width
        if not part.exists() or part.stat().st_size != wanted:
            raise SettingsError(f"{part} is missing or not whole; write it with --shard {shard}")
        parts.append(part)
    return Whole(folder, dataset, parts)


def join(folder: Path, write: Callable[[Whole], list[Path]]) -> list[Path]:
    """Join all shards into one of the formats; returns its files. Raises SettingsError."""
    whole = open_whole(folder)
    if whole.dataset.filter:
        whole = whole._replace(dataset=_with_refused_share(whole))
    return write(whole)


def _stored_indices(folder: Path, dataset: Dataset, first: int, count: int) -> NDArray[np.int64]:
    """Where in the stream the ``first``-th digit of a filtered data set and those after it are."""
    found = []
    for shard in range(dataset.shards):
        begin, size = dataset.shard_range(shard)
        skip = max(0, first - (begin - dataset.start))
        wanted = min(size, first + count - (begin - dataset.start)) - skip
        if wanted > 0:
            path = dataset.indices_file(folder, shard)
            found.append(np.fromfile(path, "<i8", wanted, offset=8 * skip))
            if len(found[-1]) < wanted:
                raise SettingsError(f"{path} is not whole; delete {dataset.shard_file(folder, shard)} and write the shard again")
    return np.concatenate(found).astype(np.int64)


def _with_refused_share(whole: Whole) -> Dataset:
    """The header with how many of the digits that the judge was shown it refused, written too."""
    dataset, shown = whole.dataset, 0
    for begin in range(0, dataset.count, LABELS_AT_ONCE):
        some = min(LABELS_AT_ONCE, dataset.count - begin)
        further = whole.indices(begin, some) - (dataset.start + begin + np.arange(some))
        shown += int((further // dataset.count + 1).sum())
    dataset = msgspec.structs.replace(dataset, refused_share=1 - dataset.count / shown)
    write_header(whole.folder, dataset)
    return dataset


def write_idx(whole: Whole) -> list[Path]:
    """MNIST's four files below ``MNIST/raw``, where torchvision's class of that name looks for them."""
    raw, dataset = whole.folder / "MNIST" / "raw", whole.dataset
    raw.mkdir(parents=True, exist_ok=True)
    paths = [raw / f"{kind}-{what}-ubyte" for kind in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    with replacing(paths) as files:
        for (skip, count), images, labels in zip(split(dataset).values(), files[::2], files[1::2], strict=True):
            images.write(struct.pack(">4I", IMAGES_MAGIC, count, dataset.height, dataset.width))
            images.writelines(whole.pixels(skip, count))
            labels.write(struct.pack(">2I", LABELS_MAGIC, count))
            labels.writelines(whole.labels(skip, count))
    return paths


def split(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """The place of the first digit of the training set and of the test set, and how many each has."""
    test = dataset.count // TEST_SHARE
    return {"train": (0, dataset.count - test), "test": (dataset.count - test, test)}


def write_npz(whole: Whole) -> list[Path]:
    """``images`` uint8 (count, height, width) and ``labels`` uint8 (count,), readable by ``numpy.load``.

    Of a filtered data set also ``indices`` int64 (count,): where in the stream each digit is.
    """
    path, dataset = whole.folder / "digits.npz", whole.dataset
    shape = (dataset.count, dataset.height, dataset.width)
    arrays = {
        "images": ("|u1", shape, whole.pixels(0, dataset.count)),
        "labels": ("|u1", shape[:1], whole.labels(0, dataset.count)),
    }
    if dataset.filter:
        indices = [dataset.indices_file(whole.folder, shard) for shard in range(dataset.shards)]
        arrays["indices"] = "<i8", shape[:1], _pieces(indices, 0, 8 * dataset.count)
    with replacing([path]) as (file_,), zipfile.ZipFile(file_, "w") as archive:
        for name, (kind, size, content) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": size})
                for some in content:
                    file.write(some)
    return [path]


def _pieces(parts: Sequence[Path], skip: int, size: int) -> Iterator[bytes]:
    """``size`` bytes of the files read as one, after the first ``skip``, some at a time."""
    for part in parts:
        here = part.stat().st_size
        if skip < here and size:
            with part.open("rb") as file:
                file.seek(skip)
                while size and (chunk := file.read(min(size, COPY_BYTES))):
                    yield chunk
                    size -= len(chunk)
        skip = max(0, skip - here)
