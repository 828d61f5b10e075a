"""A call's way through the APIs without a port: who does what is long, what is bounded, what is held until when."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest

from serve.access.identity import Caller
from serve.api import digits_v1, open_inference
from serve.api.admission import Call
from serve.api.rpc import LARGE_REQUEST_BYTES, caller_of
from serve.api.wire_format import SMALL_BYTES
from serve.batching.instance import INSTANCE_THREAD
from serve.observability.call_metrics import RpcMetrics
from serve.observability.logs import current_call
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.inference import open_inference_pb2 as oip
from tests.fake_engine import LATENT_SIZE
from tests.fake_service import FakeService
from tests.fake_wire import FakeWire, SlowWire
from tests.waiting import wait_until

Code = grpc.StatusCode
ONE = pb.GenerateRequest(count=1, seed=7)
ENDS = {"begin": pb.Address(seed=1), "end": pb.Address(seed=2)}
PADDING = b"\xfa\x7f" + b"\x80\x80\x01" + bytes(LARGE_REQUEST_BYTES)  # a field that is unknown to every message
# As unknown, and many: they would become objects.
MANY_FIELDS = b"\xf8\x7f\x01" * SMALL_BYTES


def infer_request(count: int = 1) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="mlp", id="x", raw_input_contents=[np.int32(count).tobytes()])
    request.inputs.add(name="count", datatype="INT32", shape=[1])
    return request


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any, *names: str) -> list[str]:
    """Which threads call the module's functions, in a service that is made afterwards."""
    threads: list[str] = []

    def recording(honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            threads.append(threading.current_thread().name.partition("-")[0].partition("_")[0])
            return honest(*arguments)

        return call

    for name in names:
        monkeypatch.setattr(module, name, recording(getattr(module, name)))
    return threads


RECEIVES, WORKER = "MainThread", "worker"


@pytest.mark.parametrize(
    ("method", "request_", "thread"),
    [
        ("Generate", ONE, RECEIVES),
        ("Generate", pb.GenerateRequest(latents=bytes(LATENT_SIZE * 4)), RECEIVES),
        ("Generate", ONE.SerializeToString() + PADDING, WORKER),
        ("Interpolate", pb.InterpolateRequest(**ENDS, steps=2), WORKER),
    ],
)
def test_what_takes_long_to_parse_is_not_done_where_calls_are_received(
    method: str, request_: Any, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = recorded(monkeypatch, digits_v1, "generate", "interpolate")
    with FakeService() as service:
        service.call(method, request_).ended()
    assert threads == [thread]


@pytest.mark.parametrize(("image_format", "thread"), [(pb.IMAGE_FORMAT_UINT8, INSTANCE_THREAD), (pb.IMAGE_FORMAT_PNG, WORKER)])
def test_what_takes_long_to_encode_is_not_done_where_batches_are_run(
    image_format: pb.ImageFormat, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits_v1, "as_pngs", lambda digits: [b""])
    threads = recorded(monkeypatch, digits_v1, "_encode")
    with FakeService() as service:
        wire = service.call("Generate", pb.GenerateRequest(count=2, format=image_format))
        assert wire.ended() is Code.OK
    assert threads == [thread]


@pytest.mark.parametrize("name", ["generate", "_encode"])
@pytest.mark.parametrize("padding", [b"", PADDING])
def test_a_mistake_of_the_servers_leaves_no_caller_waiting(name: str, padding: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(digits_v1, name, broken)
    with FakeService() as service:
        wire = SlowWire()
        service.call("Generate", ONE.SerializeToString() + padding, wire)
        assert wire.ended() is Code.INTERNAL
        assert "secret" not in wire.text
        wire.taken()
        assert (service.budget.held_bytes, len(service.admission.open), service.model.in_use.calls) == (0, 0, 0)


@pytest.mark.parametrize(
    ("service_name", "method"),
    [
        (digits_v1.SERVICE, "Generate"),
        (digits_v1.SERVICE, "GenerateStream"),
        (digits_v1.SERVICE, "ListModels"),
        (open_inference.SERVICE, "ModelInfer"),
        (open_inference.SERVICE, "ServerLive"),
    ],
)
def test_what_would_become_many_objects_is_not_parsed(service_name: str, method: str) -> None:
    with FakeService() as service:
        wire = service.call(method, MANY_FIELDS, service=service_name)
        assert wire.ended() is Code.INVALID_ARGUMENT
        assert str(SMALL_BYTES) in wire.text
        wire = service.call(method, b"\x0a\xff", service=service_name)
        assert wire.ended() is Code.INVALID_ARGUMENT


def test_what_a_call_holds_is_given_back_when_its_answer_is_sent_and_not_when_it_is_made() -> None:
    with FakeService() as service:
        wire = SlowWire()
        service.call("Generate", ONE, wire)
        assert wire.ended() is Code.OK
        assert service.budget.held_bytes >= 3 * 784
        assert len(service.admission.open) == 1
        wire.taken()
        wire.taken()  # the port may say it again
        assert (service.budget.held_bytes, len(service.admission.open)) == (0, 0)


def test_what_a_call_holds_counts_its_request_and_its_rows_as_they_are_sent() -> None:
    held: dict[str, int] = {}
    with FakeService() as service:
        calls: dict[str, tuple[str, str, Any]] = {
            "one": (digits_v1.SERVICE, "Generate", ONE),
            "ten": (digits_v1.SERVICE, "Generate", pb.GenerateRequest(count=10, seed=7)),
            "ten float32": (digits_v1.SERVICE, "Generate", pb.GenerateRequest(count=10, format=pb.IMAGE_FORMAT_FLOAT32)),
            "64": (digits_v1.SERVICE, "Generate", pb.GenerateRequest(count=64)),
            "own latents": (digits_v1.SERVICE, "Generate", pb.GenerateRequest(latents=bytes(64 * LATENT_SIZE * 4))),
            "ten over Open Inference": (open_inference.SERVICE, "ModelInfer", infer_request(10)),
        }
        for name, (service_name, method, request) in calls.items():
            wire = SlowWire()
            service.call(method, request, wire, service_name)
            wire.ended()
            held[name] = service.budget.held_bytes
            wire.taken()
    assert held["one"] >= 2 * 784
    assert held["ten"] >= 9 * 2 * 784 + held["one"]
    assert held["ten float32"] >= 3.5 * held["ten"]
    assert held["own latents"] >= held["64"] + 2 * 64 * LATENT_SIZE * 4
    assert held["ten over Open Inference"] >= held["ten"]


def test_a_full_budget_refuses_at_once_and_holds_nothing_for_it() -> None:
    with FakeService(budget_bytes=10_000) as service:
        first = SlowWire()
        service.call("Generate", ONE, first).ended()
        held = service.budget.held_bytes
        assert service.call("Generate", pb.GenerateRequest(count=4)).ended() is Code.RESOURCE_EXHAUSTED
        stream = service.call("GenerateStream", pb.GenerateStreamRequest(count=4))
        assert stream.ended() is Code.RESOURCE_EXHAUSTED
        assert service.budget.held_bytes == held
        first.taken()
        assert service.budget.held_bytes == 0


class Reader(FakeWire):
    """Sends so many requests of a stream, and takes an answer whenever ``reads`` is set."""

    def __init__(self, service: FakeService, requests: int) -> None:
        super().__init__(streamed=(infer_request().SerializeToString(),) * requests)
        self.reads = asyncio.Event()
        self.held: list[int] = []  # bytes, when an answer begins to be sent
        self.pulled = 0
        self._service = service

    async def requests(self) -> AsyncIterator[bytes]:
        async for request in super().requests():
            self.pulled += 1
            yield request

    async def send(self, message: bytes) -> None:
        self.held.append(self._service.budget.held_bytes)
        await self.reads.wait()
        await super().send(message)


@pytest.mark.parametrize("leaves", [False, True])
def test_answers_of_a_stream_are_held_until_each_is_sent_and_are_bounded(leaves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: the answers ahead of a caller who did not read were counted by nobody."""
    monkeypatch.setattr(open_inference, "STREAM_AHEAD", 2)

    async def scenario() -> None:
        wire = Reader(service, 20)
        task = service.methods[f"/{open_inference.SERVICE}/ModelStreamInfer"].task
        assert task is not None
        answering = asyncio.create_task(task(wire, None))

        def ahead() -> bool:
            return wire.pulled >= 4 and not service.batcher.queued_images + service.batcher.running_images

        await asyncio.to_thread(wait_until, ahead)
        for _ in range(100):
            await asyncio.sleep(0)
        assert wire.pulled == 4, "one is sent, two are under way, and one waits for its place"
        assert service.budget.held_bytes == 4 * each > 0
        if leaves:
            answering.cancel()
            await asyncio.wait([answering])
        else:
            wire.reads.set()
            await answering
            assert len(wire.answers) == 20
            assert service.budget.held_bytes == 0
            assert max(wire.held) <= 5 * each, "what has been sent is held no longer"
            assert min(wire.held) >= each, "what has not been sent is held, whatever else has been sent"

    with FakeService() as service:
        alone = SlowWire()
        service.call("ModelInfer", infer_request(), alone, open_inference.SERVICE).ended()
        each = service.budget.held_bytes
        alone.taken()
        asyncio.run(scenario())
        assert service.model.in_use.calls == 0
        assert service.budget.held_bytes == 0


def test_a_wrong_request_of_a_stream_is_answered_and_counted_as_little_as_any() -> None:
    wire = FakeWire(streamed=(MANY_FIELDS, b"\x0a\xff", infer_request().SerializeToString()))
    with FakeService() as service:
        service.call("ModelStreamInfer", b"", wire, open_inference.SERVICE)
        assert wire.ended() is Code.OK
        large, broken, good = map(oip.ModelStreamInferResponse.FromString, wire.answers)
        assert str(SMALL_BYTES) in large.error_message
        assert broken.error_message
        assert good.infer_response.id == "x"
        assert not good.error_message
        service.metrics.collect()
        labels = {"model": "mlp", "version": "1", "format": "uint8"}
        assert service.metrics.registry.get_sample_value("digits_images_total", labels) == 1


@pytest.mark.parametrize("field", ["inputs", "outputs", "parameters"])
def test_a_request_has_so_many_tensors_and_parameters_and_no_more(field: str) -> None:
    request = infer_request()
    for number in range(100):
        if field == "parameters":
            request.parameters[f"p{number}"].int64_param = 1
        else:
            getattr(request, field).add(name=f"t{number}")
    with FakeService() as service:
        wire = service.call("ModelInfer", request, service=open_inference.SERVICE)
        assert wire.ended() is Code.INVALID_ARGUMENT
        assert wire.text.startswith(f"{field} must have at most")


def test_log_lines_carry_a_calls_ids_inside_it_and_not_afterwards() -> None:
    with FakeService() as service:
        observed = RpcMetrics(service.metrics, "unary", "a.B", "C")
        call = Call(service.admission, observed, Caller(request_id="ticket-4711"), None)
        before = current_call.get()
        assert call.within(current_call.get) == ("ticket-4711", "")
        assert current_call.get() == before


def test_a_call_is_traced_with_what_its_caller_sent() -> None:
    seen: list[Any] = []

    class FakeTracing:
        def begin(self, describe: Any, context: Any) -> Any:
            seen.append((*describe(), dict(context)))
            return "4bf9", Span()

    class Span:
        def about(self, *asked: Any) -> None:
            seen.append(asked)

        def phases(self, *figures: float) -> None:
            seen.append(("phases", figures[-1]))

        def end(self, code: str, http_status: int, reason: str) -> None:
            seen.append((code, http_status, reason))

    wire = FakeWire()
    wire.metadata = (
        ("traceparent", "00-1-2-01"),
        ("binary-bin", b"\xff"),
        ("x", "y"),
        ("tracestate", "a=b"),
        ("tracestate", "c=d"),
    )
    with FakeService(tracing=FakeTracing()) as service:
        service.call("Generate", ONE, wire).ended()
    about = {"rpc.system.name": "grpc", "rpc.method": f"{digits_v1.SERVICE}/Generate", "client.address": "192.0.2.1"}
    assert seen == [
        (
            f"{digits_v1.SERVICE}/Generate",
            about | {"server.address": "digits.test", "server.port": 50051},
            False,
            {"traceparent": "00-1-2-01", "tracestate": "a=b,c=d"},
        ),
        ("", 0, 1),
        ("mlp", 1),
        ("phases", 1),
        ("OK", 200, ""),
    ]
    assert caller_of(wire).trace == {}
