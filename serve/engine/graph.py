"""What a bundle's graph may consist of: checked in the file's bytes before ONNX Runtime sees them.

ONNX Runtime would read weights from other files, which no digest covers, and run operators that make gigabytes or an endless
loop of a few bytes. It has no option against the first but at its own build
(https://github.com/microsoft/onnxruntime/pull/7635). The numbers are those of the fields in
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

from serve.errors import BundleError

# Of these none makes more of a small input than its weights and the batch account for, but by broadcasting and Concat.
OPERATORS = {
    "Add", "BatchNormalization", "Cast", "Clip", "Concat", "Constant", "Conv", "ConvTranspose", "DepthToSpace", "Div", "Elu",
    "Flatten", "Gather", "Gemm", "Identity", "LeakyRelu", "MatMul", "Mul", "PRelu", "Relu", "Reshape", "Round", "Sigmoid",
    "Slice", "Softplus", "Split", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
}  # fmt: skip
OP_TYPE, DOMAIN, DATA_LOCATION = 4, 7, 14
# Message → field → the message in it.
PARTS = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor"},
}
SUBGRAPH, SPARSE, ELSEWHERE = "a graph within the graph", "sparse weights", "weights in another file"
REFUSED = {
    "model": {20: "a training graph", 25: "functions"},
    "graph": {15: SPARSE},
    "attribute": {6: SUBGRAPH, 11: SUBGRAPH, 22: SPARSE, 23: SPARSE},
    "tensor": {13: ELSEWHERE},
}
VARINT, FIXED_64, LENGTH, FIXED_32 = 0, 1, 2, 5  # how a field lies on the wire


def check_graph(model: bytes, where: str) -> None:
    """Raises BundleError, naming ``where`` and what it is, for a graph that has what a bundle's must not have."""
    try:
        _check("model", memoryview(model))
    except _RefusedError as refused:
        raise BundleError(
            f"{where} has {refused}, which a bundle must not have (docs/models.md); export the model again"
        ) from None
    except (IndexError, ValueError):
        raise BundleError(f"{where}: its file is no ONNX model; export the model again") from None


class _RefusedError(Exception):
    """The text says what was found."""


def _check(message: str, content: memoryview) -> None:
    """Goes as deep as ``PARTS`` does, not as the content does."""
    parts, refused = PARTS.get(message, {}), REFUSED.get(message, {})
    for field, value in _fields(content):
        if field in refused:
            raise _RefusedError(refused[field])
        if isinstance(value, int):
            if message == "tensor" and field == DATA_LOCATION and value:
                raise _RefusedError(ELSEWHERE)
        elif field in parts:
            _check(parts[field], value)
        elif message == "node" and field == OP_TYPE and (name := bytes(value).decode("ascii")) not in OPERATORS:
            raise _RefusedError(f"the operator {ascii(name)[:64]}")
        elif message == "node" and field == DOMAIN and bytes(value) not in (b"", b"ai.onnx"):
            raise _RefusedError("an operator that is not ONNX's own")


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """A protobuf message's fields as they lie there. Raises ValueError or IndexError for what is none."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind, field = key & 7, (key & 0xFFFFFFFF) >> 3  # protobuf's own reader drops what is beyond 32 bits
        if kind == VARINT:
            value, at = _varint(content, at)
            yield field, value
            continue
        if kind == LENGTH:
            length, at = _varint(content, at)
        elif kind in (FIXED_64, FIXED_32):
            length = 8 if kind == FIXED_64 else 4
        else:
            raise ValueError(kind)
        yield field, content[at : at + length]  # less of a message that is cut off, which ONNX Runtime refuses
        at += length


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(shift)
