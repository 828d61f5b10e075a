"""Encodes rows as a response's bytes, and as pictures that say how they were made.

Large payloads are copied once: from the model's output into the message.

A serialised protobuf message followed by further serialised fields is the message with those fields set
(https://protobuf.dev/programming-guides/encoding, "Last One Wins" and concatenation). So the small fields are
serialised by protobuf, and the rows are appended as they are in memory.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from serve.core.request import Addresses, Digits, Interpolation
from serve.pictures import Origin, Way, to_grid, to_png

FIXED_64, LENGTH_DELIMITED = 1, 2  # protobuf wire types
LITTLE_ENDIAN = sys.byteorder == "little"

MUCH_BYTES = 1 << 20  # from so many on ``bytes.join`` lets go of the lock as well, where all pieces are bytes
LEAST_PIECE_BYTES = 1 << 16  # at the mean

# New bytes without content: whoever makes them may write them before anybody else sees them (Python/C API, "Bytes Objects").
_new_bytes = ctypes.PyDLL(None).PyBytes_FromStringAndSize
_new_bytes.argtypes, _new_bytes.restype = (ctypes.c_char_p, ctypes.c_ssize_t), ctypes.py_object

Piece = memoryview | bytes


def field_key(message: type[Message], name: str) -> bytes:
    """What comes before each entry of a message's field of bytes or messages."""
    return _varint(message.DESCRIPTOR.fields_by_name[name].number << 3 | LENGTH_DELIMITED)


def pack_field(head: bytes, key: bytes, entries: Sequence[Sequence[Piece]]) -> bytes:
    """``head`` with a field of bytes or messages appended, one entry per element; its pieces are joined."""
    pieces: list[Piece] = [head]
    total = 0
    for entry in entries:
        size = sum(map(len, entry))
        total += size
        pieces += (key, _varint(size), *entry)
    if total < MUCH_BYTES or total < len(pieces) * LEAST_PIECE_BYTES:
        return b"".join(pieces)
    return _joined_unlocked(list(filter(None, pieces)))


def _joined_unlocked(pieces: Sequence[Piece]) -> bytes:
    """As ``bytes.join``, which keeps the interpreter's lock where a piece is a memoryview; for many pieces it is slower."""
    joined: bytes = _new_bytes(None, sum(len(piece) for piece in pieces))
    to = _address(joined)
    for piece in pieces:
        ctypes.memmove(to, _address(piece), len(piece))
        to += len(piece)
    return joined


def _address(piece: Piece) -> int:
    return int(np.frombuffer(piece, np.uint8).__array_interface__["data"][0])


def as_bytes(array: NDArray[Any]) -> memoryview:
    """The array's memory, row-major and little-endian, without a copy where it already is so."""
    if not (LITTLE_ENDIAN and array.dtype.isnative and array.flags.c_contiguous):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return array.data.cast("B")


def packed_varints(values: NDArray[Any]) -> bytes:
    """Whole numbers from 0 to 16,383 as a packed repeated field holds them: low seven bits first, one or two bytes each."""
    flat = values.ravel().astype(np.uint16)
    two = flat > 0x7F
    if not two.any():
        return flat.astype(np.uint8).tobytes()
    ends = np.cumsum(two, dtype=np.int64) + np.arange(1, len(flat) + 1)
    out = np.zeros(int(ends[-1]) if len(flat) else 0, np.uint8)
    starts = ends - 1 - two
    out[starts] = flat & 0x7F | two << 7
    out[ends[two] - 1] = flat[two] >> 7
    return out.tobytes()


def as_png_grid(digits: Digits) -> bytes:
    """All digits in one PNG."""
    return to_png(to_grid(digits.joined_pixels), _origin(digits))


def as_pngs(digits: Digits) -> list[bytes]:
    """A PNG of each digit."""
    origin = _origin(digits)
    return [to_png(digit, origin.digit(offset)) for offset, digit in enumerate(digits.joined_pixels)]


def _origin(digits: Digits) -> Origin:
    manifest, rows = digits.model.manifest, digits.rows
    seed, index, truncation, way = digits.seed, digits.start, 0.0, None
    if isinstance(rows, Addresses):
        truncation = rows.truncation
    elif isinstance(rows, Interpolation):
        (seed, index), truncation, way = rows.begin, rows.truncation, Way(*rows.end, steps=rows.steps)
    labels = () if digits.labels is None else tuple(digits.labels.tolist())
    made_by = manifest.name, manifest.version, digits.model.bundle.digest
    return Origin(*made_by, seed, index, digits.count, labels, truncation, way)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
