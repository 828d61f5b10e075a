"""OpenTelemetry spans of a request and of its phases: queue, compute, encode. Off, at no cost, unless an endpoint is set.

The maintained gRPC instrumentation makes the request's span, with the caller's W3C context from the metadata; the
phases are added afterwards from times that the server takes anyway. ``OTEL_EXPORTER_OTLP_ENDPOINT`` turns it on; the
other ``OTEL_`` variables work as in OpenTelemetry's documentation.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import SettingsError
from serve.settings import release

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"


@dataclass(frozen=True)
class Tracing:
    """``interceptor`` goes to the gRPC server; ``phases`` is called once a request's rows are encoded."""

    interceptor: Any
    tracer: Any
    provider: Any

    def phases(self, queued_at: float, queue_s: float, compute_s: float, encode_s: float, images: int) -> None:
        """Queue, compute and encode, which ends now, as children of the current span. ``queued_at`` on time.monotonic()."""
        to_epoch_s = time.time() - time.monotonic()
        end = time.time()
        taken = queued_at + queue_s + to_epoch_s
        labels = {"digits.images": images}
        self._span("queue", queued_at + to_epoch_s, taken, labels)
        self._span("compute", taken, end - encode_s, labels | {"digits.compute_seconds": compute_s})
        self._span("encode", end - encode_s, end, labels)

    def _span(self, name: str, start_s: float, end_s: float, attributes: Mapping[str, float]) -> None:
        span = self.tracer.start_span(name, start_time=int(start_s * 1e9), attributes=attributes)
        span.end(end_time=int(end_s * 1e9))

    def shut_down(self) -> None:
        """Send what has not been sent."""
        self.provider.shutdown()


def set_up(environment: Mapping[str, str]) -> Tracing | None:
    """Tracing if there is an endpoint to send to. Raises SettingsError when the packages for it are missing."""
    if not environment.get(ENDPOINT_VARIABLE):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  # an extra
        from opentelemetry.instrumentation.grpc import aio_server_interceptor  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        raise SettingsError(f"{ENDPOINT_VARIABLE} is set, but the tracing extra is not installed; do either") from None
    named = {} if "OTEL_SERVICE_NAME" in environment else {"service.name": "digits-serve"}
    provider = TracerProvider(resource=Resource.create({"service.version": release(), **named}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(aio_server_interceptor(tracer_provider=provider), provider.get_tracer("digits-serve"), provider)


def current_trace_id() -> str:
    """The current span's trace, hexadecimal; empty without one."""
    try:
        from opentelemetry import trace  # noqa: PLC0415  # an extra
    except ImportError:
        return ""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""
