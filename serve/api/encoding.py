"""From rows to a response's bytes. Large payloads are copied once: out of the model's output, into the message.

A serialised protobuf message followed by further serialised fields is the message with those fields set
(https://protobuf.dev/programming-guides/encoding, "Last One Wins" and concatenation), so the small fields are
serialised by protobuf and the rows are appended as they lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTH_DELIMITED = 2  # protobuf wire type

Piece = memoryview | bytes


def pack_field(head: bytes, number: int, entries: Sequence[Sequence[Piece]]) -> bytes:
    """``head`` with the field ``number``, of bytes or messages, appended, one entry per element; its pieces are joined."""
    key = _varint(number << 3 | LENGTH_DELIMITED)
    pieces: list[Piece] = [head]
    for entry in entries:
        pieces += (key, _varint(sum(len(piece) for piece in entry)), *entry)
    return b"".join(pieces)


def as_bytes(array: NDArray[Any]) -> memoryview:
    """The array's memory, row-major and little-endian, without a copy where it already is so."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.data.cast("B")


def packed_varints(values: NDArray[Any]) -> bytes:
    """Whole numbers from 0 to 16,383 as a packed repeated field holds them: low seven bits first, one or two bytes each."""
    flat = values.ravel().astype(np.uint16)
    two = flat > 0x7F
    ends = np.cumsum(two, dtype=np.int64) + np.arange(1, len(flat) + 1)
    out = np.zeros(int(ends[-1]) if len(flat) else 0, np.uint8)
    starts = ends - 1 - two
    out[starts] = flat & 0x7F | two << 7
    out[ends[two] - 1] = flat[two] >> 7
    return out.tobytes()


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
