"""Responses put together by hand are what protobuf would have made of them."""

from __future__ import annotations

import io
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve.api import digits_v1, encoding
from serve.api.digits_v1 import IMAGES_KEY
from serve.api.encoding import as_bytes, field_key, pack_field, packed_varints
from serve.core.request import Addresses, Digits
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.inference import open_inference_pb2
from serve.pictures import to_grid, to_png
from tests.waiting import wait_until


@given(entries=st.lists(st.lists(st.binary(max_size=300), max_size=3), max_size=5))
def test_packed_entries_parse_as_the_repeated_field(entries: list[list[bytes]]) -> None:
    head = pb.GenerateResponse(model="dcgan", version=3, seed=0, count=9)
    packed = pb.GenerateResponse.FromString(pack_field(head.SerializeToString(), IMAGES_KEY, entries))
    head.images.extend(b"".join(pieces) for pieces in entries)
    assert packed == head


def test_a_slice_of_the_output_is_taken_as_it_lies() -> None:
    rows = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    view = as_bytes(rows[1:])
    assert bytes(view) == rows[1:].tobytes()
    rows[1, 0, 0] = 99
    assert view[0] == 99, "a copy was made"


def test_floats_are_little_endian_whatever_the_array_is() -> None:
    big = np.array([1.0, 0.5], ">f4")
    assert bytes(as_bytes(big)) == np.array([1.0, 0.5], "<f4").tobytes()


def test_png_gives_the_pixels_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    with Image.open(io.BytesIO(to_png(pixels))) as picture:
        assert picture.mode == "L"
        assert np.array_equal(np.asarray(picture), pixels)


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (25, 5, 5), (26, 5, 6)])
def test_grid_is_near_square_and_in_order(count: int, rows: int, columns: int) -> None:
    pixels = np.random.default_rng(1).integers(1, 256, (count, 28, 28), np.uint8)
    sheet = to_grid(pixels)
    assert sheet.shape == (rows * 28, columns * 28)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        cell = sheet[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28]
        assert np.array_equal(cell, pixels[index]) if index < count else not cell.any()


@given(st.lists(st.integers(0, 16_383), max_size=300))
def test_packed_numbers_are_protobufs_own(values: list[int]) -> None:
    contents = open_inference_pb2.InferTensorContents(uint_contents=values)
    field = field_key(open_inference_pb2.InferTensorContents, "uint_contents")
    packed = packed_varints(np.array(values, np.int64))
    if values:
        assert pack_field(b"", field, [[packed]]) == contents.SerializeToString()
    assert list(open_inference_pb2.InferTensorContents.FromString(pack_field(b"", field, [[packed]])).uint_contents) == values


@pytest.mark.parametrize("rows", [4096, 1024, 8])
def test_large_answers_are_what_the_pieces_joined_are(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a few pieces they are copied without the interpreter's lock, in many by ``bytes.join``."""
    made: list[int] = []
    honest = encoding._new_bytes
    monkeypatch.setattr(encoding, "_new_bytes", lambda *given: made.append(given[1]) or honest(*given))
    pixels = [np.random.default_rng(seed).integers(0, 256, (rows, 28, 28), np.uint8) for seed in range(4096 // rows)]
    entry: list[memoryview | bytes] = [*map(as_bytes, pixels), b""]
    head = pb.GenerateResponse(model="mlp", seed=7, count=4096).SerializeToString()
    packed = pack_field(head, IMAGES_KEY, [entry])
    assert made == ([len(packed)] if rows > 8 else [])
    got = pb.GenerateResponse.FromString(packed)
    assert got.images == [np.concatenate(pixels).tobytes()]
    assert (got.model, got.seed, got.count) == ("mlp", 7, 4096)


def test_a_large_answer_is_copied_without_the_interpreters_lock() -> None:
    """``bytes.join`` keeps it where a piece is a memoryview."""
    size = 64 << 20  # so that it takes far longer than it takes a thread to wake up
    piece, ticks, stop = memoryview(bytearray(size)), [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.0005):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(30.0)  # nobody is made to give it away
    thread.start()
    try:
        wait_until(lambda: ticks[0])
        before = ticks[0]
        packed = pack_field(b"", IMAGES_KEY, [[piece]])
        assert ticks[0] > before
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert len(packed) > size


@pytest.mark.parametrize("count", [1, 64, 65, 4096])
def test_labels_are_on_the_wire_as_protobuf_puts_them_there(count: int) -> None:
    labels = np.random.default_rng(count).integers(0, 1000, count)
    manifest = SimpleNamespace(name="rpgan", version=1, height=28, width=28)
    digits = Digits(
        model=SimpleNamespace(manifest=manifest, bundle=SimpleNamespace(digest="")),  # type: ignore[arg-type]
        rows=Addresses(3, 5, count), encoding="uint8", seed=3, start=5, count=count, images=(), labels=labels,
        pixels=[np.zeros((count, 28, 28), np.uint8)], queued_at=0.0, queue_seconds=0.5, wait_seconds=0.5, compute_seconds=0.25,
    )  # fmt: skip
    raw = digits_v1._encode(pb.GenerateRequest(), digits)
    answer = pb.GenerateResponse.FromString(raw)
    assert list(answer.labels) == labels.tolist()
    alone = pb.GenerateResponse(seed=3, start=5, count=count, labels=labels.tolist()).SerializeToString()
    assert alone in raw, "same bytes, whoever packed them"
