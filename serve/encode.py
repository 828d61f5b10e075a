"""From rows to a response's bytes. Large payloads are copied once: out of the model's output, into the message.

A serialised protobuf message followed by further serialised fields is the message with those fields set
(https://protobuf.dev/programming-guides/encoding, "Last One Wins" and concatenation), so the small fields are
serialised by protobuf and the images are appended as they lie in memory.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LENGTH_DELIMITED = 2  # protobuf wire type


def pack_field(head: bytes, number: int, entries: Sequence[Sequence[memoryview | bytes]]) -> bytes:
    """``head`` with the repeated bytes field ``number`` appended, one entry per element; its pieces are joined."""
    key = _varint(number << 3 | LENGTH_DELIMITED)
    pieces: list[memoryview | bytes] = [head]
    for entry in entries:
        pieces += (key, _varint(sum(len(piece) for piece in entry)), *entry)
    return b"".join(pieces)


def as_bytes(array: NDArray[Any]) -> memoryview:
    """The array's memory, row-major and little-endian, without a copy where it already is so."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.data.cast("B")


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """A grey PNG of uint8 (height, width)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def to_grid(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Digits (n, height, width) in near-square rows, left to right, the rest black: uint8 (rows, columns)."""
    count, height, width = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width), np.uint8)
    sheet[:count] = pixels
    return sheet.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
