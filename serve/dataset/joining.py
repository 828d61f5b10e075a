"""Joins shards into files in common formats: MNIST's idx files, npz files for numpy and Keras, or Parquet (hub.py).

All digits are training digits, unless a share of them, the last ones, is wanted as test digits.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from serve.dataset.header import ATTEMPTS, Dataset, read_header, write_header
from serve.errors import SettingsError
from serve.files import replacing

UNKNOWN_LABEL = 255
LABELS_AT_ONCE = 1 << 16
COPY_BYTES = 1 << 20
SUMS_FILE = "SHA256SUMS"  # as sha256sum writes it; training checks the files by it
IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801  # http://yann.lecun.com/exdb/mnist


class Whole(NamedTuple):
    """A data set whose shards are all there: what the formats are made of."""

    folder: Path
    dataset: Dataset
    parts: Sequence[Path]
    test: int = 0  # of its digits, the last ones, are test digits

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

    def split(self) -> dict[str, tuple[int, int]]:
        """The place of the first digit of the training part and of the test part, and how many each has."""
        train = self.dataset.count - self.test
        return {"train": (0, train), "test": (train, self.test)}


def open_whole(folder: Path, test_share: float = 0.0) -> Whole:
    """Raises SettingsError naming the first shard that is missing, or ``--test-share`` where it leaves one part empty."""
    dataset = read_header(folder)
    test = round(dataset.count * test_share)
    if test_share and not 0 < test < dataset.count:
        text = f"--test-share {test_share:g} makes {test} test digits of {dataset.count}; give another, or leave it out"
        raise SettingsError(text)
    parts = []
    for shard in range(dataset.shards):
        part, wanted = dataset.shard_file(folder, shard), dataset.shard_range(shard)[1] * dataset.height * dataset.width
        if not part.exists() or part.stat().st_size != wanted:
            raise SettingsError(f"{part} is missing or not whole; write it with --shard {shard}")
        parts.append(part)
    return Whole(folder, dataset, parts, test)


def join(folder: Path, write: Callable[[Whole], list[Path]], test_share: float = 0.0) -> list[Path]:
    """Join all shards into one of the formats, ``test_share`` of them as test digits; returns its files. Raises SettingsError."""
    whole = open_whole(folder, test_share)
    if whole.dataset.filter:
        whole = whole._replace(dataset=_with_refused_share(whole))
    return write(whole)


def _stored_indices(folder: Path, dataset: Dataset, first: int, count: int) -> NDArray[np.int64]:
    """Where in the stream the ``first``-th digit of a filtered data set and those after it are. Raises SettingsError."""
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
            places = begin - dataset.start + skip + np.arange(wanted)
            beyond = np.maximum(found[-1], -1) - dataset.start - places  # without an overflow
            odd = (beyond < 0) | (beyond % dataset.count != 0) | (beyond // dataset.count >= ATTEMPTS)
            for place, index in zip(places[odd][:1], found[-1][odd][:1], strict=True):
                raise SettingsError(f"{path} is damaged: index {index} cannot stand in place {place}; write the shard again")
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
    """MNIST's four files below ``MNIST/raw``, where torchvision's class of that name looks for them, and their digests."""
    raw, dataset = whole.folder / "MNIST" / "raw", whole.dataset
    raw.mkdir(parents=True, exist_ok=True)
    paths = [raw / f"{kind}-{what}-ubyte" for kind in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    paths.append(raw / SUMS_FILE)
    sums = []
    with replacing(paths) as (*files, sums_file):
        for (skip, count), images, labels in zip(whole.split().values(), files[::2], files[1::2], strict=True):
            head = struct.pack(">4I", IMAGES_MAGIC, count, dataset.height, dataset.width)
            sums.append(_write(images, head, whole.pixels(skip, count)))
            sums.append(_write(labels, struct.pack(">2I", LABELS_MAGIC, count), whole.labels(skip, count)))
        lines = (f"{digest}  {path.name}\n" for digest, path in zip(sums, paths, strict=False))
        sums_file.write("".join(lines).encode())
    return paths


def _write(file: IO[bytes], head: bytes, pieces: Iterable[bytes]) -> str:
    """Write all of it; returns its SHA-256."""
    digest = hashlib.sha256(head)
    file.write(head)
    for some in pieces:
        digest.update(some)
        file.write(some)
    return digest.hexdigest()


def write_npz(whole: Whole) -> list[Path]:
    """``images`` uint8 (count, height, width) and ``labels`` uint8 (count,), readable by ``numpy.load``.

    Of a filtered data set also ``indices`` int64 (count,): where in the stream each digit is.
    """
    path, dataset = whole.folder / "digits.npz", whole.dataset
    if whole.test:
        raise SettingsError("--test-share is not for npz, which is one part; leave it out, or join as idx, keras or parquet")
    shape = (dataset.count, dataset.height, dataset.width)
    arrays = {
        "images": ("|u1", shape, whole.pixels(0, dataset.count)),
        "labels": ("|u1", shape[:1], whole.labels(0, dataset.count)),
    }
    if dataset.filter:
        indices = [dataset.indices_file(whole.folder, shard) for shard in range(dataset.shards)]
        arrays["indices"] = "<i8", shape[:1], _pieces(indices, 0, 8 * dataset.count)
    return _write_npz(path, arrays)


def write_keras(whole: Whole) -> list[Path]:
    """``x_train``, ``y_train``, ``x_test`` and ``y_test``, as in the ``mnist.npz`` of Keras."""
    dataset = whole.dataset
    arrays: dict[str, tuple[str, tuple[int, ...], Iterable[bytes]]] = {}
    for part, (skip, count) in whole.split().items():
        arrays[f"x_{part}"] = "|u1", (count, dataset.height, dataset.width), whole.pixels(skip, count)
        arrays[f"y_{part}"] = "|u1", (count,), whole.labels(skip, count)
    return _write_npz(whole.folder / "mnist.npz", arrays)


def _write_npz(path: Path, arrays: Mapping[str, tuple[str, tuple[int, ...], Iterable[bytes]]]) -> list[Path]:
    """Arrays by name: type, shape, and content some at a time."""
    with replacing([path]) as (whole_file,), zipfile.ZipFile(whole_file, "w") as archive:
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
