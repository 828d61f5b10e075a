"""``inference.GRPCInferenceService``: the Open Inference Protocol v2 over gRPC. Its tensors: ``serve.api.tensors``.

Values come as raw bytes or as typed contents; a raw request gets a raw answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.api.admission import Admission, Call
from serve.api.encoding import Piece, as_bytes, field_key, pack_field, packed_varints
from serve.api.rpc import RpcTable
from serve.api.tensors import (
    INPUTS,
    OUTPUTS,
    PLATFORM,
    Tensors,
    check_input,
    check_parameters,
    check_shape,
    named,
    output_names,
    outputs_of,
    shapes_of,
    to_request,
)
from serve.config.release import release
from serve.core.generate import Core
from serve.core.request import Digits
from serve.errors import RequestError
from serve.models.model import Model
from serve.pb.inference import open_inference_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
RAW_KEY = field_key(pb.ModelInferResponse, "raw_output_contents")
OUTPUTS_KEY = field_key(pb.ModelInferResponse, "outputs")
CONTENTS_KEY = field_key(pb.ModelInferResponse.InferOutputTensor, "contents")
MANY_VALUES = 1 << 16  # of typed contents: more are encoded in a thread, not on the event loop


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
        taken, given = shapes_of(manifest)
        return pb.ModelMetadataResponse(
            name=manifest.name,
            versions=[str(number) for number in self._core.catalog.versions(manifest.name)],
            platform=PLATFORM,
            inputs=[tensor(name=name, datatype=INPUTS[name].datatype, shape=shape) for name, shape in taken.items()],
            outputs=[tensor(name=name, datatype=OUTPUTS[name].datatype, shape=shape) for name, shape in given.items()],
        ).SerializeToString()

    async def model_infer(self, request: pb.ModelInferRequest, call: Call) -> bytes:
        names = output_names([output.name for output in request.outputs])
        holders: list[Any] = [request, *request.inputs, *request.outputs]
        check_parameters(name for holder in holders for name in holder.parameters)
        parsed = to_request(request.model_name, request.model_version, read_inputs(request), names, call.deadline)
        digits = await self._core.generate(parsed, call.account)
        if request.raw_input_contents or digits.count * 784 <= MANY_VALUES:
            return _encode(request, digits, names, call)
        return await asyncio.to_thread(_encode, request, digits, names, call)

    def _find(self, name: str, number: str) -> Model:
        return self._core.catalog.find(*named(name, number))


def read_inputs(request: pb.ModelInferRequest) -> Tensors:
    """The request's tensors by name, shaped. Raises RequestError naming the tensor and what is wrong with it."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs")
    tensors: dict[str, NDArray[np.generic]] = {}
    for index, tensor in enumerate(request.inputs):
        name, shape = tensor.name, list(tensor.shape)
        _, dtype, contents_field = check_input(name, tensor.datatype, tensors)
        if raw and tensor.contents.ByteSize():  # an empty one is none: MLServer's converter sends it
            raise RequestError(f"inputs: {name} has both contents and raw_input_contents")
        given = len(raw[index]) / np.dtype(dtype).itemsize if raw else len(getattr(tensor.contents, contents_field))
        check_shape(name, shape, given)
        values = np.frombuffer(raw[index], dtype) if raw else np.array(getattr(tensor.contents, contents_field), dtype)
        tensors[name] = values.reshape(shape)
    return tensors


def _encode(request: pb.ModelInferRequest, digits: Digits, names: list[str], call: Call) -> bytes:
    """The response, raw where the request was raw."""
    started = time.perf_counter()
    manifest = digits.model.manifest
    head = pb.ModelInferResponse(model_name=manifest.name, model_version=str(manifest.version), id=request.id)
    for key, parameter in request.parameters.items():
        head.parameters[key].CopyFrom(parameter)
    if digits.seed is not None:
        head.parameters["seed"].uint64_param = digits.seed
        head.parameters["start"].uint64_param = digits.start
    outputs = outputs_of(digits, names)
    tensor = pb.ModelInferResponse.InferOutputTensor
    tensors = {name: tensor(name=name, datatype=OUTPUTS[name].datatype, shape=shape) for name, (shape, _) in outputs.items()}
    if request.raw_input_contents:
        head.outputs.extend(tensors.values())
        entries = [[as_bytes(rows) for rows in pieces] for _, pieces in outputs.values()]
        response = pack_field(head.SerializeToString(), RAW_KEY, entries)
    else:
        typed = [[_with_contents(tensors[name], name, np.concatenate(pieces))] for name, (_, pieces) in outputs.items()]
        response = pack_field(head.SerializeToString(), OUTPUTS_KEY, typed)
    call.encoded(digits, time.perf_counter() - started)
    return response


def _with_contents(tensor: pb.ModelInferResponse.InferOutputTensor, name: str, values: NDArray[Any]) -> bytes:
    """An output tensor's bytes with typed contents. Packed by numpy: protobuf would hold the event loop meanwhile."""
    key = field_key(pb.InferTensorContents, OUTPUTS[name].contents)
    packed: Piece = as_bytes(values) if values.dtype == np.float32 else packed_varints(values)
    return pack_field(tensor.SerializeToString(), CONTENTS_KEY, [[pack_field(b"", key, [[packed]])]])
