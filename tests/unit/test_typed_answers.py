"""Open Inference answers with typed contents: what protobuf would have made, and large ones not on the event loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from serve.api import open_inference_messages
from serve.core.request import Addresses, Digits
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle
from serve.pb.inference import open_inference_pb2 as pb

CDCGAN = read_bundle(BUNDLED_DIR / "cdcgan" / "1")


def digits_of(count: int) -> Digits:
    chance = np.random.default_rng(count)
    pieces = [chance.integers(0, 256, (part, 28, 28), dtype=np.uint8) for part in (count // 2, count - count // 2)]
    model = cast(Any, SimpleNamespace(manifest=CDCGAN.manifest))
    return Digits(
        model=model, rows=Addresses(7, 0, count), encoding="uint8", seed=7, start=0, count=count, pixels=pieces,
        images=[chance.random((count, 1, 28, 28), dtype=np.float32)], labels=chance.integers(0, 10, count),
        queued_at=0.0, queue_seconds=0.0, wait_seconds=0.0, compute_seconds=0.0,
    )  # fmt: skip


def request_for(*names: str) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="cdcgan")
    for name in names:
        request.outputs.add(name=name)
    return request


@pytest.mark.parametrize("count", [2, 300])
def test_typed_contents_hold_the_values(count: int) -> None:
    digits = digits_of(count)
    answer = pb.ModelInferResponse.FromString(open_inference_messages.encode(request_for("labels", "pixels", "images"), digits))
    assert [output.name for output in answer.outputs] == ["labels", "pixels", "images"]
    labels, pixels, images = answer.outputs
    assert digits.labels is not None
    assert list(labels.contents.int64_contents) == digits.labels.tolist()
    assert list(pixels.contents.uint_contents) == np.concatenate(digits.pixels).ravel().tolist()
    assert np.array_equal(np.array(images.contents.fp32_contents, np.float32), digits.images[0].ravel())
    assert (list(pixels.shape), list(images.shape)) == ([count, 28, 28], [count, 1, 28, 28])
    assert not answer.raw_output_contents


def test_large_answers_are_left_to_the_workers() -> None:
    """Issue: a typed answer of 4,096 digits held the event loop for 108 ms."""
    raw = request_for("pixels")
    raw.raw_input_contents.append(b"")
    assert open_inference_messages.takes_long(request_for("pixels"), digits_of(300))
    assert open_inference_messages.takes_long(raw, digits_of(4096))
    assert not open_inference_messages.takes_long(raw, digits_of(300))
    assert not open_inference_messages.takes_long(request_for("pixels"), digits_of(2))


@pytest.mark.parametrize("count", [1, 31, 32, 5000])
def test_typed_floats_are_read_as_they_are_whatever_lies_beside_them(count: int) -> None:
    values = np.random.default_rng(count).random(count, dtype=np.float32)
    contents = pb.InferTensorContents(fp32_contents=values)
    assert np.array_equal(open_inference_messages._typed(contents, "fp32_contents", "<f4"), values)
    contents.fp64_contents.append(1.0)
    assert np.array_equal(open_inference_messages._typed(contents, "fp32_contents", "<f4"), values)
