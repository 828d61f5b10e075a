"""Bounds what a protobuf message may become before it is parsed: two bytes of an empty sub-message are an object of hundreds.

(https://protobuf.dev/programming-guides/encoding)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, Union

from serve.errors import RequestError

# Field number → None where the field is bytes or packed fixed-size numbers, which are cheap whatever their length; or the same of
# a sub-message.
Bulk: TypeAlias = Mapping[int, Union["Bulk", None]]

SMALL_BYTES = 64 << 10  # of fields that are not bulk, in one request; 4,096 labels take 8 to 40 KiB
FIELD_BYTES = 16  # what a field counts as, at least: it is an object, however short
VARINT, FIXED_64, LENGTH_DELIMITED, FIXED_32 = 0, 1, 2, 5


def check_size(raw: bytes, bulk: Bulk) -> None:
    """Raises RequestError for a request with more in fields that are not ``bulk`` than ``SMALL_BYTES``."""
    if len(raw) > SMALL_BYTES and _counted(memoryview(raw), bulk, 0) > SMALL_BYTES:
        raise RequestError(
            f"the request has more than {SMALL_BYTES} bytes in fields other than tensors of raw or float values", "", SMALL_BYTES
        )


def _counted(raw: memoryview, bulk: Bulk, counted: int) -> int:
    """The bytes of all but bulk fields, added to ``counted``; ends early beyond ``SMALL_BYTES``."""
    at, end = 0, len(raw)
    while at < end and counted <= SMALL_BYTES:
        begin = at
        key, at = _varint(raw, at)
        kind, inner = key & 7, bulk.get(key >> 3, ...)
        if kind == VARINT:
            _, at = _varint(raw, at)
        elif kind == LENGTH_DELIMITED:
            size, at = _varint(raw, at)
            if inner is None:
                counted += FIELD_BYTES
            elif inner is not ...:
                counted = _counted(raw[at : at + size], inner, counted + FIELD_BYTES)
            at += size
        else:
            at += {FIXED_64: 8, FIXED_32: 4}.get(kind, end)
        if kind != LENGTH_DELIMITED or inner is ...:
            counted += max(FIELD_BYTES, at - begin)
    return counted


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    """A number and where it ends; of one that is cut off, or too long, the end of the message."""
    value = shift = 0
    while at < len(raw) and shift < 64:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    return 0, len(raw)
