"""``ModelInfer``'s messages: into the core's request, and its digits into the response. ``serve.api.tensors`` has the tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.api.admission import Call
from serve.api.encoding import Piece, as_bytes, field_key, pack_field, packed_varints
from serve.api.tensors import (
    INPUTS,
    OUTPUTS,
    Tensors,
    check_input,
    check_parameters,
    check_shape,
    output_names,
    outputs_of,
    to_request,
)
from serve.api.wire_format import Bulk
from serve.core.request import Digits, DigitsRequest
from serve.errors import RequestError
from serve.pb.inference import open_inference_pb2 as pb

RAW_KEY = field_key(pb.ModelInferResponse, "raw_output_contents")
OUTPUTS_KEY = field_key(pb.ModelInferResponse, "outputs")
CONTENTS_KEY = field_key(pb.ModelInferResponse.InferOutputTensor, "contents")
MANY_VALUES = 1 << 16  # of typed contents: more are encoded by a worker, as more digits are
MANY_DIGITS = 1024
MOST_PARAMETERS = 64  # of a request, or of a tensor
# The fields of requests that are cheap to parse at any length.
_TENSOR = pb.ModelInferRequest.InferInputTensor.DESCRIPTOR.fields_by_name
BULK: Bulk = {
    pb.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number: None,
    pb.ModelInferRequest.DESCRIPTOR.fields_by_name["inputs"].number: {
        _TENSOR["contents"].number: {pb.InferTensorContents.DESCRIPTOR.fields_by_name["fp32_contents"].number: None}
    },
}
# What a digit takes up in memory until its answer is sent: rows, the message, and gRPC's copy of it; typed, while it is packed.
ROW_BYTES, TYPED_ROW_BYTES = 3 * 784, 24 * 784


def infer(request: pb.ModelInferRequest, call: Call) -> DigitsRequest:
    """Raises ServeError naming the field or tensor that is wrong."""
    for field, most in (("inputs", len(INPUTS)), ("outputs", len(OUTPUTS)), ("parameters", MOST_PARAMETERS)):
        if len(getattr(request, field)) > most:
            raise RequestError(f"{field} must have at most {most} entries, got {len(getattr(request, field))}", field, most)
    names = output_names([output.name for output in request.outputs])
    holders: list[Any] = [request, *request.inputs, *request.outputs]
    if any(len(holder.parameters) > MOST_PARAMETERS for holder in holders):
        raise RequestError(f"parameters must have at most {MOST_PARAMETERS} entries", "parameters", MOST_PARAMETERS)
    check_parameters(name for holder in holders for name in holder.parameters)
    row_bytes = ROW_BYTES if request.raw_input_contents else TYPED_ROW_BYTES
    return to_request(
        request.model_name,
        request.model_version,
        read_inputs(request),
        names,
        deadline=call.deadline,
        row_bytes=(4 if "images" in names else 1) * row_bytes,
    )


def takes_long(request: pb.ModelInferRequest, digits: Digits) -> bool:
    """Whether encoding takes long enough to hold up other callers."""
    return digits.count > MANY_DIGITS or (not request.raw_input_contents and digits.count * 784 > MANY_VALUES)


def read_inputs(request: pb.ModelInferRequest) -> Tensors:
    """The request's tensors by name, shaped. Raises RequestError naming the tensor and what is wrong with it."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs", "raw_input_contents")
    tensors: dict[str, NDArray[np.generic]] = {}
    for index, tensor in enumerate(request.inputs):
        name, shape = tensor.name, list(tensor.shape)
        _, dtype, contents_field = check_input(name, tensor.datatype, tensors)
        if raw and tensor.contents.ByteSize():  # an empty one is none: MLServer's converter sends it
            raise RequestError(f"inputs: {name} has both contents and raw_input_contents", name)
        given = len(raw[index]) / np.dtype(dtype).itemsize if raw else len(getattr(tensor.contents, contents_field))
        check_shape(name, shape, given)
        values = np.frombuffer(raw[index], dtype) if raw else _typed(tensor.contents, contents_field, dtype)
        tensors[name] = values.reshape(shape)
    return tensors


def _typed(contents: pb.InferTensorContents, field: str, dtype: str) -> NDArray[np.generic]:
    """The values of typed contents. Floats lie in a message as in an array: read one by one, 4,096 digits' take 50 ms."""
    values = getattr(contents, field)
    if field == "fp32_contents":
        packed, size = contents.SerializeToString(), 4 * len(values)
        if len(packed) - size == 1 + (size.bit_length() + 6) // 7:  # the field's key and length, and no other field
            return np.frombuffer(packed, dtype, len(values), len(packed) - size)
    return np.array(values, dtype)


def encode(request: pb.ModelInferRequest, digits: Digits) -> bytes:
    """The response, raw where the request was raw."""
    manifest = digits.model.manifest
    head = pb.ModelInferResponse(model_name=manifest.name, model_version=str(manifest.version), id=request.id)
    for key, parameter in request.parameters.items():
        head.parameters[key].CopyFrom(parameter)
    if digits.seed is not None:
        for name, value in (("seed", digits.seed), ("start", digits.start)):
            # Triton alone knows uint64_param: KServe's and MLServer's messages skip it.
            setattr(head.parameters[name], "int64_param" if value < 1 << 63 else "uint64_param", value)
    outputs = outputs_of(digits, output_names([output.name for output in request.outputs]))
    tensor = pb.ModelInferResponse.InferOutputTensor
    tensors = {name: tensor(name=name, datatype=OUTPUTS[name].datatype, shape=shape) for name, (shape, _) in outputs.items()}
    if request.raw_input_contents:
        head.outputs.extend(tensors.values())
        entries = [[as_bytes(rows) for rows in pieces] for _, pieces in outputs.values()]
        return pack_field(head.SerializeToString(), RAW_KEY, entries)
    typed = [[_with_contents(tensors[name], name, np.concatenate(pieces))] for name, (_, pieces) in outputs.items()]
    return pack_field(head.SerializeToString(), OUTPUTS_KEY, typed)


def _with_contents(tensor: pb.ModelInferResponse.InferOutputTensor, name: str, values: NDArray[Any]) -> bytes:
    """An output tensor's bytes with typed contents. Packed by numpy: protobuf takes several times as long."""
    key = field_key(pb.InferTensorContents, OUTPUTS[name].contents)
    packed: Piece = as_bytes(values) if values.dtype == np.float32 else packed_varints(values)
    return pack_field(tensor.SerializeToString(), CONTENTS_KEY, [[pack_field(b"", key, [[packed]])]])
