"""``inference.GRPCInferenceService``: the Open Inference Protocol v2, through the same models and batcher as digits.v1.

A request gives ``latents`` FP32 [n, z], or ``seed`` UINT64 [1] and ``count`` INT32 [1], with ``start`` UINT64 [1] and
``truncation`` FP32 [1] or without; and to a conditional model ``labels`` INT64 [1] or [n], which latents need and addresses
have of their own. It asks for ``pixels`` UINT8 [n, 28, 28], ``images`` FP32 [n, 1, 28, 28] and, of a conditional model,
``labels`` INT64 [n], or for nothing and gets ``pixels``.
Values come as raw bytes or as typed contents; a raw request gets a raw answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.catalog import Catalog
from serve.encode import as_bytes, pack_field
from serve.errors import RequestError, UnknownModelError
from serve.fair_queue import Priority, Ticket
from serve.latents import Span
from serve.model import Model, joined_rows, ordered_labels, ordered_rows
from serve.pb.inference import open_inference_pb2 as pb
from serve.rpc import Call, Door, RpcTable
from serve.service import checked_truncation, digest_seed, finite_rows, labelled, tape_span
from serve.settings import Settings
from serve.version import release

SERVICE = "inference.GRPCInferenceService"
RAW_FIELD = pb.ModelInferResponse.DESCRIPTOR.fields_by_name["raw_output_contents"].number
PLATFORM = "onnxruntime_onnx"

# Input name → (datatype, numpy type, field of typed contents).
INPUTS = {
    "latents": ("FP32", "<f4", "fp32_contents"),
    "seed": ("UINT64", "<u8", "uint64_contents"),
    "count": ("INT32", "<i4", "int_contents"),
    "start": ("UINT64", "<u8", "uint64_contents"),
    "truncation": ("FP32", "<f4", "fp32_contents"),
    "labels": ("INT64", "<i8", "int64_contents"),
}
# Output name → (datatype, field of typed contents).
OUTPUTS = {"pixels": ("UINT8", "uint_contents"), "images": ("FP32", "fp32_contents"), "labels": ("INT64", "int64_contents")}


class OpenInferenceService:
    """The RPCs."""

    def __init__(self, catalog: Catalog, settings: Settings, ready: Callable[[], bool]) -> None:
        self._catalog = catalog
        self._settings = settings
        self._ready = ready

    def table(self, door: Door) -> RpcTable:
        """The methods, ready for a server. Health is open to all, as it is in gRPC's own protocol."""
        table = RpcTable(SERVICE, door)
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
        taken = {"latents": [-1, manifest.latent_size], "seed": [1], "count": [1], "start": [1], "truncation": [1]}
        given = {"pixels": [-1, manifest.height, manifest.width], "images": [-1, 1, manifest.height, manifest.width]}
        if manifest.labels:
            taken["labels"] = given["labels"] = [-1]
        return pb.ModelMetadataResponse(
            name=manifest.name,
            versions=[str(number) for number in self._catalog.versions(manifest.name)],
            platform=PLATFORM,
            inputs=[tensor(name=name, datatype=INPUTS[name][0], shape=shape) for name, shape in taken.items()],
            outputs=[tensor(name=name, datatype=OUTPUTS[name][0], shape=shape) for name, shape in given.items()],
        ).SerializeToString()

    async def model_infer(self, request: pb.ModelInferRequest, call: Call) -> bytes:
        names = [output.name for output in request.outputs] or ["pixels"]
        for name in names:
            if name not in OUTPUTS:
                raise RequestError(f"outputs: {name[:64]!r} is unknown; there are {', '.join(OUTPUTS)}")
        if len(set(names)) < len(names):
            raise RequestError("outputs: the same tensor is asked for twice")
        tensors = read_inputs(request)
        model = self._find(request.model_name, request.model_version, lambda: _seed_of(tensors))
        if "labels" in names and not model.manifest.labels:
            raise RequestError(f"outputs: labels cannot be had of {model.manifest.name}, which is unconditional")
        span = self._span(tensors, model)
        most = self._settings.max_count_float32 if "images" in names else self._settings.max_count
        if not 1 <= span.count <= most:
            raise RequestError(f"count must be from 1 to {most} for {' and '.join(names)}, got {span.count}")
        with model.in_use(), call.hold(span.count):
            ticket = await model.generate(span, "images" in names, Priority.INTERACTIVE, call.deadline)
            return _respond(request, model, ticket, names, call)

    def _find(self, name: str, number: str, seed: Callable[[], int] = lambda: 0) -> Model:
        if not name:
            raise RequestError("a model name is needed")
        if number and not (number.isascii() and number.isdecimal() and len(number) <= 18):
            raise UnknownModelError(f"model {name[:64]!r} has no version {number[:20]!r}")
        return self._catalog.find(name, int(number or 0), seed)

    def _span(self, tensors: Mapping[str, NDArray[np.generic]], model: Model) -> Span:
        labels = tensors.get("labels", np.empty(0, np.int64))
        if labels.ndim != 1:
            raise RequestError(f"inputs: labels must have shape [1] or [n], got {list(labels.shape)}")
        rest = {name: values for name, values in tensors.items() if name != "labels"}
        return labelled(self._unlabelled(rest, model), labels.tolist(), model)

    def _unlabelled(self, tensors: Mapping[str, NDArray[np.generic]], model: Model) -> Span:
        if "latents" in tensors:
            if len(tensors) > 1:
                raise RequestError("inputs: latents cannot go with seed, count, start or truncation")
            rows = tensors["latents"].astype(np.float32, copy=False)
            size = model.manifest.latent_size
            if rows.ndim != 2 or rows.shape[1] != size:
                raise RequestError(f"inputs: latents must have shape [n, {size}], got {list(rows.shape)}")
            return Span(0, 0, len(rows), finite_rows(rows))
        for name in ("seed", "count"):
            if name not in tensors:
                raise RequestError(f"inputs: {name} is missing; give latents, or seed and count")
        for name, values in tensors.items():
            if values.shape != (1,):
                raise RequestError(f"inputs: {name} must have shape [1], got {list(values.shape)}")
        numbers = {name: values[0].item() for name, values in tensors.items()}
        truncation = checked_truncation(numbers.get("truncation", 0.0))
        return tape_span(numbers["seed"], numbers.get("start", 0), numbers["count"], truncation)


def read_inputs(request: pb.ModelInferRequest) -> dict[str, NDArray[np.generic]]:
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
        datatype, kind, contents_field = INPUTS[name]
        if tensor.datatype != datatype:
            raise RequestError(f"inputs: {name} must be {datatype}, got {tensor.datatype[:20]!r}")
        if raw and tensor.HasField("contents"):
            raise RequestError(f"inputs: {name} has both contents and raw_input_contents")
        shape = list(tensor.shape)
        if not 1 <= len(shape) <= 2 or min(shape) < 1:
            raise RequestError(f"inputs: {name} has the impossible shape {shape[:8]}")
        wanted = int(np.prod(shape, dtype=object))
        given = len(raw[index]) / np.dtype(kind).itemsize if raw else len(getattr(tensor.contents, contents_field))
        if given != wanted:
            raise RequestError(f"inputs: {name} of shape {shape} needs {wanted} values, got {given:g}")
        values = np.frombuffer(raw[index], kind) if raw else np.array(getattr(tensor.contents, contents_field), kind)
        tensors[name] = values.reshape(shape)
    return tensors


def _seed_of(tensors: Mapping[str, NDArray[np.generic]]) -> int:
    """The tape's seed, or what stands for it where latents are given."""
    seed = tensors.get("seed")
    if seed is not None and seed.shape == (1,):
        return int(seed[0])
    return digest_seed(tensors["latents"].tobytes() if "latents" in tensors else b"")


def _respond(request: pb.ModelInferRequest, model: Model, ticket: Ticket, names: list[str], call: Call) -> bytes:
    started = time.perf_counter()
    manifest, count = model.manifest, ticket.span.count
    shapes = {
        "pixels": [count, manifest.height, manifest.width],
        "images": [count, 1, manifest.height, manifest.width],
        "labels": [count],
    }
    head = pb.ModelInferResponse(model_name=manifest.name, model_version=str(manifest.version), id=request.id)
    for key, parameter in request.parameters.items():
        head.parameters[key].CopyFrom(parameter)
    if ticket.span.explicit is None:
        head.parameters["seed"].uint64_param = ticket.span.seed
        head.parameters["start"].uint64_param = ticket.span.start
    for name in names:
        head.outputs.add(name=name, datatype=OUTPUTS[name][0], shape=shapes[name])
    tensors = {name: _output(name, ticket, names) for name in names}
    if request.raw_input_contents:
        entries = [[as_bytes(rows) for rows in tensors[name]] for name in names]
        response = pack_field(head.SerializeToString(), RAW_FIELD, entries)
    else:
        for output in head.outputs:
            values = np.concatenate(tensors[output.name]).ravel()
            getattr(output.contents, OUTPUTS[output.name][1]).extend(values.tolist())
        response = head.SerializeToString()
    model.metrics.images("float32" if "images" in names else "uint8").inc(count)
    seconds = time.perf_counter() - started
    model.metrics.encode(seconds)
    call.encoded(ticket, seconds)
    return response


def _output(name: str, ticket: Ticket, names: list[str]) -> Sequence[NDArray[Any]]:
    if name == "labels":
        labels = ordered_labels(ticket)
        assert labels is not None
        return [labels]
    if name == "images" or "images" not in names:
        return ordered_rows(ticket)
    # Both are wanted and the ticket carries the float images: the graph's own rounding, repeated here.
    return [np.round(joined_rows(ticket)[:, 0] * np.float32(255)).astype(np.uint8)]
