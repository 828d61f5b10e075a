"""``inference.GRPCInferenceService``: the Open Inference Protocol v2, through the same models and batcher as digits.v1.

A request gives ``latents`` FP32 [n, z], or ``count`` INT32 [1], with ``seed`` UINT64 [1] (else it is drawn), ``start`` UINT64
[1] and ``truncation`` FP32 [1] or without; and to a conditional model ``labels`` INT64 [1] or [n], which latents need and
addresses have of their own. It asks for ``pixels`` UINT8 [n, 28, 28], ``images`` FP32 [n, 1, 28, 28] and, of a conditional model,
``labels`` INT64 [n], or for nothing and gets ``pixels``.
Values come as raw bytes or as typed contents; a raw request gets a raw answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.api.admission import Admission, Call
from serve.api.encoding import Piece, as_bytes, field_key, pack_field, packed_varints
from serve.api.rpc import RpcTable
from serve.config.release import release
from serve.core.generate import Core
from serve.core.request import Addresses, Digits, DigitsRequest, Latents
from serve.errors import RequestError, UnknownModelError
from serve.models.model import Model
from serve.pb.inference import open_inference_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
RAW_KEY = field_key(pb.ModelInferResponse, "raw_output_contents")
PLATFORM = "onnxruntime_onnx"

OUTPUTS_KEY = field_key(pb.ModelInferResponse, "outputs")
CONTENTS_KEY = field_key(pb.ModelInferResponse.InferOutputTensor, "contents")
MANY_VALUES = 1 << 16  # of typed contents: more are encoded in a thread, not on the event loop


class Tensor(NamedTuple):
    """A tensor of the protocol: its datatype, numpy's type for its bytes, and the field of its typed contents."""

    datatype: str
    dtype: str
    contents: str


INPUTS = {
    "latents": Tensor("FP32", "<f4", "fp32_contents"),
    "seed": Tensor("UINT64", "<u8", "uint64_contents"),
    "count": Tensor("INT32", "<i4", "int_contents"),
    "start": Tensor("UINT64", "<u8", "uint64_contents"),
    "truncation": Tensor("FP32", "<f4", "fp32_contents"),
    "labels": Tensor("INT64", "<i8", "int64_contents"),
}
OUTPUTS = {
    "pixels": Tensor("UINT8", "u1", "uint_contents"),
    "images": Tensor("FP32", "<f4", "fp32_contents"),
    "labels": Tensor("INT64", "<i8", "int64_contents"),
}
# Of Triton's extensions: sequences and classification.
UNSUPPORTED_PARAMETERS = {"sequence_id", "sequence_start", "sequence_end", "classification", "class_count"}
NO_LABELS: NDArray[np.generic] = np.empty(0, np.int64)
MODEL_OUTPUTS = ("pixels", "images")
Tensors = Mapping[str, NDArray[np.generic]]


class OpenInferenceService:
    """The handlers: a message and its call in, the response's bytes out. They raise ServeError."""

    def __init__(self, core: Core, ready: Callable[[], bool]) -> None:
        self._core = core
        self._ready = ready

    def table(self, admission: Admission) -> RpcTable:
        """The methods, ready for a server. Health is open to all, as it is in gRPC's own protocol."""
        table = RpcTable(SERVICE, admission)
        table.unary("ServerLive", pb.ServerLiveRequest, self.server_live, scope="open")
        table.unary("ServerReady", pb.ServerReadyRequest, self.server_ready, scope="open")
        table.unary("ModelReady", pb.ModelReadyRequest, self.model_ready, scope="open")
        table.unary("ServerMetadata", pb.ServerMetadataRequest, self.server_metadata)
        table.unary("ModelMetadata", pb.ModelMetadataRequest, self.model_metadata)
        table.unary("ModelInfer", pb.ModelInferRequest, self.model_infer)
        return table

    async def server_live(self, request: pb.ServerLiveRequest, call: Call) -> bytes:
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def server_ready(self, request: pb.ServerReadyRequest, call: Call) -> bytes:
        return pb.ServerReadyResponse(ready=self._ready()).SerializeToString()

    async def model_ready(self, request: pb.ModelReadyRequest, call: Call) -> bytes:
        return pb.ModelReadyResponse(ready=self._find(request.name, request.version).ready).SerializeToString()

    async def server_metadata(self, request: pb.ServerMetadataRequest, call: Call) -> bytes:
        return pb.ServerMetadataResponse(name="digits-serve", version=release()).SerializeToString()

    async def model_metadata(self, request: pb.ModelMetadataRequest, call: Call) -> bytes:
        model = self._find(request.name, request.version)
        manifest = model.manifest
        tensor = pb.ModelMetadataResponse.TensorMetadata
        taken = {spec.name: [-1, *spec.shape] for spec in manifest.inputs}
        taken |= {name: [1] for name in ("seed", "count", "start", "truncation")}
        given = {spec.name: [-1, *spec.shape] for spec in manifest.outputs}
        if "labels" in taken:
            given["labels"] = taken["labels"]
        return pb.ModelMetadataResponse(
            name=manifest.name,
            versions=[str(number) for number in self._core.catalog.versions(manifest.name)],
            platform=PLATFORM,
            inputs=[tensor(name=name, datatype=INPUTS[name].datatype, shape=shape) for name, shape in taken.items()],
            outputs=[tensor(name=name, datatype=OUTPUTS[name].datatype, shape=shape) for name, shape in given.items()],
        ).SerializeToString()

    async def model_infer(self, request: pb.ModelInferRequest, call: Call) -> bytes:
        names = [output.name for output in request.outputs] or ["pixels"]
        for name in names:
            if name not in OUTPUTS:
                raise RequestError(f"outputs: {name[:64]!r} is unknown; there are {', '.join(OUTPUTS)}")
        if len(set(names)) < len(names):
            raise RequestError("outputs: the same tensor is asked for twice")
        _check_parameters(request)
        tensors = read_inputs(request)
        labels = tensors.get("labels", NO_LABELS)
        if labels.ndim != 1:
            raise RequestError(f"inputs: labels must have shape [1] or [n], got {list(labels.shape)}")
        name, version = _named(request.model_name, request.model_version)
        parsed = DigitsRequest(
            rows=_rows({name: values for name, values in tensors.items() if name != "labels"}),
            model=name,
            version=version,
            labels=labels.astype(np.int64, copy=False),
            outputs=tuple(output for output in MODEL_OUTPUTS if output in names) or MODEL_OUTPUTS[:1],
            encoding="float32" if "images" in names else "uint8",
            deadline=call.deadline,
        )
        digits = await self._core.generate(parsed, call.account)
        if "labels" in names and digits.labels is None:
            raise RequestError(f"outputs: labels cannot be had of {name}, which is unconditional")
        if request.raw_input_contents or digits.count * 784 <= MANY_VALUES:
            return _encode(request, digits, names, call)
        return await asyncio.to_thread(_encode, request, digits, names, call)

    def _find(self, name: str, number: str) -> Model:
        return self._core.catalog.find(*_named(name, number))


def _named(name: str, number: str) -> tuple[str, int]:
    """A model's name and version, 0 for none in particular. Raises ServeError."""
    if not name:
        raise RequestError("a model name is needed")
    if number and not (number.isascii() and number.isdecimal() and len(number) <= 18):
        raise UnknownModelError(f"model {name[:64]!r} has no version {number[:20]!r}")
    return name, int(number or 0)


def _rows(tensors: Tensors) -> Addresses | Latents:
    """The rows that the tensors other than labels ask for. Raises RequestError naming the tensor."""
    if "latents" in tensors:
        if len(tensors) > 1:
            raise RequestError("inputs: latents cannot go with seed, count, start or truncation")
        if tensors["latents"].ndim != 2:
            raise RequestError(f"inputs: latents must have shape [n, z], got {list(tensors['latents'].shape)}")
        return Latents(tensors["latents"].astype(np.float32, copy=False))
    if "count" not in tensors:
        raise RequestError("inputs: count is missing; give latents, or count, with seed or without")
    for name, values in tensors.items():
        if values.shape != (1,):
            raise RequestError(f"inputs: {name} must have shape [1], got {list(values.shape)}")
    numbers = {name: values[0].item() for name, values in tensors.items()}
    return Addresses(numbers.get("seed"), numbers.get("start", 0), numbers["count"], numbers.get("truncation", 0.0))


def _check_parameters(request: pb.ModelInferRequest) -> None:
    """Raises RequestError for a parameter that asks for another answer than this server can give; others are echoed."""
    holders: list[Any] = [request, *request.inputs, *request.outputs]
    for holder in holders:
        for name in holder.parameters:
            if name in UNSUPPORTED_PARAMETERS or name.startswith("shared_memory_"):
                raise RequestError(f"parameters: {name} is not supported; leave it out")


def read_inputs(request: pb.ModelInferRequest) -> Tensors:
    """The request's tensors by name, shaped. Raises RequestError naming the tensor and what is wrong with it."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs")
    tensors: dict[str, NDArray[np.generic]] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in INPUTS:
            raise RequestError(f"inputs: {name[:64]!r} is unknown; there are {', '.join(INPUTS)}")
        if name in tensors:
            raise RequestError(f"inputs: {name} is given twice")
        datatype, dtype, contents_field = INPUTS[name]
        if tensor.datatype != datatype:
            raise RequestError(f"inputs: {name} must be {datatype}, got {tensor.datatype[:20]!r}")
        if raw and tensor.contents.ByteSize():  # an empty one is none: MLServer's converter sends it
            raise RequestError(f"inputs: {name} has both contents and raw_input_contents")
        shape = list(tensor.shape)
        if not 1 <= len(shape) <= 2 or min(shape) < 1:
            raise RequestError(f"inputs: {name} has the impossible shape {shape[:8]}")
        wanted = int(np.prod(shape, dtype=object))
        given = len(raw[index]) / np.dtype(dtype).itemsize if raw else len(getattr(tensor.contents, contents_field))
        if given != wanted:
            raise RequestError(f"inputs: {name} of shape {shape} needs {wanted} values, got {given:g}")
        values = np.frombuffer(raw[index], dtype) if raw else np.array(getattr(tensor.contents, contents_field), dtype)
        tensors[name] = values.reshape(shape)
    return tensors


def _encode(request: pb.ModelInferRequest, digits: Digits, names: list[str], call: Call) -> bytes:
    """The response, raw where the request was raw."""
    started = time.perf_counter()
    manifest, count = digits.model.manifest, digits.count
    head = pb.ModelInferResponse(model_name=manifest.name, model_version=str(manifest.version), id=request.id)
    for key, parameter in request.parameters.items():
        head.parameters[key].CopyFrom(parameter)
    if digits.seed is not None:
        head.parameters["seed"].uint64_param = digits.seed
        head.parameters["start"].uint64_param = digits.start
    shapes = {spec.name: (count, *spec.shape) for spec in manifest.outputs} | {"labels": (count,)}
    arrays: dict[str, list[NDArray[Any]]] = {"pixels": [*digits.pixels], "images": [*digits.images]}
    if digits.labels is not None:
        arrays["labels"] = [digits.labels]
    tensor = pb.ModelInferResponse.InferOutputTensor
    tensors = {name: tensor(name=name, datatype=OUTPUTS[name].datatype, shape=shapes[name]) for name in names}
    if request.raw_input_contents:
        head.outputs.extend(tensors.values())
        response = pack_field(head.SerializeToString(), RAW_KEY, [[as_bytes(rows) for rows in arrays[name]] for name in names])
    else:
        entries = [[_with_contents(tensors[name], name, np.concatenate(arrays[name]))] for name in names]
        response = pack_field(head.SerializeToString(), OUTPUTS_KEY, entries)
    call.encoded(digits, time.perf_counter() - started)
    return response


def _with_contents(tensor: pb.ModelInferResponse.InferOutputTensor, name: str, values: NDArray[Any]) -> bytes:
    """An output tensor's bytes with typed contents. Packed by numpy: protobuf would hold the event loop meanwhile."""
    key = field_key(pb.InferTensorContents, OUTPUTS[name].contents)
    packed: Piece = as_bytes(values) if values.dtype == np.float32 else packed_varints(values)
    return pack_field(tensor.SerializeToString(), CONTENTS_KEY, [[pack_field(b"", key, [[packed]])]])
