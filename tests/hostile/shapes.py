"""Requests of every method and every shape: each field that can grow, grown to a size on the wire; and some made by chance."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from serve.pb.digits.v1 import digits_pb2
from serve.pb.inference import open_inference_pb2 as inference_pb2

MOST_BYTES = (4 << 20) - 64  # just under the server's limit
VARINT, FIXED_64, LENGTH, GROUP, FIXED_32 = 0, 1, 2, 3, 5
GENERATE, STREAM = "/digits.v1.DigitGenerator/Generate", "/digits.v1.DigitGenerator/GenerateStream"
INTERPOLATE = "/digits.v1.DigitGenerator/Interpolate"
INFER, STREAM_INFER = "/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer"
UNKNOWN_FIELD = 4095
Type = FieldDescriptor


@dataclass(frozen=True)
class Shape:
    """A kind of request: ``make`` gives its bytes, as long as asked or as long as it can be."""

    what: str
    method: str
    make: Callable[[int], bytes]


def methods() -> Iterator[MethodDescriptor]:
    """Every method that an anonymous caller reaches."""
    for module in (digits_pb2, inference_pb2, health_pb2, reflection_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from service.methods


def every_shape() -> Iterator[Shape]:
    """The named ones, then each field that can grow of each method."""
    yield from named()
    for method in methods():
        path = f"/{method.containing_service.full_name}/{method.name}"
        for what, make in _growing(method.input_type):
            yield Shape(f"{method.name}: {what}", path, make)


def named() -> list[Shape]:
    """The requests that were found by hand to hold others up, or that are as large as is allowed."""
    infer = inference_pb2.ModelInferRequest
    empty_input, empty_output = _key(infer, "inputs") + b"\0", _key(infer, "outputs") + b"\0"
    return [
        Shape("Generate: one digit, to compare with", GENERATE, lambda _: generate_request(1)),
        Shape("ModelInfer: empty inputs", INFER, partial(_filled, empty_input)),
        Shape("ModelInfer: empty outputs", INFER, partial(_filled, empty_output)),
        Shape("ModelInfer: parameters", INFER, _parameters),
        Shape("ModelStreamInfer: empty inputs", STREAM_INFER, partial(_filled, empty_input)),
        Shape("Generate: labels for one digit", GENERATE, partial(_labels, digits_pb2.GenerateRequest)),
        Shape("GenerateStream: labels", STREAM, partial(_labels, digits_pb2.GenerateStreamRequest)),
        Shape("Interpolate: 4096 steps", INTERPOLATE, lambda _: _interpolation(4096)),
        Shape("Generate: 4096 digits", GENERATE, lambda _: generate_request(4096)),
        Shape("Generate: latents for 4096 digits", GENERATE, lambda _: _latents(4096 * 256)),
        Shape("Generate: latents of 4 MiB", GENERATE, _latents),
        Shape("ModelInfer: typed latents for 4096 digits", INFER, lambda _: infer_latents(4096, raw=False)),
        Shape("ModelInfer: raw latents for 4096 digits", INFER, lambda _: infer_latents(4096, raw=True)),
        Shape("ModelInfer: 4096 digits with typed pixels", INFER, lambda _: infer_count(4096, raw=False)),
        Shape("Generate: groups within groups", GENERATE, partial(_filled, _tag(UNKNOWN_FIELD, GROUP))),
        Shape("Generate: unknown fields", GENERATE, partial(_filled, _tag(UNKNOWN_FIELD, VARINT) + b"\0")),
    ]


def random_shapes(number: int, chance: random.Random) -> Iterator[Shape]:
    """Mixtures: some of a method's growing fields together, of sizes by chance, and now and then a byte that is wrong."""
    kinds = [(method, list(_growing(method.input_type))) for method in methods()]
    kinds = [(method, growing) for method, growing in kinds if growing]
    for turn in range(number):
        method, growing = chance.choice(kinds)
        picked = chance.sample(growing, chance.randint(1, min(3, len(growing))))
        size = int(MOST_BYTES ** chance.uniform(0.5, 1.0)) // len(picked)
        flip = chance.random() if chance.random() < 0.3 else None
        what = f"chance {turn}, {method.name}: " + " and ".join(what for what, _ in picked)
        path = f"/{method.containing_service.full_name}/{method.name}"
        yield Shape(what, path, partial(_mixed, [make for _, make in picked], size, flip))


def generate_request(count: int, image_format: digits_pb2.ImageFormat = digits_pb2.IMAGE_FORMAT_UINT8) -> bytes:
    return digits_pb2.GenerateRequest(model="mlp", count=count, seed=1, format=image_format).SerializeToString()


def stream_labels(labels: int) -> bytes:
    """A stream of one digit after another, of a model that takes labels."""
    request = digits_pb2.GenerateStreamRequest(model="cdcgan", count=1 << 40, chunk=256).SerializeToString()
    return request + _length_delimited(_key(digits_pb2.GenerateStreamRequest, "labels"), b"\1" * labels)


def infer_count(count: int, *, raw: bool, output: str = "pixels") -> bytes:
    """A ModelInfer request for digits by seed and count."""
    request = inference_pb2.ModelInferRequest(model_name="mlp")
    request.outputs.add(name=output)
    for name, datatype, value in (("seed", "UINT64", 1), ("count", "INT32", count)):
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[1])
        if raw:
            request.raw_input_contents.append(struct.pack("<Q" if datatype == "UINT64" else "<i", value))
        elif datatype == "UINT64":
            tensor.contents.uint64_contents.append(value)
        else:
            tensor.contents.int_contents.append(value)
    return request.SerializeToString()


def infer_latents(count: int, *, raw: bool) -> bytes:
    """A ModelInfer request for the digits of so many latents, (count, 64) float32."""
    request = inference_pb2.ModelInferRequest(model_name="mlp")
    tensor = request.inputs.add(name="latents", datatype="FP32", shape=[count, 64])
    values = np.full(count * 64, 0.5, "<f4")
    if raw:
        request.raw_input_contents.append(values.tobytes())
    else:
        tensor.contents.fp32_contents.extend(values.tolist())
    return request.SerializeToString()


def _interpolation(steps: int) -> bytes:
    ends = [digits_pb2.Address(seed=1, index=index) for index in (0, 1)]
    return digits_pb2.InterpolateRequest(model="mlp", begin=ends[0], end=ends[1], steps=steps).SerializeToString()


def _latents(size: int) -> bytes:
    return digits_pb2.GenerateRequest(model="mlp", latents=bytes(size // 256 * 256)).SerializeToString()


def _labels(message: Any, size: int) -> bytes:
    head = message(model="cdcgan", count=1, seed=1).SerializeToString()
    return bytes(head) + _length_delimited(_key(message, "labels"), b"\1" * (size - len(head) - 8))


def _parameters(size: int) -> bytes:
    """Entries with names of their own: a map makes one of those that are alike."""
    key = _key(inference_pb2.ModelInferRequest, "parameters")
    entries = (_length_delimited(key, b"\x0a\x08%08d" % number) for number in range(min(200_000, size // 12)))
    return b"".join(entries)


def _growing(message: Descriptor, depth: int = 0) -> Iterator[tuple[str, Callable[[int], bytes]]]:
    """What of a message can grow: a name for it, and what makes it so many bytes long."""
    for field in message.fields:
        numbers = field.number
        if field.message_type is not None:
            yield f"{field.name} × empty", partial(_filled, _tag(numbers, LENGTH) + b"\0")
            if field.message_type.GetOptions().map_entry:
                yield f"{field.name} × distinct", partial(_distinct, numbers)
            for what, make in _growing(field.message_type, depth + 1) if depth < 2 else ():
                yield f"{field.name}.{what}", partial(_within, numbers, make)
                if field.is_repeated:
                    yield f"{field.name} × ({what} once)", partial(_each_with, numbers, make)
        elif field.type in (Type.TYPE_STRING, Type.TYPE_BYTES):
            yield f"{field.name} long", partial(_within, numbers, bytes)
            if field.is_repeated:
                yield f"{field.name} × empty", partial(_filled, _tag(numbers, LENGTH) + b"\0")
        elif field.is_repeated:
            yield f"{field.name} packed", partial(_within, numbers, lambda size: bytes(size // 8 * 8))
            if field.type not in (Type.TYPE_FLOAT, Type.TYPE_DOUBLE):
                yield f"{field.name} one by one", partial(_filled, _tag(numbers, VARINT) + b"\1")


def _filled(piece: bytes, size: int) -> bytes:
    return piece * (size // len(piece))


def _within(number: int, make: Callable[[int], bytes], size: int) -> bytes:
    return _length_delimited(_tag(number, LENGTH), make(max(0, size - 10)))


def _each_with(number: int, make: Callable[[int], bytes], size: int) -> bytes:
    return _filled(_length_delimited(_tag(number, LENGTH), make(16)), size)


def _distinct(number: int, size: int) -> bytes:
    tag = _tag(number, LENGTH)
    return b"".join(_length_delimited(tag, b"\x0a\x08%08d" % entry) for entry in range(size // 13))


def _mixed(makes: Sequence[Callable[[int], bytes]], size: int, flip: float | None, most: int) -> bytes:
    content = bytearray(b"".join(make(min(size, most // len(makes))) for make in makes))
    if flip is not None and content:
        content[int(flip * len(content))] ^= 0x5A
    return bytes(content)


def _key(message: Any, field: str) -> bytes:
    """The key of a field that has a length."""
    return _tag(message.DESCRIPTOR.fields_by_name[field].number, LENGTH)


def _length_delimited(key: bytes, content: bytes) -> bytes:
    return key + _varint(len(content)) + content


def _tag(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))
