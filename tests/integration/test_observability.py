"""Traces and logs as a collector sees them: a request's spans hang together, and its lines carry its ids."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from serve.errors import SettingsError
from serve.observability import tracing
from serve.observability.logs import JsonFormatter, current_call
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from serve.server import DRAIN_OVERHEAD_S
from tests.server_process import ServerProcess

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")


class Collector(collector_grpc.TraceServiceServicer):
    """Keeps what is sent to it over OTLP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        collector_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  # the RPC's name
        for group in request.resource_spans:
            self.resource |= {each.key: each.value.string_value for each in group.resource.attributes}
            self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return collector.ExportTraceServiceResponse()

    def stop(self) -> threading.Event:
        return self._server.stop(0)


@pytest.fixture
def collecting() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.stop().wait(10)


def test_a_requests_spans_hang_together_and_follow_the_callers_trace(
    collecting: Collector, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server(environment={"OTEL_EXPORTER_OTLP_ENDPOINT": collecting.endpoint})
    with grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        answer = stub.Generate(pb.GenerateRequest(model="mlp", count=300, seed=1), metadata=(TRACEPARENT,), timeout=20)
        chunks = list(stub.GenerateStream(pb.GenerateStreamRequest(model="mlp", count=40, chunk=20), timeout=20))
        with pytest.raises(grpc.RpcError):
            stub.Generate(pb.GenerateRequest(count=0), timeout=20)
    assert server.terminate()[0] == 0, "what has not been sent is sent at the end"
    assert collecting.resource["service.name"] == "digits-serve"
    [request] = [span for span in collecting.spans if span.trace_id.hex() == TRACE_ID and span.parent_span_id.hex() == PARENT_ID]
    assert request.name == "digits.v1.DigitGenerator/Generate"
    phases = {span.name: span for span in collecting.spans if span.parent_span_id == request.span_id}
    assert list(phases) == ["queue", "compute", "encode"]
    assert phases["queue"].end_time_unix_nano == phases["compute"].start_time_unix_nano
    assert phases["compute"].end_time_unix_nano == phases["encode"].start_time_unix_nano
    slack = 2_000_000  # two clocks
    assert request.start_time_unix_nano - slack <= phases["queue"].start_time_unix_nano
    assert phases["encode"].end_time_unix_nano <= request.end_time_unix_nano + slack
    computed = {each.key: each.value for each in phases["compute"].attributes}
    assert computed["digits.images"].int_value == 300
    assert computed["digits.compute_seconds"].double_value == pytest.approx(answer.timing.compute_seconds)
    [stream] = [span for span in collecting.spans if span.name.endswith("GenerateStream")]
    assert len([span for span in collecting.spans if span.parent_span_id == stream.span_id]) == 3 * len(chunks)
    failed = [span for span in collecting.spans if span.name.endswith("/Generate") and span.status.code == 2]
    assert not failed, "the caller's own mistake is no error of the server's"


def test_json_logs_carry_the_request_and_its_trace(
    collecting: Collector, tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> None:
    (tmp_path / "tokens.json").write_text('{"tokens": []}')
    server = start_server(
        f"--tokens-file={tmp_path / 'tokens.json'}",
        "--log-format=json",
        environment={"OTEL_EXPORTER_OTLP_ENDPOINT": collecting.endpoint},
    )
    with grpc.insecure_channel(server.target) as channel:
        call, ids = pb_grpc.DigitGeneratorStub(channel).ListModels, (("x-request-id", "ticket-4711"), TRACEPARENT)
        with pytest.raises(grpc.RpcError, match="a bearer token is needed"):
            call(pb.ListModelsRequest(), metadata=ids, timeout=30)
    status, log = server.terminate()
    assert status == 0
    entries = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= entry.keys() for entry in entries)
    [denied] = [entry for entry in entries if entry["message"].startswith("denied: ")]
    assert (denied["request_id"], denied["trace_id"]) == ("ticket-4711", TRACE_ID)
    assert all("request_id" not in entry for entry in entries if entry["message"].startswith("stop"))


def test_an_internal_errors_line_has_its_request_and_trace(caplog: pytest.LogCaptureFixture) -> None:
    token = current_call.set(("ticket-4711", "4bf9"))
    try:
        try:
            raise KeyError("planted")
        except KeyError:
            record = logging.LogRecord("serve.api.status", logging.ERROR, "", 0, "error %s", ("abc",), sys.exc_info())
        entry = json.loads(JsonFormatter().format(record))
    finally:
        current_call.reset(token)
    assert (entry["request_id"], entry["trace_id"]) == ("ticket-4711", "4bf9")
    assert (entry["level"], entry["message"]) == ("error", "error abc")
    assert "KeyError: 'planted'" in entry["error"]
    assert "request_id" not in json.loads(JsonFormatter().format(record))


def test_without_an_endpoint_nothing_is_set_up() -> None:
    assert tracing.set_up({}) is None
    assert tracing.set_up({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}) is None


def test_an_endpoint_without_the_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT.*tracing"):
        tracing.set_up({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"})


def test_an_http_call_is_in_its_callers_trace_and_a_silent_collector_does_not_hold_the_end_up(
    collecting: Collector, start_server: Callable[..., ServerProcess]
) -> None:
    """Issue: stopping took 30 s with a collector that was gone."""
    server = start_server(environment={"OTEL_EXPORTER_OTLP_ENDPOINT": collecting.endpoint})
    request = urllib.request.Request(f"http://{server.http}/v1/digits?model=mlp", headers=dict((TRACEPARENT,)))
    urllib.request.urlopen(request, timeout=20).close()
    assert server.terminate()[0] == 0
    [span] = [each for each in collecting.spans if each.parent_span_id.hex() == PARENT_ID]
    assert (span.name, span.trace_id.hex()) == ("/v1/digits", TRACE_ID)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        server = start_server("--drain-deadline-s=1", environment={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
        urllib.request.urlopen(f"http://{server.http}/v1/digits?model=mlp", timeout=20).close()
        began = time.monotonic()
        assert server.terminate()[0] == 0
        assert time.monotonic() - began < 1 + DRAIN_OVERHEAD_S
