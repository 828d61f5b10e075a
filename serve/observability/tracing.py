"""OpenTelemetry spans of a request and of its phases: queue, compute, encode. Off, at no cost, unless an endpoint is set.

They are made by OpenTelemetry's API, from times that the server takes anyway; which thread runs a call does not change by it.
``OTEL_EXPORTER_OTLP_ENDPOINT`` turns it on; the other ``OTEL_`` variables work as in OpenTelemetry's documentation.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.command_line import release
from serve.errors import SettingsError

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
# Statuses that are the server's own fault (OpenTelemetry, semantic conventions for gRPC).
SERVER_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}


class Span:
    """A call's span, and its phases as children."""

    def __init__(self, tracer: Any, span: Any, context: Any) -> None:
        self._tracer, self._span, self._context = tracer, span, context
        self.trace_id = f"{span.get_span_context().trace_id:032x}"

    def phases(self, queued_at: float, queue_s: float, compute_s: float, encode_s: float, images: int) -> None:
        """Queue, compute and encode, which ends now. ``queued_at`` on time.monotonic()."""
        end = time.time()
        queued = queued_at + end - time.monotonic()
        labels = {"digits.images": images}
        self._child("queue", queued, queued + queue_s, labels)
        self._child("compute", queued + queue_s, end - encode_s, labels | {"digits.compute_seconds": compute_s})
        self._child("encode", end - encode_s, end, labels)

    def end(self, code: str) -> None:
        """The call has ended with a status of gRPC's."""
        from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415  # an extra

        self._span.set_attribute("rpc.grpc.status_code", code)
        if code in SERVER_FAULTS:
            self._span.set_status(Status(StatusCode.ERROR, code))
        self._span.end()

    def _child(self, name: str, start_s: float, end_s: float, attributes: Mapping[str, float]) -> None:
        span = self._tracer.start_span(name, self._context, start_time=int(start_s * 1e9), attributes=attributes)
        span.end(end_time=int(end_s * 1e9))


@dataclass(frozen=True)
class Tracing:
    """Makes a span for each call, in its caller's trace if its metadata name one (W3C Trace Context)."""

    tracer: Any
    provider: Any

    def begin(self, name: str, metadata: Mapping[str, str]) -> Span:
        """The span of a call of ``name``, as ``service/method``."""
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415  # an extra
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        parent = TraceContextTextMapPropagator().extract(metadata)
        service, _, method = name.partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        if service == "http":
            name, attributes = method, {"http.route": method}
        span = self.tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        return Span(self.tracer, span, set_span_in_context(span, parent))

    def shut_down(self) -> None:
        """Send what has not been sent."""
        self.provider.shutdown()


def set_up(environment: Mapping[str, str]) -> Tracing | None:
    """Tracing if there is an endpoint to send to. Raises SettingsError when the packages for it are missing."""
    if not environment.get(ENDPOINT_VARIABLE):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  # an extra
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        raise SettingsError(f"{ENDPOINT_VARIABLE} is set, but the tracing extra is not installed; do either") from None
    named = {} if "OTEL_SERVICE_NAME" in environment else {"service.name": "digits-serve"}
    provider = TracerProvider(resource=Resource.create({"service.version": release(), **named}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider.get_tracer("digits-serve"), provider)
