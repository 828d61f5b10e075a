"""Around every RPC: request bytes in, response bytes out, metrics, and the one table from errors to status codes.

Handlers take and give bytes: a request that does not parse is then the caller's INVALID_ARGUMENT and not, as grpcio has
it by itself, the server's INTERNAL.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from serve.access.callers import Caller, Callers, Scope
from serve.errors import (
    BusyError,
    CallerLimitError,
    EngineError,
    ExpiredError,
    ForbiddenError,
    LifecycleError,
    QueueFullError,
    RequestError,
    ServeError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
)
from serve.fair_queue import Ticket
from serve.logs import current_call
from serve.metrics import Metrics, RpcMetrics
from serve.tracing import Tracing

log = logging.getLogger(__name__)

PUSHBACK_KEY = "grpc-retry-pushback-ms"

STATUS = {
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModelError: grpc.StatusCode.NOT_FOUND,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    CallerLimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
    LifecycleError: grpc.StatusCode.FAILED_PRECONDITION,
    ExpiredError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
}

RequestT = TypeVar("RequestT", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]


class Gate:
    """Counts the calls under way, and lets no more in once it is closed. For the event loop's thread alone."""

    def __init__(self) -> None:
        self._closed = False
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self) -> None:
        self._closed = True

    def enter(self) -> None:
        """Count a call in. Raises UnavailableError when the gate is closed."""
        if self._closed:
            raise UnavailableError("the server is stopping; ask another replica")
        self._calls += 1
        self._idle.clear()

    def leave(self) -> None:
        self._calls -= 1
        if not self._calls:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no call is under way; False when the time was too short."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class Door:
    """What every call of a server goes through: the gate, who may come in, the metrics."""

    def __init__(self, metrics: Metrics, gate: Gate, callers: Callers, tracing: Tracing | None = None) -> None:
        self.metrics = metrics
        self.gate = gate
        self.callers = callers
        self.tracing = tracing


class Call:
    """One call from start to end: let in, counted, timed, and its error turned into a status."""

    __slots__ = ("_context", "_door", "_entered", "_observed", "_started", "caller")

    def __init__(self, door: Door, observed: RpcMetrics, context: Context) -> None:
        self._door = door
        self._observed = observed
        self._context = context
        self._entered = False
        self._started = time.perf_counter()
        self.caller: Caller

    async def __aenter__(self) -> Call:
        self._observed.started()
        return self

    def enter(self, scope: Scope) -> None:
        """Go through the gate. Raises UnavailableError when it is closed, or as ``Callers.admit`` does."""
        current_call.set(self._context)
        self._door.gate.enter()
        self._entered = True
        self.caller = self._door.callers.admit(self._context, scope)

    def hold(self, images: int) -> AbstractContextManager[None]:
        """Count images in flight against the caller's limit. Raises CallerLimitError."""
        return self.caller.hold(images)

    def encoded(self, ticket: Ticket, encode_s: float) -> None:
        """A ticket's rows are encoded: its phases are known."""
        if self._door.tracing is not None:
            self._door.tracing.phases(ticket, encode_s)

    @property
    def deadline(self) -> float | None:
        """When the caller's deadline passes, on ``time.monotonic()``; None without one."""
        remaining = self._context.time_remaining()
        return None if remaining is None else time.monotonic() + remaining

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        code = grpc.StatusCode.OK if error is None else grpc.StatusCode.CANCELLED
        try:
            if isinstance(error, Exception):  # what else ends a call is its cancellation
                if isinstance(error, ServeError) and error.denial:
                    self._door.metrics.access_denied.labels(error.denial).inc()
                code, text, trailing = to_status(error)
                await self._context.abort(code, text, trailing)
        finally:
            if self._entered:
                self._door.gate.leave()
            self._observed.handled(code.name).inc()
            self._observed.seconds(time.perf_counter() - self._started)


class RpcTable:
    """Collects a service's methods and hands them to a server. ``scope`` is what a caller needs for a method."""

    def __init__(self, service: str, door: Door) -> None:
        self._service = service
        self._door = door
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def unary(
        self,
        method: str,
        request_type: type[RequestT],
        answer: Callable[[RequestT, Call], Awaitable[bytes]],
        scope: Scope = "generate",
    ) -> None:
        """Add a method with one answer."""
        observed = RpcMetrics(self._door.metrics, "unary", self._service, method)

        async def handle(raw: bytes, context: Context) -> bytes:
            async with Call(self._door, observed, context) as call:
                call.enter(scope)
                return await answer(_parse(request_type, raw), call)

        self._handlers[method] = grpc.unary_unary_rpc_method_handler(handle)

    def stream(
        self,
        method: str,
        request_type: type[RequestT],
        answers: Callable[[RequestT, Call], AsyncIterator[bytes]],
        scope: Scope = "generate",
    ) -> None:
        """Add a method with a stream of answers."""
        observed = RpcMetrics(self._door.metrics, "server_stream", self._service, method)

        async def handle(raw: bytes, context: Context) -> AsyncIterator[bytes]:
            async with Call(self._door, observed, context) as call:
                call.enter(scope)
                async for response in answers(_parse(request_type, raw), call):
                    yield response

        self._handlers[method] = grpc.unary_stream_rpc_method_handler(handle)

    def methods(self) -> Mapping[str, grpc.RpcMethodHandler[Any, Any]]:
        """The methods by name."""
        return self._handlers

    def handler(self) -> grpc.GenericRpcHandler:
        """The methods, for ``Server.add_generic_rpc_handlers``."""
        return grpc.method_handlers_generic_handler(self._service, self._handlers)


def to_status(error: Exception) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Code, text and trailing metadata for an error. Anything unforeseen gets a fixed text and an id; the log has the rest."""
    code = STATUS.get(type(error))
    if code is None:
        error_id = uuid.uuid4().hex[:12]
        if isinstance(error, EngineError):
            log.error("error %s: %s", error_id, error)
        else:
            log.error("error %s", error_id, exc_info=error)
        return grpc.StatusCode.INTERNAL, f"internal error {error_id}; the server's log has more", ()
    if isinstance(error, BusyError):
        return code, str(error), ((PUSHBACK_KEY, str(max(1, round(error.retry_after_s * 1000)))),)
    return code, str(error), ()


def _parse(request_type: type[RequestT], raw: bytes) -> RequestT:
    try:
        return request_type.FromString(raw)
    except DecodeError:
        raise RequestError(f"the request is not a valid {request_type.DESCRIPTOR.full_name} message") from None
