"""Spans as a collector sees them: one for each call, in its caller's trace, over gRPC and HTTP; and OpenTelemetry's variables."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from serve.client import DigitClient
from serve.errors import SettingsError
from serve.observability import tracing
from serve.observability.tracing import Described
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from serve.server import DRAIN_OVERHEAD_S
from tests.collector import Collector, attributes
from tests.server_process import ServerProcess

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES = [f"{number:032x}" for number in range(1, 9)]
PARENT = "b7ad6b7169203331"


def traceparent(trace: str, flags: str = "01") -> tuple[str, str]:
    return "traceparent", f"00-{trace}-{PARENT}-{flags}"


def ask(server: ServerProcess, path: str, trace: str, body: bytes | None = None) -> int:
    """The status of an HTTP call in a trace."""
    request = urllib.request.Request(f"http://{server.http}{path}", body, dict([traceparent(trace)]))
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_grpc_calls_span_is_in_its_callers_trace_with_its_phases(
    collecting: Collector, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server(environment={ENDPOINT: collecting.endpoint})
    with grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        ids = (traceparent(TRACES[0]), ("tracestate", "vendor=a"), ("tracestate", "other=b"))
        answer = stub.Generate(pb.GenerateRequest(model="mlp", count=300, seed=1), metadata=ids, timeout=20)
        # Of a long stream not all chunks are spans, and the sums are there.
        asked = pb.GenerateStreamRequest(count=200, chunk=5)
        chunks = list(stub.GenerateStream(asked, metadata=(traceparent(TRACES[1]),), timeout=20))
        for trace, request in ((2, pb.GenerateRequest(model="mlp", count=9999)), (3, pb.GenerateRequest(count=1, model="vae"))):
            with pytest.raises(grpc.RpcError):
                stub.Generate(request, metadata=(traceparent(TRACES[trace]),), timeout=20)
        load = channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelLoad")
        with pytest.raises(grpc.RpcError):
            load(b"", metadata=(traceparent(TRACES[4]),), timeout=20)
        stub.Generate(pb.GenerateRequest(count=1), metadata=(traceparent(TRACES[5], "00"),), timeout=20)
    assert server.terminate()[0] == 0, "what has not been sent is sent at the end"
    assert collecting.resource["service.name"] == "digits-serve"
    assert collecting.resource["service.version"]
    spans = {span.trace_id.hex(): span for span in collecting.of_servers()}
    assert sorted(spans) == TRACES[:5], "one for each call that is sampled, and no others"
    assert len(collecting.of_servers()) == 5
    assert {span.parent_span_id.hex() for span in spans.values()} == {PARENT}
    one, stream, over, unknown, unsupported = (spans[trace] for trace in TRACES[:5])
    assert one.name == "digits.v1.DigitGenerator/Generate"
    assert one.trace_state == "vendor=a,other=b"
    about = attributes(one)
    queue_s, compute_s = about.pop("digits.queue_seconds"), about.pop("digits.compute_seconds")
    assert about == {
        "rpc.system.name": "grpc",
        "rpc.method": "digits.v1.DigitGenerator/Generate",
        "rpc.response.status_code": "OK",
        "server.address": "127.0.0.1",
        "server.port": int(server.target.rpartition(":")[2]),
        "client.address": "127.0.0.1",
        "digits.model": "mlp",
        "digits.version": 1,
        "digits.count": 300,
        "digits.answers": 1,
    }
    assert (queue_s, compute_s) == (answer.timing.queue_seconds, answer.timing.compute_seconds)
    assert_phases(one, collecting, 300)
    assert len(collecting.children(stream)) == 3 * tracing.MOST_ANSWERS
    about = attributes(stream)
    assert (about["digits.model"], about["digits.count"], about["digits.answers"]) == ("rpgan", 200, len(chunks))
    assert about["digits.compute_seconds"] == pytest.approx(sum(chunk.timing.compute_seconds for chunk in chunks))
    # The caller's own mistake is no error of the server's.
    for span, code, reason, model, count in (
        (over, "INVALID_ARGUMENT", "INVALID_REQUEST", "mlp", 9999),
        (unknown, "NOT_FOUND", "UNKNOWN_MODEL", "vae", 1),
    ):
        about = attributes(span)
        assert (about["rpc.response.status_code"], about["digits.reason"]) == (code, reason)
        assert (about["digits.model"], about["digits.count"]) == (model, count)
        assert span.status.code == Status.STATUS_CODE_UNSET
        assert "error.type" not in about
    assert unsupported.status.code == Status.STATUS_CODE_ERROR
    assert attributes(unsupported)["error.type"] == "UNIMPLEMENTED"


def test_what_callers_send_as_trace_context_is_not_logged(
    collecting: Collector, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server(environment={ENDPOINT: collecting.endpoint})
    long_parent = "traceparent", f"{traceparent(TRACES[0])[1].replace('00-', 'fe-', 1)}-{'secret' * 100}"
    with grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        for ids in (
            (traceparent(TRACES[0]), ("tracestate", "secret" * 1000)),
            (traceparent(TRACES[0]), ("tracestate", ",".join(f"secret{number}=1" for number in range(99)))),
            (long_parent,),
        ):
            stub.Generate(pb.GenerateRequest(count=1), metadata=ids, timeout=20)
    log = server.terminate()[1]
    assert "secret" not in log
    assert "opentelemetry.trace" not in log, "nor a line for each call"


def assert_phases(span: Span, collecting: Collector, count: int) -> None:
    """Queue, compute and encode follow one another within the call."""
    phases = {child.name: child for child in collecting.children(span)}
    assert list(phases) == ["queue", "compute", "encode"]
    queue, compute, encode = phases.values()
    assert queue.end_time_unix_nano == compute.start_time_unix_nano
    assert compute.end_time_unix_nano == encode.start_time_unix_nano
    slack = 2_000_000  # two clocks
    assert span.start_time_unix_nano - slack <= queue.start_time_unix_nano
    assert encode.end_time_unix_nano <= span.end_time_unix_nano + slack
    assert attributes(compute)["digits.count"] == count


def test_each_http_call_has_one_server_span_in_its_callers_trace(
    collecting: Collector, start_server: Callable[..., ServerProcess]
) -> None:
    """Issue: two calls with a traceparent made six roots in six traces."""
    server = start_server(environment={ENDPOINT: collecting.endpoint})
    body = json.dumps({"inputs": [{"name": "count", "datatype": "INT32", "shape": [1], "data": [2]}]}).encode()
    assert ask(server, "/v1/digits?model=mlp&count=3", TRACES[0]) == 200
    assert ask(server, "/v2/models/mlp/infer", TRACES[1], body) == 200
    assert ask(server, "/v1/digits?model=vae", TRACES[2]) == 404
    assert server.terminate()[0] == 0
    spans = {span.trace_id.hex(): span for span in collecting.of_servers()}
    assert sorted(spans) == TRACES[:3]
    assert len(collecting.spans) == 3 + 2 * 3, "three calls, and the phases of two"
    assert all(span.parent_span_id for span in collecting.spans), "no roots"
    digits, inference, unknown = (spans[trace] for trace in TRACES[:3])
    about = attributes(digits)
    assert about.pop("user_agent.original").startswith("Python-urllib")
    assert about.pop("digits.queue_seconds") >= 0
    assert about.pop("digits.compute_seconds") > 0
    assert digits.name == "GET /v1/digits"
    host, _, port = server.http.rpartition(":")
    assert about == {
        "http.request.method": "GET",
        "http.route": "/v1/digits",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "url.path": "/v1/digits",
        "url.query": "model=mlp&count=3",
        "network.protocol.version": "1.1",
        "server.address": host,
        "server.port": int(port),
        "client.address": "127.0.0.1",
        "digits.model": "mlp",
        "digits.version": 1,
        "digits.count": 3,
        "digits.answers": 1,
    }
    assert_phases(digits, collecting, 3)
    assert inference.name == "POST /v2/models/{model}/infer"
    assert attributes(inference)["url.path"] == "/v2/models/mlp/infer"
    assert_phases(inference, collecting, 2)
    about = attributes(unknown)
    assert (about["http.response.status_code"], about["digits.reason"], about["digits.model"]) == (404, "UNKNOWN_MODEL", "vae")
    assert unknown.status.code == Status.STATUS_CODE_UNSET


def test_the_client_health_watches_reflection_and_streams_work_while_calls_are_traced(
    collecting: Collector, start_server: Callable[..., ServerProcess]
) -> None:
    """Issue: with an endpoint set, our own client could not call at all, and Watch was INTERNAL."""
    server = start_server(environment={ENDPOINT: collecting.endpoint})
    with DigitClient(server.target) as client:
        assert len(client.generate(2, model="mlp").pixels) == 2
        assert sum(len(chunk.pixels) for chunk in client.stream(30, model="mlp", chunk=10)) == 30
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=20)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=20).status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        [listed] = reflection.ServerReflectionInfo(iter([request]), timeout=20)
        assert "digits.v1.DigitGenerator" in {each.name for each in listed.list_services_response.service}
    assert server.terminate()[0] == 0
    names = [span.name for span in collecting.of_servers()]
    assert {"digits.v1.DigitGenerator/Generate", "digits.v1.DigitGenerator/GenerateStream"} <= set(names)


@contextmanager
def silent() -> Iterator[int]:
    """The port of a collector that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@contextmanager
def gone() -> Iterator[int]:
    """The port of one that has ended."""
    with silent() as port:
        pass
    yield port


@pytest.mark.parametrize("collector", [silent, pytest.param(gone, marks=pytest.mark.long)])
def test_a_collector_that_does_not_take_spans_holds_neither_calls_nor_the_end_up(
    collector: Any, start_server: Callable[..., ServerProcess]
) -> None:
    """Issue: stopping took 30.3 s."""
    with collector() as port:
        server = start_server("--drain-deadline-s=1", environment={ENDPOINT: f"http://127.0.0.1:{port}"})
        assert ask(server, "/v1/digits?model=mlp", TRACES[0]) == 200
        began = time.monotonic()
        assert server.terminate()[0] == 0
        assert time.monotonic() - began < 1 + DRAIN_OVERHEAD_S


def traced(monkeypatch: pytest.MonkeyPatch, context: dict[str, str], **environment: str) -> bool:
    """Whether a call in that trace context has a span, with these variables, and has sent it."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_up = tracing.set_up(os.environ)
    if set_up is None:
        return False
    _, span = set_up.begin(lambda: Described("a.B/C", {}), context)
    if span is not None:
        span.end("OK", 200)
    set_up.shut_down()
    return span is not None


IN_TRACE, NOT_SAMPLED = dict([traceparent(TRACES[0])]), dict([traceparent(TRACES[0], "00")])


@pytest.mark.parametrize(
    ("environment", "context", "sent"),
    [
        ({}, IN_TRACE, True),
        ({}, NOT_SAMPLED, False),
        ({}, {}, True),
        ({}, {"traceparent": f"00-{'0' * 32}-{PARENT}-00"}, True),  # as none: no trace has that id
        ({}, {"traceparent": f"00-{TRACES[0]}-{'0' * 16}-00"}, True),
        ({}, {"traceparent": f"ff-{TRACES[0]}-{PARENT}-00"}, True),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, NOT_SAMPLED, True),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, IN_TRACE, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, IN_TRACE, True),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, {}, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, {"traceparent": "garbage"}, False),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, IN_TRACE, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, {}, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, IN_TRACE, True),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "1"}, {}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, IN_TRACE, True),
        ({"OTEL_TRACES_EXPORTER": "none"}, IN_TRACE, False),
        ({"OTEL_SDK_DISABLED": "TRUE"}, IN_TRACE, False),
        ({"OTEL_SDK_DISABLED": "false"}, IN_TRACE, True),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, IN_TRACE, True),
        # What is for all signals has no effect where the same is set for traces.
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, IN_TRACE, True),
    ],
)
def test_the_documented_variables_hold(
    environment: dict[str, str], context: dict[str, str], sent: bool, collecting: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert traced(monkeypatch, context, **{ENDPOINT: collecting.endpoint}, **environment) is sent
    assert len(collecting.spans) == sent


def test_an_endpoint_of_traces_headers_and_a_name_hold(collecting: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collecting.endpoint, "OTEL_EXPORTER_OTLP_HEADERS": "X-Key=secret"}
    assert traced(monkeypatch, IN_TRACE, **about, OTEL_RESOURCE_ATTRIBUTES="service.name=mine,deployment.environment.name=test")
    assert collecting.headers["x-key"] == "secret"
    assert collecting.resource["service.name"] == "mine"
    assert collecting.resource["deployment.environment.name"] == "test"
    assert traced(monkeypatch, IN_TRACE, OTEL_SERVICE_NAME="mine-too")
    assert collecting.resource["service.name"] == "mine-too"


def test_what_otlp_cannot_hold_costs_no_spans(collecting: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, collecting.endpoint)
    set_up = tracing.set_up(os.environ)
    assert set_up is not None
    _, span = set_up.begin(lambda: Described("a.B/C", {"user_agent.original": "\udcff" * 3000, "url.query": None}), IN_TRACE)
    assert span is not None
    span.about("\udcff", (1 << 64) - 1, 1 << 63)
    span.end("OK", 200)
    set_up.shut_down()
    [sent] = collecting.spans
    assert attributes(sent)["digits.version"] == str((1 << 64) - 1)
    assert len(attributes(sent)["user_agent.original"]) == tracing.MOST_CHARACTERS
    assert "url.query" not in attributes(sent)


def test_without_an_endpoint_nothing_is_set_up() -> None:
    assert tracing.set_up({}) is None
    assert tracing.set_up({ENDPOINT: "", "OTEL_TRACES_SAMPLER": "never"}) is None


@pytest.mark.parametrize(("name", "value"), [(ENDPOINT, "http://127.0.0.1:4317"), ("OTEL_TRACES_EXPORTER", "otlp")])
def test_what_turns_tracing_on_without_the_packages_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=rf"{name} is set, but .*'\.\[tracing\]', or set OTEL_SDK_DISABLED=true"):
        tracing.set_up({name: value})


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "4317"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "grpc"),
        ("OTEL_TRACES_EXPORTER", "console", "otlp or none"),
        ("OTEL_TRACES_EXPORTER", "otlp,console", "otlp or none"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote", "parentbased_traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "10%", "from 0 to 1"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5", "from 0 to 1"),
        ("OTEL_SDK_DISABLED", "yes", "true or false"),
        (ENDPOINT, "collector:4317", "http://collector:4317"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://collector:port", "http://collector:4317"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "a number above 0"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "a whole number above 0"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere/ca.pem", "must be a file"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "OTEL_SDK_DISABLED=true"),
        ("OTEL_PROPAGATORS", "b3", "tracecontext"),
        ("OTEL_CONFIG_FILE", "/etc/otel.yaml", "docs/serving.md"),
    ],
)
def test_what_cannot_hold_is_refused_by_name(name: str, value: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refused:
        tracing.set_up(os.environ)
    text = str(refused.value)
    assert name.rpartition("_")[2] in text.upper()
    assert hint in text
    assert "\n" not in text


def test_a_server_whose_variables_cannot_hold_says_so_in_one_line(start_server: Callable[..., ServerProcess]) -> None:
    with pytest.raises(AssertionError, match=r"error: OTEL_EXPORTER_OTLP_PROTOCOL must be grpc, got 'http/protobuf'"):
        start_server(environment={ENDPOINT: "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"})
