"""Wraps every gRPC method: request bytes in, response bytes out. Knows grpcio's context, but no service.

Handlers take and return bytes, so that a request that cannot be parsed is INVALID_ARGUMENT. grpcio itself would answer
INTERNAL.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from serve.access.identity import Caller, Scope
from serve.api.admission import Admission, Call
from serve.errors import RequestError
from serve.observability.logs import REQUEST_ID_KEY
from serve.observability.metrics import RpcMetrics
from serve.ports.load_report import METADATA_KEY

PUSHBACK_KEY = "grpc-retry-pushback-ms"

RequestT = TypeVar("RequestT", bound=Message)
GivenT = TypeVar("GivenT")  # a request's bytes, or a stream of them
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RpcTable:
    """A service's ``methods`` by name, as a server takes them. ``scope`` is what a caller needs for a method.

    Those in ``stepped`` need no event loop: ``serve.waiting.Steps`` can run them.
    """

    def __init__(self, service: str, admission: Admission) -> None:
        self.service = service
        self._admission = admission
        self.methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self.stepped: set[str] = set()

    def unary(
        self,
        method: str,
        request_type: type[RequestT],
        answer: Callable[[RequestT, Call], Awaitable[bytes]],
        scope: Scope = "generate",
        *,
        stepped: bool = False,
    ) -> None:
        """Add a method with one answer."""
        observed = RpcMetrics(self._admission.metrics, "unary", self.service, method)
        if stepped:
            self.stepped.add(method)

        async def handle(raw: bytes, context: Context) -> bytes:
            call = self._begin(observed, context)
            try:
                call.admit(caller_of(context), scope)
                response = await answer(parse(request_type, raw), call)
                call.answered()
                self._report_load(context)
                return response
            except Exception as error:
                await self._abort(context, call, error)
                raise  # abort has raised already
            finally:
                call.ended()
                call.sent()  # handed to grpcio, whose own stopping waits until it is written

        self.methods[method] = grpc.unary_unary_rpc_method_handler(handle)

    def stream(
        self,
        method: str,
        request_type: type[RequestT],
        answers: Callable[[RequestT, Call], AsyncIterator[bytes]],
        scope: Scope = "generate",
    ) -> None:
        """Add a method with a stream of answers."""

        def answered(raw: bytes, call: Call) -> AsyncIterator[bytes]:
            return answers(parse(request_type, raw), call)

        handle = self._streaming("server_stream", method, answered, scope)
        self.methods[method] = grpc.unary_stream_rpc_method_handler(handle)

    def bidirectional(
        self,
        method: str,
        answers: Callable[[AsyncIterator[bytes], Call], AsyncIterator[bytes]],
        scope: Scope = "generate",
    ) -> None:
        """Add a method with a stream of requests, given as they lie on the wire, and one of answers."""
        handle = self._streaming("bidi_stream", method, answers, scope)
        self.methods[method] = grpc.stream_stream_rpc_method_handler(handle)

    def _streaming(
        self, kind: str, method: str, answers: Callable[[GivenT, Call], AsyncIterator[bytes]], scope: Scope
    ) -> Callable[[GivenT, Context], AsyncIterator[bytes]]:
        """What grpcio calls for a method whose answers are a stream."""
        observed = RpcMetrics(self._admission.metrics, kind, self.service, method)

        async def handle(given: GivenT, context: Context) -> AsyncIterator[bytes]:
            call = self._begin(observed, context)
            try:
                call.admit(caller_of(context), scope)
                async for response in answers(given, call):
                    call.check_again()  # a token may have been revoked since
                    yield response
                call.answered()
                self._report_load(context)
            except Exception as error:
                await self._abort(context, call, error)
            finally:
                call.ended()
                call.sent()  # handed to grpcio, whose own stopping waits until it is written

        return handle

    async def _abort(self, context: Context, call: Call, error: Exception) -> None:
        """End a call with the status of an error. Always raises."""
        answer = call.failed(error)
        trailing: tuple[tuple[str, str], ...] = ()
        if answer.retry_after_s is not None:
            trailing = ((PUSHBACK_KEY, str(max(1, round(answer.retry_after_s * 1000)))),)
        await context.abort(answer.code, answer.text, trailing)

    def _report_load(self, context: Context) -> None:
        if self._admission.load_reports is not None:
            context.set_trailing_metadata(((METADATA_KEY, self._admission.load_reports.answered()),))

    def _begin(self, observed: RpcMetrics, context: Context) -> Call:
        remaining = context.time_remaining()
        return Call(self._admission, observed, None if remaining is None else time.monotonic() + remaining)


def caller_of(context: Context) -> Caller:
    """Who calls, by the call's peer and metadata."""
    authorization: list[str | bytes] = []
    request_id = ""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            authorization.append(value)
        elif key == REQUEST_ID_KEY and isinstance(value, str) and not request_id:
            request_id = value
    return Caller(context.peer, authorization, request_id)


def parse(request_type: type[RequestT], raw: bytes) -> RequestT:
    """A message. Raises RequestError when the bytes are none."""
    try:
        return request_type.FromString(raw)
    except DecodeError:
        raise RequestError(f"the request is not a valid {request_type.DESCRIPTOR.full_name} message") from None
