"""Digits as PNG pictures: one per digit, or a grid of all. For the client too, which is installed without an imaging library."""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY_8_BIT = bytes([8, 0, 0, 0, 0])  # bits a sample, colour type, compression, filter method, no interlace


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """A grey PNG of uint8 (height, width): PNG specification, third edition."""
    height, width = pixels.shape
    lines = np.zeros((height, 1 + width), np.uint8)  # each begins with its filter's number: 0, none
    lines[:, 1:] = pixels
    chunks = [
        _chunk(b"IHDR", struct.pack(">II", width, height) + GREY_8_BIT),
        _chunk(b"IDAT", zlib.compress(lines.tobytes())),
        _chunk(b"IEND", b""),
    ]
    return SIGNATURE + b"".join(chunks)


def to_grid(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Digits (n, height, width) in near-square rows, left to right, the rest black: uint8 (rows, columns)."""
    count, height, width = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width), np.uint8)
    sheet[:count] = pixels
    return sheet.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
