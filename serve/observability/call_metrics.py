"""The metrics of calls: of a gRPC method, and of an HTTP route. A call's protocol chooses; what counts it is the same."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from serve.observability.later import Later
from serve.observability.metrics import Metrics


class CallMetrics(Protocol):
    """``started`` and ``ended`` are called once for each call."""

    @property
    def name(self) -> str:
        """The call's, for traces."""

    def started(self) -> None: ...

    def ended(self, code: str, http_status: int, seconds: float) -> None:
        """``code`` is gRPC's name, ``http_status`` what HTTP has for it."""


class RpcMetrics:
    """One gRPC method's children."""

    def __init__(self, metrics: Metrics, kind: str, service: str, method: str) -> None:
        labels = (kind, service, method)
        self.name = f"{service}/{method}"
        seconds = metrics.rpc_seconds.labels(*labels).observe
        begun = metrics.rpc_started.labels(*labels).inc
        handled = cache(lambda code: metrics.rpc_handled.labels(*labels, code).inc)

        def observe(records: Sequence[tuple[str, float]]) -> None:
            for code, calls in Tally(code for code, _ in records).items():
                handled(code)(calls)
            for _, taken_s in records:
                seconds(taken_s)

        def count(records: Sequence[None]) -> None:
            begun(len(records))

        self._started = metrics.later.setdefault(("started", *labels), Later(count))
        self._ended = metrics.later.setdefault(("ended", *labels), Later(observe))

    def started(self) -> None:
        self._started.add(None)

    def ended(self, code: str, http_status: int, seconds: float) -> None:
        self._ended.add((code, seconds))


class HttpMetrics:
    """One route's children, for one method of HTTP. ``route`` is its template: what callers send does not become a label."""

    def __init__(self, metrics: Metrics, method: str, route: str) -> None:
        self.name = f"{method} {route}"
        seconds = cache(lambda status: metrics.http_seconds.labels(method, route, str(status)).observe)

        def observe(records: Sequence[tuple[int, float]]) -> None:
            for status, taken_s in records:
                seconds(status)(taken_s)

        self._ended = metrics.later.setdefault(("http", method, route), Later(observe))

    def started(self) -> None:
        """HTTP's metrics know requests that have ended, no others."""

    def ended(self, code: str, http_status: int, seconds: float) -> None:
        self._ended.add((http_status, seconds))
