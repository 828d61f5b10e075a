"""Log lines carry the ids of the request that they belong to."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from serve.observability.logs import JsonFormatter, current_call
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from tests.collector import Collector
from tests.server_process import ServerProcess

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = ("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01")


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
