"""What a request may become is bounded before it is parsed: by the bytes of fields that are not cheap, and by their number."""

from __future__ import annotations

import struct
import time

import pytest

from serve.api.digits_v1 import BULK as GENERATE_BULK
from serve.api.open_inference_messages import BULK as INFER_BULK
from serve.api.wire_format import FIELD_BYTES, SMALL_BYTES, check_size
from serve.errors import RequestError
from serve.pb.digits.v1 import digits_pb2 as digits
from serve.pb.inference import open_inference_pb2 as inference

MUCH = 4 * SMALL_BYTES


def infer(*, raw: bytes = b"", floats: int = 0, integers: int = 0) -> bytes:
    request = inference.ModelInferRequest(model_name="mlp", raw_input_contents=[raw] if raw else [])
    tensor = request.inputs.add(name="latents", datatype="FP32", shape=[1, 64])
    tensor.contents.fp32_contents.extend([0.5] * floats)
    tensor.contents.int_contents.extend([1] * integers)
    return request.SerializeToString()


TAKEN = {
    "a small request": (digits.GenerateRequest(model="mlp", count=3, labels=[1] * 4096).SerializeToString(), GENERATE_BULK),
    "latents": (digits.GenerateRequest(latents=bytes(MUCH)).SerializeToString(), GENERATE_BULK),
    "raw tensors": (infer(raw=bytes(MUCH)), INFER_BULK),
    "typed floats": (infer(floats=MUCH), INFER_BULK),
}
EMPTY_INPUT = b"\x2a\0"  # field 5, of no length
REFUSED = {
    "labels": (digits.GenerateRequest(labels=[1] * MUCH).SerializeToString(), GENERATE_BULK),
    "a long name": (digits.GenerateRequest(model="x" * MUCH).SerializeToString(), GENERATE_BULK),
    "latents of a request that has none": (digits.GenerateRequest(latents=bytes(MUCH)).SerializeToString(), {}),
    "typed integers within a tensor": (infer(integers=MUCH), INFER_BULK),
    "a name within a tensor": (b"\x2a" + b"\x86\x80\x10" + b"\x0a\x82\x80\x10" + bytes((1 << 18) + 2), INFER_BULK),
    "empty tensors": (EMPTY_INPUT * (SMALL_BYTES // 2 + 1), INFER_BULK),
    "empty raw tensors": (b"\x3a\0" * (SMALL_BYTES // 2 + 1), INFER_BULK),
    "numbers, one by one": (b"\x20\x01" * (SMALL_BYTES // 2 + 1), GENERATE_BULK),
    "few bytes of many numbers, beside latents": (
        TAKEN["latents"][0] + b"\x20\x01" * (SMALL_BYTES // FIELD_BYTES + 1),
        GENERATE_BULK,
    ),
    "fixed numbers of unknown fields": ((b"\xf9\x7f" + struct.pack("<d", 1.0)) * (SMALL_BYTES // 8), GENERATE_BULK),
    "groups": (b"\xfb\x7f" * SMALL_BYTES, GENERATE_BULK),
    "a number that does not end": (b"\x08" + b"\xff" * MUCH, GENERATE_BULK),
}


def test_the_fields_are_those_of_the_messages() -> None:
    assert inference.ModelInferRequest.FromString(EMPTY_INPUT * 3).inputs == [inference.ModelInferRequest.InferInputTensor()] * 3
    assert inference.ModelInferRequest.FromString(b"\x3a\0").raw_input_contents == [b""]


@pytest.mark.parametrize("what", TAKEN)
def test_what_is_cheap_to_parse_is_taken_at_any_length(what: str) -> None:
    check_size(*TAKEN[what])


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_become_many_objects_is_refused(what: str) -> None:
    began = time.thread_time()
    with pytest.raises(RequestError, match=str(SMALL_BYTES)):
        check_size(*REFUSED[what])
    assert time.thread_time() - began < 0.25, "in little time"
