"""What receives spans over OTLP, as a collector does."""

from __future__ import annotations

import threading
from concurrent import futures
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(collector_grpc.TraceServiceServicer):
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, str] = {}
        self.headers: dict[str, Any] = {}
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        collector_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  # the RPC's name
        self.headers |= dict(context.invocation_metadata())
        for group in request.resource_spans:
            self.resource |= {each.key: each.value.string_value for each in group.resource.attributes}
            self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return collector.ExportTraceServiceResponse()

    def of_servers(self) -> list[Span]:
        """The spans of calls, not of their phases."""
        return [span for span in self.spans if span.kind == Span.SPAN_KIND_SERVER]

    def children(self, parent: Span) -> list[Span]:
        return [span for span in self.spans if span.parent_span_id == parent.span_id and span.trace_id == parent.trace_id]

    def stop(self) -> threading.Event:
        return self._server.stop(0)


def attributes(span: Span) -> dict[str, Any]:
    """A span's attributes by name."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "") for each in span.attributes}
