"""Joins shards into files in common formats: MNIST's idx files, or one npz file, its arrays named as Keras names them if wanted.

All digits are training digits, unless a share of them, the last ones, is wanted as test digits.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
from numpy.typing import NDArray

from serve.dataset.header import Dataset, read_header, write_header
from serve.errors import SettingsError
from serve.files import replacing

UNKNOWN_LABEL = 255
LABELS_AT_ONCE = 1 << 16
COPY_BYTES = 1 << 20
SUMS_FILE = "SHA256SUMS"  # as sha256sum writes it; training checks the files by it
IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801  # http://yann.lecun.com/exdb/mnist


def join(folder: Path, file_format: str, test_share: float = 0.0) -> list[Path]:
    """Join all shards into ``idx`` files or one npz file, ``npz`` or ``keras``. ``test_share`` of the digits are test digits.

    Raises SettingsError naming the first shard that is missing, or ``--test-share`` where it leaves one part empty.
    """
    dataset = read_header(folder)
    test = round(dataset.count * test_share)
    if test_share and (file_format == "npz" or not 0 < test < dataset.count):
        reason = (
            "is for idx and keras: npz is one part" if file_format == "npz" else f"makes {test} test digits of {dataset.count}"
        )
        raise SettingsError(f"--test-share {test_share:g} {reason}; give another, or leave it out")
    parts = []
    for shard in range(dataset.shards):
        part, wanted = dataset.shard_file(folder, shard), dataset.shard_range(shard)[1] * dataset.height * dataset.width
        if not part.exists() or part.stat().st_size != wanted:
            raise SettingsError(f"{part} is missing or not whole; write it with --shard {shard}")
        parts.append(part)
    if dataset.filter:
        dataset = _with_refused_share(folder, dataset)
    if file_format == "idx":
        return _join_idx(folder, dataset, parts, test)
    return [_join_npz(folder, dataset, parts) if file_format == "npz" else _join_keras(folder, dataset, parts, test)]


def label_bytes(folder: Path, dataset: Dataset, first: int, count: int) -> Iterator[bytes]:
    """One byte a digit, some at a time, from the ``first``-th of the data set on."""
    for begin in range(first, first + count, LABELS_AT_ONCE):
        some = min(LABELS_AT_ONCE, first + count - begin)
        given = dataset.start + begin
        if not dataset.classes:
            labels: NDArray[np.int64] | None = np.full(some, UNKNOWN_LABEL)
        elif dataset.filter:
            labels = dataset.chosen_rows(_stored_indices(folder, dataset, begin, some), given + np.arange(some))[1]
        else:
            labels = dataset.rows(given, some)[1]
        assert labels is not None
        yield labels.astype(np.uint8).tobytes()


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


def _with_refused_share(folder: Path, dataset: Dataset) -> Dataset:
    """The header with how many of the digits that the judge was shown it refused, written too."""
    shown = 0
    for begin in range(0, dataset.count, LABELS_AT_ONCE):
        some = min(LABELS_AT_ONCE, dataset.count - begin)
        further = _stored_indices(folder, dataset, begin, some) - (dataset.start + begin + np.arange(some))
        shown += int((further // dataset.count + 1).sum())
    dataset = msgspec.structs.replace(dataset, refused_share=1 - dataset.count / shown)
    write_header(folder, dataset)
    return dataset


def _join_idx(folder: Path, dataset: Dataset, parts: list[Path], test: int) -> list[Path]:
    """MNIST's four files below ``MNIST/raw``, where torchvision's class of that name looks for them, and their digests."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    digit = dataset.height * dataset.width
    paths = [raw / f"{kind}-{what}-ubyte" for kind in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    paths.append(raw / SUMS_FILE)
    sums = []
    with replacing(paths) as (*files, sums_file):
        for (skip, count), images, labels in zip(_ranges(dataset, test), files[::2], files[1::2], strict=True):
            head = struct.pack(">4I", IMAGES_MAGIC, count, dataset.height, dataset.width)
            sums.append(_write(images, head, _pieces(parts, skip * digit, count * digit)))
            sums.append(_write(labels, struct.pack(">2I", LABELS_MAGIC, count), label_bytes(folder, dataset, skip, count)))
        lines = (f"{digest}  {path.name}\n" for digest, path in zip(sums, paths, strict=False))
        sums_file.write("".join(lines).encode())
    return paths


def _ranges(dataset: Dataset, test: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """First digit and count of the training part and of the test part."""
    return (0, dataset.count - test), (dataset.count - test, test)


def _write(file: IO[bytes], head: bytes, pieces: Iterable[bytes]) -> str:
    """Write all of it; returns its SHA-256."""
    digest = hashlib.sha256(head)
    file.write(head)
    for some in pieces:
        digest.update(some)
        file.write(some)
    return digest.hexdigest()


def _join_npz(folder: Path, dataset: Dataset, parts: list[Path]) -> Path:
    """``images`` uint8 (count, height, width) and ``labels`` uint8 (count,), readable by ``numpy.load``.

    Of a filtered data set also ``indices`` int64 (count,): where in the stream each digit is.
    """
    path = folder / "digits.npz"
    shape = (dataset.count, dataset.height, dataset.width)
    pixels = _pieces(parts, 0, dataset.count * dataset.height * dataset.width)
    arrays = {"images": ("|u1", shape, pixels), "labels": ("|u1", shape[:1], label_bytes(folder, dataset, 0, dataset.count))}
    if dataset.filter:
        indices = [dataset.indices_file(folder, shard) for shard in range(dataset.shards)]
        arrays["indices"] = "<i8", shape[:1], _pieces(indices, 0, 8 * dataset.count)
    return _write_npz(path, arrays)


def _join_keras(folder: Path, dataset: Dataset, parts: list[Path], test: int) -> Path:
    """``x_train``, ``y_train``, ``x_test`` and ``y_test``, as in the ``mnist.npz`` of Keras."""
    digit = dataset.height * dataset.width
    arrays: dict[str, tuple[str, tuple[int, ...], Iterable[bytes]]] = {}
    for part, (skip, count) in zip(("train", "test"), _ranges(dataset, test), strict=True):
        pixels = _pieces(parts, skip * digit, count * digit)
        arrays[f"x_{part}"] = "|u1", (count, dataset.height, dataset.width), pixels
        arrays[f"y_{part}"] = "|u1", (count,), label_bytes(folder, dataset, skip, count)
    return _write_npz(folder / "mnist.npz", arrays)


def _write_npz(path: Path, arrays: Mapping[str, tuple[str, tuple[int, ...], Iterable[bytes]]]) -> Path:
    """Arrays by name: type, shape, and content some at a time."""
    with replacing([path]) as (whole,), zipfile.ZipFile(whole, "w") as archive:
        for name, (kind, size, content) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": size})
                for some in content:
                    file.write(some)
    return path


def _pieces(parts: list[Path], skip: int, size: int) -> Iterator[bytes]:
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
