"""OpenTelemetry spans: one for each call, over gRPC and HTTP, with its phases queue, compute and encode as children.

Their names are those of the semantic conventions 1.45 for RPC and HTTP servers; ``digits.`` is before the service's own. They are
made by OpenTelemetry's API, from times that the server takes anyway; which thread runs a call does not change by it. A call that
is not sampled has no span: its cost is a look at its ``traceparent``. ``tracing_settings`` has what turns tracing on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import random
from typing import Any, NamedTuple

from serve.command_line import release
from serve.errors import SettingsError
from serve.observability.logs import mute
from serve.observability.tracing_settings import DEFAULT_SAMPLER, RATIO_VARIABLE, SAMPLER_VARIABLE, TURN_ON, wanted

SCHEMA_URL = "https://opentelemetry.io/schemas/1.45.0"
# W3C Trace Context (https://www.w3.org/TR/trace-context): version, trace, parent, flags, of which the lowest bit is "sampled".
CONTEXT_KEYS = ("traceparent", "tracestate")
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]([0-9a-f])(?:-.*)?")
# Statuses that are the server's own fault (semantic conventions for gRPC).
SERVER_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
CONTEXT_LOGGERS = ("opentelemetry.trace.span", "opentelemetry.trace.propagation.tracecontext")  # they quote what a caller sent
MOST_CHARACTERS = 1024  # of an attribute
MOST_ANSWERS = 16  # of a call whose phases are spans: a long stream's would push those of other calls out of the exporter's queue


class Described(NamedTuple):
    """A call in the terms of the semantic conventions."""

    name: str
    attributes: Mapping[str, str | int | None]
    of_http: bool = False


def trace_context(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """The caller's trace context among a call's metadata or headers, with keys in lower case."""
    context: dict[str, str] = {}
    for key, value in metadata:
        if key in CONTEXT_KEYS and isinstance(value, str):
            context[key] = f"{context[key]},{value}" if key in context else value
    return context


def exportable(attributes: Mapping[str, str | int | None]) -> dict[str, str | int | float]:
    """Those that are known, as OTLP can hold them: one that it cannot would cost all spans that are sent with it."""
    known: dict[str, str | int | float] = {}
    for name, value in attributes.items():
        if value:
            long = isinstance(value, int) and value >= 1 << 63
            known[name] = (
                value if isinstance(value, int) and not long else str(value)[:MOST_CHARACTERS].encode(errors="replace").decode()
            )
    return known


def server_of(authority: str) -> dict[str, str | int | None]:
    """The server's name and port as a caller has them."""
    host, _, port = authority.rpartition(":")
    if port.isdecimal() and len(port) <= 5:
        return {"server.address": host.strip("[]"), "server.port": int(port)}
    return {"server.address": authority.strip("[]")}


class Span:
    """A call's span, and the phases of its answers as children."""

    def __init__(self, tracer: Any, span: Any, context: Any, *, of_http: bool) -> None:
        self._tracer, self._span, self._context, self._of_http = tracer, span, context, of_http
        self._about: dict[str, str | int | float] = {}
        self._answers = self._images = 0
        self._queue_s = self._compute_s = 0.0

    def about(self, model: str, version: int, count: int | None = None) -> None:
        """Which model is asked, "" and 0 where that is open, and for how many images."""
        self._about |= exportable({"digits.model": model, "digits.version": version, "digits.count": count})

    def phases(self, queued_at: float, queue_s: float, compute_s: float, encode_s: float, images: int) -> None:
        """Queue, compute and encode of an answer, which ends now. ``queued_at`` on time.monotonic()."""
        self._answers += 1
        self._images += images
        self._queue_s += queue_s
        self._compute_s += compute_s
        if self._answers > MOST_ANSWERS:
            return
        end = time.time()
        queued = queued_at + end - time.monotonic()
        labels = {"digits.count": images}
        self._child("queue", queued, queued + queue_s, labels)
        self._child("compute", queued + queue_s, end - encode_s, labels | {"digits.compute_seconds": compute_s})
        self._child("encode", end - encode_s, end, labels)

    def end(self, code: str, http_status: int, reason: str = "") -> None:
        """The call has ended with a status of gRPC's and of HTTP's; ``reason`` is the error's."""
        from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415  # an extra

        about, status = self._about, str(http_status) if self._of_http else code
        about |= {"http.response.status_code": http_status} if self._of_http else {"rpc.response.status_code": code}
        if self._answers:
            sums = {"digits.queue_seconds": self._queue_s, "digits.compute_seconds": self._compute_s}
            about |= {"digits.count": self._images, "digits.answers": self._answers, **sums}
        if reason:
            about["digits.reason"] = reason
        if http_status >= 500 if self._of_http else code in SERVER_FAULTS:
            about["error.type"] = status
            self._span.set_status(Status(StatusCode.ERROR, code))
        self._span.set_attributes(about)
        self._span.end()

    def _child(self, name: str, start_s: float, end_s: float, attributes: Mapping[str, float]) -> None:
        span = self._tracer.start_span(name, self._context, start_time=int(start_s * 1e9), attributes=attributes)
        span.end(end_time=int(end_s * 1e9))


@dataclass(frozen=True)
class Tracing:
    """Makes a span for each call that is sampled, in its caller's trace if its metadata name one."""

    tracer: Any
    provider: Any
    sampler: str  # as OTEL_TRACES_SAMPLER has it
    roots: float = 1.0  # the share of the calls without a parent that are sampled, drawn here: the SDK takes 20 µs to say no

    def trace_of(self, context: Mapping[str, str]) -> tuple[str, bool]:
        """The id of the trace that a call is in, "" for one of its own, and whether it may be sampled."""
        parent = TRACEPARENT.fullmatch(context["traceparent"]) if "traceparent" in context else None
        if parent is None:
            return "", not self.sampler.endswith("always_off") and (self.roots == 1 or random() < self.roots)
        sampled = int(parent[2], 16) & 1 == 1 if self.sampler.startswith("parentbased") else self.sampler != "always_off"
        return parent[1], sampled

    def begin(self, describe: Callable[[], Described], context: Mapping[str, str]) -> tuple[str, Span | None]:
        """The trace's id and the span of a call; no span where it is not sampled, and no id where it would be in no trace."""
        trace_id, sampled = self.trace_of(context)
        return self._begin(describe(), context) if sampled else (trace_id, None)

    def _begin(self, described: Described, context: Mapping[str, str]) -> tuple[str, Span | None]:
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415  # an extra
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        parent = TraceContextTextMapPropagator().extract(context) if context else None
        span = self.tracer.start_span(described.name, parent, SpanKind.SERVER, exportable(described.attributes))
        trace_id = f"{span.get_span_context().trace_id:032x}"
        if not span.is_recording():
            return trace_id, None
        return trace_id, Span(self.tracer, span, set_span_in_context(span, parent), of_http=described.of_http)

    def shut_down(self) -> None:
        """Send what has not been sent."""
        self.provider.shutdown()


def set_up(environment: Mapping[str, str]) -> Tracing | None:
    """Tracing if the environment asks for it. Raises SettingsError for what cannot be had.

    ``environment`` is ``os.environ``, which OpenTelemetry's SDK reads too.
    """
    if not wanted(environment):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415  # an extra
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased  # noqa: PLC0415

        name = environment.get(SAMPLER_VARIABLE, "").strip() or DEFAULT_SAMPLER
        drawn = name == "parentbased_traceidratio"
        roots = float(environment.get(RATIO_VARIABLE, "").strip() or 1) if drawn else 1.0
        own = Resource.create({"service.name": "digits-serve", "service.version": release()})
        # At exit the SDK would wait for a silent collector once more.
        provider = TracerProvider(
            sampler=ParentBased(ALWAYS_ON) if drawn else None,  # None: as the variables have it
            resource=own.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ImportError:
        by = next(each for each in TURN_ON if environment.get(each, "").strip())
        way_out = "pip install '.[tracing]', or set OTEL_SDK_DISABLED=true"
        raise SettingsError(f"{by} is set, but the extra tracing is not installed: {way_out}") from None
    except Exception as error:
        raise SettingsError(
            f"OpenTelemetry cannot use its variables ({error}); mend them, or set OTEL_SDK_DISABLED=true"
        ) from None
    for logger in CONTEXT_LOGGERS:
        mute(logger, "a caller's trace context could not be read")
    tracer = provider.get_tracer("digits-serve", release(), SCHEMA_URL)
    return Tracing(tracer, provider, name, roots)
