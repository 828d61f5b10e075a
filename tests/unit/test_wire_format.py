"""What a request may become before it is parsed: many small fields are refused, few large ones are not."""

from __future__ import annotations

import time

import numpy as np
import pytest

from serve.api import digits_v1
from serve.api.open_inference_messages import BULK as TENSORS
from serve.api.wire_format import SMALL_BYTES, Bulk, check_size
from serve.errors import RequestError
from serve.pb.digits.v1 import digits_pb2 as digits
from serve.pb.inference import open_inference_pb2 as oip

Tensor = oip.ModelInferRequest.InferInputTensor
MUCH = 4 << 20


def refused(raw: bytes, bulk: Bulk) -> bool:
    try:
        check_size(raw, bulk)
    except RequestError:
        return True
    return False


def test_large_latents_are_taken_by_each_protocol() -> None:
    latents = np.zeros((4096, 100), "<f4")
    assert not refused(digits.GenerateRequest(latents=latents.tobytes(), labels=[3] * 4096).SerializeToString(), digits_v1.BULK)
    raw = oip.ModelInferRequest(inputs=[Tensor(name="latents", shape=latents.shape)], raw_input_contents=[latents.tobytes()])
    assert not refused(raw.SerializeToString(), TENSORS)
    contents = oip.InferTensorContents(fp32_contents=latents.ravel())
    assert not refused(oip.ModelInferRequest(inputs=[Tensor(contents=contents)]).SerializeToString(), TENSORS)


@pytest.mark.parametrize(
    ("raw", "bulk"),
    [
        (b"\x2a\x00" * (MUCH // 2), TENSORS),  # empty inputs
        (b"\x3a\x00" * (MUCH // 2), TENSORS),  # empty raw contents
        (b"\x32\x00" * (MUCH // 2), TENSORS),  # empty outputs
        (b"\x2a\x02\x2a\x00" * (MUCH // 4), TENSORS),  # inputs with empty contents
        (oip.ModelInferRequest(inputs=[Tensor(shape=[1] * MUCH)]).SerializeToString(), TENSORS),
        (digits.GenerateRequest(labels=[1] * MUCH).SerializeToString(), digits_v1.BULK),
        (digits.GenerateRequest(model="m" * MUCH).SerializeToString(), digits_v1.BULK),
        (b"\x33" * MUCH, digits_v1.BULK),  # groups within groups
        (b"\xff" * MUCH, digits_v1.BULK),  # a number without an end
        (b"\x0d" * MUCH, {}),  # numbers of 32 bits
    ],
    ids=["inputs", "raw", "outputs", "contents", "shape", "labels", "model", "groups", "varint", "fixed"],
)
def test_many_small_fields_are_refused_in_little_time(raw: bytes, bulk: Bulk) -> None:
    began = time.perf_counter()
    assert refused(raw, bulk)
    assert time.perf_counter() - began < 0.25
    assert not refused(raw[: SMALL_BYTES // 4], bulk), "a small one is for the parser"
