"""A data set in idx files that is not MNIST: any number of classes, each a pattern of its own, moved about and noisy."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

MOST_MOVED = 3  # pixels


def write_patterns(folder: Path, classes: int, train: int, test: int, side: int = 28) -> Path:
    """Write the four files with their digests. Labels are drawn from all classes, the training images' in turn."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(classes)
    patterns = np.kron(chance.integers(0, 2, (classes, side // 4, side // 4)), np.ones((4, 4))) * 160
    for part, labels in (("train", np.arange(train) % classes), ("t10k", chance.integers(0, classes, test))):
        moves = chance.integers(-MOST_MOVED, MOST_MOVED + 1, (len(labels), 2))
        images = [np.roll(patterns[label], move, axis=(0, 1)) for label, move in zip(labels, moves, strict=True)]
        noisy = np.reshape(images, (-1, side, side)) + chance.integers(0, 96, (len(labels), side, side))
        _write(folder / f"{part}-images-idx3-ubyte", noisy.astype(np.uint8))
        _write(folder / f"{part}-labels-idx1-ubyte", labels.astype(np.uint8))
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


def _write(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    path.write_bytes(struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())
