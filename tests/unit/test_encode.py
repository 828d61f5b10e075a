"""Responses put together by hand are what protobuf would have made of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serve.api.digits_v1 import IMAGES_KEY
from serve.api.encoding import as_bytes, field_key, pack_field, packed_varints
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.inference import open_inference_pb2
from serve.pictures import to_grid, to_png


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
