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

from google.protobuf import empty_pb2

from serve.access.budget import Hold
from serve.api.admission import Admission, Call
from serve.api.encoding import field_key, pack_field
from serve.api.open_inference_messages import BULK, encode, infer, takes_long
from serve.api.rpc import REQUEST_COPIES, SMALL_REQUEST_BYTES, DigitsMethod, RpcTable, parse
from serve.api.status import refusal
from serve.api.tensors import (
    INPUTS,
    OUTPUTS,
    PLATFORM,
    named,
    shapes_of,
)
from serve.api.wire_format import check_size
from serve.command_line import release
from serve.core.generate import Core
from serve.errors import ServeError, UnsupportedError
from serve.models.model import Model
from serve.models.reconcile import VersionStatus
from serve.observability.metrics import Metrics
from serve.pb.inference import open_inference_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
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
        table.digits("ModelInfer", self._core, DigitsMethod(pb.ModelInferRequest, infer, encode, takes_long, BULK))
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
        begun = deque[asyncio.Task[tuple[bytes, Hold]]]()  # whose answers have not been sent, oldest first

        async def begin() -> None:
            async for raw in requests:
                begun.append(asyncio.create_task(self._answer_one(raw, call)))
                await under_way.put(begun[-1])
            await under_way.put(None)

        reading = asyncio.create_task(begin())
        try:
            while (answer := await under_way.get()) is not None:
                response, hold = await answer
                yield response  # goes on when it is sent
                hold.give_back()
                begun.popleft()
        finally:
            reading.cancel()
            for left in begun:
                left.cancel()
                left.add_done_callback(_give_back)

    async def _answer_one(self, raw: bytes, call: Call) -> tuple[bytes, Hold]:
        """One response of a stream, and what it holds; what a caller did wrong with one request is no end of the others."""
        request = pb.ModelInferRequest()
        hold = call.another_hold()
        try:
            if len(raw) > SMALL_REQUEST_BYTES:
                hold.take(0, REQUEST_COPIES * len(raw))
            check_size(raw, BULK)
            request = parse(pb.ModelInferRequest, raw)
            call.hold.account.count_request()
            call.asks(asked := infer(request, call))
            digits = await self._core.generate(asked, hold)
            started = time.perf_counter()
            made = partial(encode, request, digits)
            response = await asyncio.to_thread(made) if takes_long(request, digits) else made()
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


def _give_back(answer: asyncio.Task[tuple[bytes, Hold]]) -> None:
    """Of an answer that nobody takes any more."""
    if not answer.cancelled() and answer.exception() is None:
        answer.result()[1].give_back()


def _refusal(method: str, instead: str) -> Callable[[empty_pb2.Empty, Call], Awaitable[bytes]]:
    async def refuse(request: empty_pb2.Empty, call: Call) -> bytes:
        raise UnsupportedError(f"{method} is not supported: {instead}")

    return refuse
