"""``inference.GRPCInferenceService``: the Open Inference Protocol v2 over gRPC. ``serve.api.tensors`` has its tensors.

Values are sent as raw bytes or as typed contents; a raw request gets a raw answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from google.protobuf import empty_pb2
from numpy.typing import NDArray

from serve.access.budget import Hold
from serve.api.admission import Admission, Call
from serve.api.encoding import Piece, as_bytes, field_key, pack_field, packed_varints
from serve.api.rpc import REQUEST_COPIES, DigitsMethod, RpcTable, parse
from serve.api.status import refusal
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
from serve.api.wire_format import Bulk, check_size
from serve.core.generate import Core
from serve.core.request import Digits, DigitsRequest
from serve.errors import RequestError, ServeError, UnsupportedError
from serve.models.model import Model
from serve.models.reconcile import VersionStatus
from serve.observability.metrics import Metrics
from serve.pb.inference import open_inference_pb2 as pb
from serve.settings import release

SERVICE = "inference.GRPCInferenceService"
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
STREAM_RESPONSE_KEY = field_key(pb.ModelStreamInferResponse, "infer_response")
STREAM_AHEAD = 64  # requests of one stream that are under way at once

# Statistics → the histogram that has them.
STATISTICS = {
    "queue": "digits_queue_wait_seconds",
    "compute_input": "digits_assembly_seconds",
    "compute_infer": "digits_compute_seconds",
    "compute_output": "digits_encode_seconds",
}
# What else Triton's client can call, and why not, or what to do instead.
_SHARED_MEMORY = "there is no shared memory with callers; send the tensors in the message"
_SETTINGS = "logs and traces are set when the server starts (--log-level, OTEL_EXPORTER_OTLP_ENDPOINT)"
_SERVING_FILE = "which versions are served is a file, serving.json (--serving-file); python -m serve.admin edits it"
_ABOUT_MEMORY = [f"{kind}SharedMemory{what}" for kind in ("System", "Cuda") for what in ("Status", "Register", "Unregister")]
UNSUPPORTED = {
    **dict.fromkeys(_ABOUT_MEMORY, _SHARED_MEMORY),
    "TraceSetting": _SETTINGS,
    "LogSettings": _SETTINGS,
    **dict.fromkeys(("RepositoryModelLoad", "RepositoryModelUnload"), _SERVING_FILE),
}
# A version's state → what Triton calls it; all else is UNAVAILABLE.
REPOSITORY_STATES = {"READY": "READY", "LOADING": "LOADING", "DRAINING": "UNLOADING"}


class OpenInferenceService:
    """The handlers: a message and its call in, the response's bytes out. They raise ServeError."""

    def __init__(
        self,
        core: Core,
        not_ready: Callable[[], str | None],
        metrics: Metrics,
        status: Callable[[], Sequence[VersionStatus]],
    ) -> None:
        self._core = core
        self._status = status
        self._metrics = metrics
        self._not_ready = not_ready

    def table(self, admission: Admission, workers: ThreadPoolExecutor) -> RpcTable:
        """The methods, ready for a port. Health is open to all, as it is in gRPC's own protocol."""
        table = RpcTable(SERVICE, admission, workers)
        table.unary("ServerLive", pb.ServerLiveRequest, self.server_live, scope="open")
        table.unary("ServerReady", pb.ServerReadyRequest, self.server_ready, scope="open")
        table.unary("ModelReady", pb.ModelReadyRequest, self.model_ready, scope="open")
        table.unary("ServerMetadata", pb.ServerMetadataRequest, self.server_metadata)
        table.unary("ModelMetadata", pb.ModelMetadataRequest, self.model_metadata)
        table.digits("ModelInfer", self._core, DigitsMethod(pb.ModelInferRequest, infer, _encode, _takes_long, BULK))
        table.bidirectional("ModelStreamInfer", self.model_stream_infer)
        table.unary("ModelConfig", pb.ModelConfigRequest, self.model_config)
        table.unary("ModelStatistics", pb.ModelStatisticsRequest, self.model_statistics)
        table.unary("RepositoryIndex", pb.RepositoryIndexRequest, self.repository_index)
        for method, instead in UNSUPPORTED.items():
            table.unary(method, empty_pb2.Empty, _refusal(method, instead))
        return table

    async def server_live(self, request: pb.ServerLiveRequest, call: Call) -> bytes:
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def server_ready(self, request: pb.ServerReadyRequest, call: Call) -> bytes:
        return pb.ServerReadyResponse(ready=self._not_ready() is None).SerializeToString()

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

    async def model_config(self, request: pb.ModelConfigRequest, call: Call) -> bytes:
        model = self._find(request.name, request.version)
        taken, given = shapes_of(model.manifest)
        config = pb.ModelConfig(
            name=model.manifest.name,
            platform=PLATFORM,
            backend="onnxruntime",
            max_batch_size=model.batcher.limits.max_batch_size,
            input=[
                pb.ModelInput(name=name, data_type=f"TYPE_{INPUTS[name].datatype}", dims=shape, optional=True)
                for name, shape in taken.items()
            ],
            output=[
                pb.ModelOutput(name=name, data_type=f"TYPE_{OUTPUTS[name].datatype}", dims=dims) for name, dims in given.items()
            ],
        )
        return pb.ModelConfigResponse(config=config).SerializeToString()

    async def model_statistics(self, request: pb.ModelStatisticsRequest, call: Call) -> bytes:
        if request.name:
            self._find(request.name, request.version)  # or it is not found
        response, by_model = pb.ModelStatisticsResponse(), self._metrics.by_model()
        for model in self._core.catalog.models():
            name, version = model.manifest.name, model.manifest.version
            if request.name in ("", name) and request.version in ("", str(version)):
                sums = by_model.get((name, str(version)), {})
                stats = response.model_stats.add(name=name, version=str(version))
                stats.inference_count = int(sums.get("digits_images_total", 0))
                stats.execution_count = int(sums.get("digits_batch_images_count", 0))
                stats.inference_stats.fail.count = int(sums.get("digits_run_failures_total", 0))
                for field, metric in STATISTICS.items():
                    duration = getattr(stats.inference_stats, field)
                    duration.count = int(sums.get(f"{metric}_count", 0))
                    duration.ns = int(sums.get(f"{metric}_sum", 0.0) * 1e9)
                success = stats.inference_stats.success
                success.count = stats.inference_stats.compute_output.count
                success.ns = sum(getattr(stats.inference_stats, field).ns for field in STATISTICS)
        return response.SerializeToString()

    async def repository_index(self, request: pb.RepositoryIndexRequest, call: Call) -> bytes:
        response = pb.RepositoryIndexResponse()
        for each in self._status():
            state = REPOSITORY_STATES.get(each.state, "UNAVAILABLE")
            if state == "READY" or not request.ready:
                reason = each.reason or ("unloaded" if each.state == "UNLOADED" else "")
                response.models.add(name=each.model, version=str(each.version), state=state, reason=reason)
        return response.SerializeToString()

    async def model_stream_infer(self, requests: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes]:
        """Each request as ``ModelInfer`` answers it, some side by side, so that they share batches; answers in order."""
        under_way: asyncio.Queue[asyncio.Task[tuple[bytes, Hold]] | None] = asyncio.Queue(STREAM_AHEAD)
        held = deque[Hold]()  # what the answers hold that have not been taken, oldest first

        async def begin() -> None:
            async for raw in requests:
                await under_way.put(asyncio.create_task(self._answer_one(raw, call)))
            await under_way.put(None)

        reading = asyncio.create_task(begin())
        try:
            while (answer := await under_way.get()) is not None:
                response, hold = await answer
                held.append(hold)
                yield response  # goes on when it is sent
                held.popleft().give_back()
        finally:
            reading.cancel()
            for hold in held:
                hold.give_back()
            while not under_way.empty():
                if (left := under_way.get_nowait()) is not None:
                    left.cancel()
                    left.add_done_callback(_give_back)

    async def _answer_one(self, raw: bytes, call: Call) -> tuple[bytes, Hold]:
        """One response of a stream, and what it holds; what a caller did wrong with one request is no end of the others."""
        request = pb.ModelInferRequest()
        hold = call.another_hold()
        try:
            hold.take(0, REQUEST_COPIES * len(raw))
            check_size(raw, BULK)
            request = parse(pb.ModelInferRequest, raw)
            call.hold.account.count_request()
            digits = await self._core.generate(infer(request, call), hold)
            started = time.perf_counter()
            encode = partial(_encode, request, digits)
            response = await asyncio.to_thread(encode) if _takes_long(request, digits) else encode()
            call.encoded(digits, time.perf_counter() - started)
        except ServeError as error:
            failed = pb.ModelStreamInferResponse(error_message=refusal(error).text)
            failed.infer_response.id = request.id
            return failed.SerializeToString(), hold
        except BaseException:
            hold.give_back()
            raise
        return pack_field(b"", STREAM_RESPONSE_KEY, [[response]]), hold

    def _find(self, name: str, number: str) -> Model:
        return self._core.catalog.find(*named(name, number))


def infer(request: pb.ModelInferRequest, call: Call) -> DigitsRequest:
    """Raises ServeError naming the field or tensor that is wrong."""
    for field, most in (("inputs", len(INPUTS)), ("outputs", len(OUTPUTS)), ("parameters", MOST_PARAMETERS)):
        if len(getattr(request, field)) > most:
            raise RequestError(f"{field} must have at most {most} entries, got {len(getattr(request, field))}")
    names = output_names([output.name for output in request.outputs])
    holders: list[Any] = [request, *request.inputs, *request.outputs]
    if any(len(holder.parameters) > MOST_PARAMETERS for holder in holders):
        raise RequestError(f"parameters must have at most {MOST_PARAMETERS} entries")
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


def _give_back(answer: asyncio.Task[tuple[bytes, Hold]]) -> None:
    """Of an answer that nobody takes any more."""
    if not answer.cancelled() and answer.exception() is None:
        answer.result()[1].give_back()


def _takes_long(request: pb.ModelInferRequest, digits: Digits) -> bool:
    """Whether encoding takes long enough to hold up other callers."""
    return digits.count > MANY_DIGITS or (not request.raw_input_contents and digits.count * 784 > MANY_VALUES)


def _refusal(method: str, instead: str) -> Callable[[empty_pb2.Empty, Call], Awaitable[bytes]]:
    async def refuse(request: empty_pb2.Empty, call: Call) -> bytes:
        raise UnsupportedError(f"{method} is not supported: {instead}")

    return refuse


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


def _encode(request: pb.ModelInferRequest, digits: Digits) -> bytes:
    """The response, raw where the request was raw."""
    manifest = digits.model.manifest
    head = pb.ModelInferResponse(model_name=manifest.name, model_version=str(manifest.version), id=request.id)
    for key, parameter in request.parameters.items():
        head.parameters[key].CopyFrom(parameter)
    if digits.seed is not None:
        head.parameters["seed"].uint64_param = digits.seed
        head.parameters["start"].uint64_param = digits.start
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
