"""The idx files of a data set in a folder: which names they may have, where they may lie, how they are read."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.errors import DataError

# SHA-256 of the four uncompressed files as published by LeCun, Cortes & Burges.
DIGESTS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
RAW = Path("MNIST", "raw")  # below a root, as torchvision has it and serve.dataset writes it
GZIP_MAGIC = b"\x1f\x8b"

IDX_UBYTE = 0x08
IDX_MAX_ITEMS = 1 << 31

MOST_SHOWN = 5  # of a folder's entries, in an error
ANEW = "copy the file anew, or empty its folder to have MNIST fetched"
BESIDE_DATA = ("lost+found",)  # in a folder that counts as empty


@dataclass(frozen=True)
class Found:
    """The folder that holds the files, and each by MNIST's own name; some may be missing."""

    folder: Path
    paths: dict[str, Path]


def find_files(root: Path) -> Found:
    """The files in ``root`` or in its ``MNIST/raw``, compressed or not, also by the names and in the folders of Kaggle's copy.

    Raises DataError when the folder cannot be listed.
    """
    try:
        for folder in (root, root / RAW):
            if paths := {name: path for name in DIGESTS if (path := _find(folder, name))}:
                return Found(folder, paths)
    except OSError as error:
        raise _unlistable(root, error) from None
    return Found(root, {})


def canonical(name: str) -> str:
    """MNIST's own name of a file with one of the names that its copies have, without ``.gz``."""
    return name.removesuffix(".gz").replace(".idx", "-idx")


def is_empty(folder: Path) -> bool:
    """Whether nothing would be mixed with what is fetched into the folder; it may be missing. Raises DataError."""
    return not entries(folder)


def entries(folder: Path) -> list[str]:
    """What a user sees in a folder, none if it is missing. Raises DataError when it cannot be listed."""
    try:
        return sorted(each.name for each in folder.iterdir() if not each.name.startswith(".") and each.name not in BESIDE_DATA)
    except (FileNotFoundError, NotADirectoryError):
        if folder.exists():
            raise DataError(f"--data-dir {folder} is a file; name the folder of the four idx files") from None
        return []
    except OSError as error:
        raise _unlistable(folder, error) from None


def unlike_mnist(root: Path) -> DataError:
    """Says what a folder holds in the place of a data set, and what is expected."""
    there = entries(root)
    shown = ", ".join(there[:MOST_SHOWN]) + f" and {len(there) - MOST_SHOWN} more" * (len(there) > MOST_SHOWN)
    expected = f"{next(iter(DIGESTS))} and the other three idx files"
    for pattern in ("*", "*/*", "*/*/*"):
        for each in sorted(root.glob(f"{pattern}/train-images?idx3-ubyte*")):
            folder = each.parent.parent if canonical(each.parent.name) in DIGESTS else each.parent
            return DataError(f"{root} holds {shown}; {expected} are in {folder}: name that folder")
    return DataError(f"{root} holds {shown}, and not {expected}; name their folder, or an empty one to have MNIST fetched")


def read_idx(content: bytes, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Parse an idx file of unsigned bytes. Raises DataError naming ``name`` when it is not exactly that."""
    if len(content) < 4 or content[0] != 0 or content[1] != 0:
        raise DataError(f"{name} is not an idx file (bad magic number); {ANEW}")
    kind, axes = content[2], content[3]
    if kind != IDX_UBYTE or axes not in (1, 3):
        raise DataError(f"{name} holds type 0x{kind:02x} in {axes} axes; unsigned bytes in 1 or 3 axes are needed")
    header = 4 + 4 * axes
    if len(content) < header:
        raise DataError(f"{name} is truncated in its header; {ANEW}")
    shape = struct.unpack(f">{axes}I", content[4:header])
    items = int(np.prod(shape, dtype=object))
    if 0 in shape[1:] or items > IDX_MAX_ITEMS or len(content) - header != items:
        raise DataError(f"{name} announces {'×'.join(map(str, shape))} bytes but holds {len(content) - header}; {ANEW}")
    return np.frombuffer(content, np.uint8)[header:].reshape(shape)


def write_idx(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    """Write an idx file of unsigned bytes."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, IDX_UBYTE, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def read_file(path: Path) -> tuple[bytes, bytes]:
    """A file as it is, and what is in it: unpacked if it is gzip's, whatever its name says. Raises DataError."""
    try:
        stored = path.read_bytes()
        return stored, unpacked(stored)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); {ANEW}") from None


def unpacked(content: bytes) -> bytes:
    """The same, without gzip's compression. Raises OSError, EOFError or zlib.error when it is damaged."""
    return gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content


def _unlistable(folder: Path, error: OSError) -> DataError:
    return DataError(f"--data-dir {folder} cannot be listed ({error.strerror}); name another folder")


def _find(folder: Path, name: str) -> Path | None:
    for own in (name, name.replace("-idx", ".idx")):
        for candidate in (folder / own, folder / f"{own}.gz", folder / own / own):
            if candidate.is_file():
                return candidate
    return None
