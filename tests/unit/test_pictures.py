"""A picture says how its digits were made, the same text for the same digits; what is read from one is bounded and checked."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve.pictures import MOST_TEXT_BYTES, Origin, Way, read_origin, to_png

PIXELS = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
HEAD_BYTES = 33  # the signature and the first chunk, IHDR
DIGEST = "0123456789abcdef" * 4
ONE = Origin("rpgan", 1, DIGEST, 2**64 - 1, 2**63 - 1, 1, (7,), 0.5)
PLAIN = to_png(PIXELS)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(kind: bytes, content: bytes) -> bytes:
    return PLAIN[:HEAD_BYTES] + chunk(kind, content) + PLAIN[HEAD_BYTES:]


def with_fields(**fields: Any) -> bytes:
    told = {"model": "rpgan", "version": 1, "digest": DIGEST, "count": 1, "seed": "7", "index": "0"} | fields
    return with_chunk(b"tEXt", b"digits\0" + json.dumps(told).encode())


def test_a_picture_with_its_origin_is_read_by_others_too() -> None:
    with Image.open(io.BytesIO(to_png(PIXELS, ONE))) as picture:
        assert np.array_equal(np.asarray(picture), PIXELS)
        assert picture.mode == "L"
        told = json.loads(picture.info["digits"])
    assert told == {
        "model": "rpgan", "version": 1, "digest": DIGEST, "count": 1, "seed": str(2**64 - 1), "index": str(2**63 - 1),
        "labels": [7], "truncation": 0.5,
    }, "64 bits as text"  # fmt: skip


@given(
    seed=st.none() | st.integers(0, 2**64 - 1),
    index=st.integers(0, 2**62),
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=9),
    truncation=st.sampled_from([0.0, 0.584, 2.5]),
    interpolated=st.booleans(),
)
def test_every_origin_comes_back(seed: int | None, index: int, labels: list[int], truncation: float, interpolated: bool) -> None:
    count, own = len(labels), tuple(labels) if labels[0] else ()
    way = Way(3, 5, count + 1, 1) if interpolated and seed is not None else None
    given_ = Origin("mlp", 9, DIGEST, seed, 0 if seed is None else index, count, own, truncation, way)
    png = to_png(PIXELS, given_)
    assert png == to_png(PIXELS, given_), "a tag stands for it"
    got = read_origin(png)
    for offset in range(count):
        assert got.digit(offset).text() == given_.digit(offset).text()
    assert got.text() == given_.text()


def test_one_digit_of_many_has_its_own_index_and_label() -> None:
    many = Origin("rpgan", 1, DIGEST, 7, 1000, 3, (4, 5, 6))
    assert many.digit(2) == Origin("rpgan", 1, DIGEST, 7, 1002, 1, (6,))
    assert Origin("rpgan", 1, DIGEST, 7, 0, 3, (4,), 0.0, Way(8, 0, 3)).digit(2).to == Way(8, 0, 3, 2)


def test_a_chunk_after_others_is_found_and_one_after_the_pixels_is_not_looked_for() -> None:
    origin_chunk = b"digits\0" + ONE.text().encode()
    png = with_chunk(b"tEXt", origin_chunk)
    later = png[:HEAD_BYTES] + chunk(b"gAMA", bytes(4)) + chunk(b"tEXt", b"Title\0x") + png[HEAD_BYTES:]
    assert read_origin(later) == ONE
    with pytest.raises(ValueError, match="no text chunk 'digits' before its pixels"):
        read_origin(PLAIN[:-12] + chunk(b"tEXt", origin_chunk) + PLAIN[-12:])


BOMB = zlib.compress(bytes(100 << 20))


@pytest.mark.parametrize(
    ("png", "text"),
    [
        (b"", "no PNG"),
        (b"GIF89a", "no PNG"),
        (PLAIN, "no text chunk"),
        (PLAIN[:HEAD_BYTES], "no text chunk"),
        (PLAIN[:HEAD_BYTES] + b"\xff\xff\xff\xfftEXtdigits\0", "4294967295 bytes, over"),
        (PLAIN[:HEAD_BYTES] + b"\xff\xff\xff\xffzTXtdigits\0", "no text chunk"),
        (with_chunk(b"tEXt", b"digits\0" + bytes(MOST_TEXT_BYTES)), "over 1048576"),
        (with_chunk(b"tEXt", b"digits\0" + b"[" * 900_000), "does not say how"),
        (with_chunk(b"zTXt", b"digits\0\0" + BOMB), "no text chunk"),
        (with_chunk(b"iTXt", b"digits\0\1\0\0\0" + BOMB), "no text chunk"),
        (with_chunk(b"tEXt", b"digits\0{}").replace(b"{}", b"[]"), "check sum"),
        (with_chunk(b"tEXt", b"digits\0\xff\xfe"), "does not say how"),
        (with_chunk(b"tEXt", b"digits\0[]"), "does not say how"),
        (with_chunk(b"tEXt", b"digits\0{}"), "does not say how"),
        (with_fields(more=1), "of a newer release"),
        (with_fields(seed=7), "does not say how"),
        (with_fields(seed="1_0"), "does not say how"),
        (with_fields(seed="-1"), "does not say how"),
        (with_fields(seed=str(2**64)), "does not say how"),
        (with_fields(index=str(2**63)), "does not say how"),
        (with_fields(version="1"), "does not say how"),
        (with_fields(version=True), "does not say how"),
        (with_fields(count=0), "does not say how"),
        (with_fields(count=10**400), "does not say how"),
        (with_fields(labels=[1, 2]), "does not say how"),
        (with_fields(labels=[-1]), "does not say how"),
        (with_fields(labels=["7"]), "does not say how"),
        (with_fields(labels=7), "does not say how"),
        (with_fields(truncation=-1), "does not say how"),
        (with_fields(truncation=10**400), "does not say how"),
        (with_fields(truncation=float("nan")), "does not say how"),
        (with_fields(model=""), "does not say how"),
        (with_fields(model="rpgan\x1b" * 100), "does not say how"),
        (with_fields(model=["rpgan"]), "does not say how"),
        (with_fields(model="rpgan\x1b[2J"), "does not say how"),
        (with_fields(digest="0\nerror: "), "does not say how"),
        # What comes first would be asked for again, each with a label.
        (with_fields(count=2, labels=[1, 2], to={"seed": "1", "index": "0", "steps": 2**32 - 1, "first": 2**31}), "not say how"),
        (with_fields(to={"seed": "1", "index": "0", "steps": 5, "first": 5}), "does not say how"),
        (with_fields(to={"seed": "1", "index": "0", "steps": 5, "more": 5}), "does not say how"),
        (with_fields(to=[]), "does not say how"),
    ],
)  # fmt: skip
def test_a_hostile_picture_is_an_error_in_one_line(png: bytes, text: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=text) as raised:
            read_origin(png)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200
    assert most < 16 << 20, "what is packed is not unpacked"


@given(st.binary(max_size=200), st.integers(0, 400))
def test_no_damage_to_a_picture_is_anything_but_an_error(noise: bytes, place: int) -> None:
    png = bytearray(to_png(PIXELS, ONE))
    png[place : place + len(noise)] = noise
    try:
        read_origin(bytes(png))
    except ValueError:
        return
