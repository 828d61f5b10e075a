"""Digits as PNG pictures: one per digit, or a grid of all. A picture says how its digits were made, in a text chunk.

The chunk is PNG's ``tEXt`` with the keyword ``digits`` (https://www.w3.org/TR/png-3/#11tEXt); its text is JSON, the same for the
same digits. Seeds and indices are decimal text in it: JavaScript has no whole numbers of 64 bits. For the client too, which is
installed without an imaging library.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY_8_BIT = bytes([8, 0, 0, 0, 0])  # bits a sample, colour type, compression, filter method, no interlace
KEYWORD = b"digits\0"
MOST_TEXT_BYTES = 1 << 20  # of the chunk that is read; labels of 64 MiB of digits take a third of it
MOST_HEAD_BYTES = 2 << 20  # of a picture, in which the chunk is looked for
MOST_TRUNCATION = 1e30
MOST_DIGITS = 1 << 20  # that a server can be told to make in one answer (--max-count)
LIMITS = {"version": 1 << 63, "seed": 1 << 64, "index": 1 << 63, **dict.fromkeys(("count", "steps", "first"), MOST_DIGITS + 1)}
TEXTS, NUMBERS = {"model", "digest"}, {"version", "count", "steps", "first"}
REQUIRED, OPTIONAL = {"model", "version", "digest", "count"}, {"seed", "index", "labels", "truncation", "to"}


@dataclass(frozen=True)
class Way:
    """The rest of an interpolation, which begins at a picture's address: its other end, its steps, and which comes first here."""

    seed: int
    index: int
    steps: int
    first: int = 0


@dataclass(frozen=True)
class Origin:
    """How the digits of a picture were made: ``count`` of ``seed``'s stream, from ``index`` on, or on the way ``to`` another.

    ``seed`` is None for those that have no address. ``digest`` is the model file's SHA-256. ``labels`` are one for all digits or
    one for each; none of an unconditional model.
    """

    model: str
    version: int
    digest: str
    seed: int | None
    index: int
    count: int
    labels: tuple[int, ...] = ()
    truncation: float = 0.0
    to: Way | None = None

    def digit(self, offset: int) -> Origin:
        """That of one of the digits alone."""
        labels = self.labels if len(self.labels) < 2 else self.labels[offset : offset + 1]
        if self.to is not None:
            return replace(self, count=1, labels=labels, to=replace(self.to, first=self.to.first + offset))
        return replace(self, index=self.index + offset, count=1, labels=labels)

    def text(self) -> str:
        """As the chunk has it."""
        fields: dict[str, Any] = {"model": self.model, "version": self.version, "digest": self.digest, "count": self.count}
        if self.seed is not None:
            fields |= {"seed": str(self.seed), "index": str(self.index)}
        if self.labels:
            fields["labels"] = self.labels[:1] if len(set(self.labels)) == 1 else self.labels
        if self.truncation:
            fields["truncation"] = self.truncation
        if self.to is not None:
            fields["to"] = asdict(self.to) | {"seed": str(self.to.seed), "index": str(self.to.index)}
        return json.dumps(fields, separators=(",", ":"))


def to_png(pixels: NDArray[np.uint8], origin: Origin | None = None) -> bytes:
    """A grey PNG of uint8 (height, width), with its digits' origin if that is given: PNG specification, third edition."""
    height, width = pixels.shape
    lines = np.zeros((height, 1 + width), np.uint8)  # each begins with its filter's number: 0, none
    lines[:, 1:] = pixels
    told = [] if origin is None else [_chunk(b"tEXt", KEYWORD + origin.text().encode("ascii"))]
    chunks = [
        _chunk(b"IHDR", struct.pack(">II", width, height) + GREY_8_BIT),
        *told,
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


def read_origin(png: bytes) -> Origin:
    """The origin in a picture. Only its first ``MOST_HEAD_BYTES`` are looked at. Raises ValueError in one line."""
    text = _chunk_text(png[:MOST_HEAD_BYTES])
    try:
        return _origin(json.loads(text, parse_constant=_refused))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("its chunk does not say how its digits were made: it is damaged, or of a newer release") from None


def read_pixels(png: bytes, height: int, width: int) -> NDArray[np.uint8] | None:
    """The pixels (height, width) of a picture that ``to_png`` wrote; None for one of another size, or by another program."""
    packed = []
    for kind, place, size in _chunks(png):
        if kind == b"IHDR" and png[place : place + size] != struct.pack(">II", width, height) + GREY_8_BIT:
            return None
        if kind == b"IDAT":
            packed.append(png[place : place + size])
    try:
        lines = zlib.decompressobj().decompress(b"".join(packed), height * (1 + width) + 1)  # no more than that: it may be a bomb
    except zlib.error:
        return None
    if len(lines) != height * (1 + width):
        return None
    pixels = np.frombuffer(lines, np.uint8).reshape(height, 1 + width)
    return None if pixels[:, 0].any() else pixels[:, 1:]  # another program's lines are filtered


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _chunk_text(png: bytes) -> bytes:
    if not png.startswith(SIGNATURE):
        raise ValueError("it is no PNG picture")
    for kind, place, size in _chunks(png):
        if kind == b"IDAT":
            break
        if kind == b"tEXt" and png.startswith(KEYWORD, place):
            if size > MOST_TEXT_BYTES:
                raise ValueError(f"its chunk has {size} bytes, over {MOST_TEXT_BYTES}")
            content = png[place : place + size]
            if _chunk(kind, content)[8 + size :] != png[place + size : place + size + 4]:
                raise ValueError("its chunk is damaged: the check sum is another")
            return content[len(KEYWORD) :]
    raise ValueError("it does not say how its digits were made: it has no text chunk 'digits' before its pixels")


def _chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk, the place of its content, and its size as it says."""
    place = len(SIGNATURE)
    while place + 8 <= len(png):
        size, kind = struct.unpack_from(">I4s", png, place)
        yield kind, place + 8, size
        place += 12 + size


def _refused(constant: str) -> float:
    raise ValueError(constant)  # NaN and its like, which are no JSON


def _origin(fields: Mapping[str, Any]) -> Origin:
    """Raises ValueError, KeyError, TypeError or AttributeError for what is no origin."""
    if not fields.keys() >= REQUIRED or fields.keys() - REQUIRED - OPTIONAL or ("seed" in fields) != ("index" in fields):
        raise ValueError(fields.keys())
    way = None
    if "to" in fields:
        ends = fields["to"]
        way = Way(**{name: _number(name, ends[name]) for name in ends})
        if "seed" not in fields or way.steps < 2 or way.first + fields["count"] > way.steps:
            raise ValueError(way)
    numbers = {name: _number(name, fields[name]) for name in ("version", "count", "seed", "index") if name in fields}
    labels, truncation = fields.get("labels", []), fields.get("truncation", 0.0)
    known = all(type(label) is int and 0 <= label < 1 << 32 for label in labels) and len(labels) in (0, 1, numbers["count"])
    sane = type(truncation) in (int, float) and 0 <= truncation < MOST_TRUNCATION
    if not (known and sane and numbers["count"] and numbers["version"]):
        raise ValueError(fields)
    for name in TEXTS:
        text = fields[name]  # which is printed
        if not (text.isascii() and text.isprintable() and 0 < len(text) <= 64):
            raise ValueError(name)
    return Origin(
        fields["model"], numbers["version"], fields["digest"], numbers.get("seed"), numbers.get("index", 0), numbers["count"],
        tuple(labels), float(truncation), way,
    )  # fmt: skip


def _number(name: str, value: Any) -> int:
    if type(value) is not (int if name in NUMBERS else str):
        raise TypeError(name)
    if type(value) is str and not (value.isascii() and value.isdecimal() and len(value) <= 20):
        raise ValueError(name)
    number = int(value)
    if not 0 <= number < LIMITS[name]:
        raise ValueError(name)
    return number
