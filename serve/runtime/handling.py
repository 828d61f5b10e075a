"""A call's handler, run to its end on the event loop; the same for both transports of gRPC."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Hashable
from typing import Any, NoReturn, TypeAlias

import grpc

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 4 << 20
STOPPING = "the server is stopping; ask another replica"

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]


class CallAbortedError(Exception):
    """A handler has ended its call with a status."""

    def __init__(self, code: grpc.StatusCode, text: str, trailing: Metadata) -> None:
        super().__init__(text)
        self.code, self.text, self.trailing = code, text, trailing


class Call(ABC):
    """A call, and as much of grpcio's ``ServicerContext`` as this server's handlers, health and reflection ask for."""

    __slots__ = ("metadata", "method", "trailing", "write_with")

    def __init__(self, method: str, metadata: Metadata) -> None:
        """``method`` as it goes over the wire, ``/service/method``."""
        self.method = method
        self.metadata = metadata
        self.trailing: Metadata = ()
        self.write_with: Callable[[Any], bytes] | None = None  # None: answers are bytes

    def invocation_metadata(self) -> Metadata:
        return self.metadata

    @abstractmethod
    def peer(self) -> str: ...

    @abstractmethod
    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None without one."""

    def set_trailing_metadata(self, trailing: Metadata) -> None:
        self.trailing = trailing

    async def abort(self, code: grpc.StatusCode, text: str = "", trailing: Metadata = ()) -> NoReturn:
        raise CallAbortedError(code, text, trailing or self.trailing)

    async def write(self, response: Any) -> None:
        """Send one answer of a stream; waits while the caller is behind."""
        await self.send(self.write_with(response) if self.write_with else response)

    @abstractmethod
    async def send(self, message: bytes) -> None:
        """Send one answer of a stream as it goes over the wire; waits while the caller is behind."""

    @abstractmethod
    def requests(self) -> AsyncIterator[bytes]:
        """The requests of a stream, until the caller sends no more."""

    @abstractmethod
    def end(self, code: grpc.StatusCode, text: str = "", trailing: Metadata = (), message: bytes | None = None) -> None:
        """Send the only answer, if there is one, and the status."""


class Handling:
    """The handlers at work, a task for each call. For the event loop's thread alone."""

    def __init__(self, interceptor: Any = None) -> None:
        """``interceptor``: a ``grpc.aio.ServerInterceptor`` that every handler is given to first."""
        self._interceptor = interceptor
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}

    def begin(self, key: Hashable, call: Call, handler: Handler, request: bytes | None) -> None:
        """Answer a call, which ``leave`` is told by its ``key``; ``request`` is None when its requests are a stream."""
        self._tasks[key] = asyncio.get_running_loop().create_task(self._answer(key, call, handler, request))

    def leave(self, key: Hashable) -> None:
        """The caller has left, or the deadline has passed: it has been told so."""
        if task := self._tasks.pop(key, None):
            task.cancel()

    @property
    def at_work(self) -> list[Any]:
        """The keys of the calls whose handlers have not ended."""
        return list(self._tasks)

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait until every handler has ended, or the time is over."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=timeout_s)

    def cancel_all(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()

    async def _answer(self, key: Hashable, call: Call, handler: Handler, request: bytes | None) -> None:
        """Answer a call, whatever happens: one without an answer would leave its caller waiting for ever."""
        try:
            if self._interceptor is not None:
                handler = await self._intercepted(call, handler)
            await _run(call, handler, request)
        except CallAbortedError as end:
            call.end(end.code, end.text, end.trailing)
        except asyncio.CancelledError:
            if key in self._tasks:  # the caller has not left
                call.end(grpc.StatusCode.CANCELLED, "cancelled")
        except Exception:
            log.exception("a call could not be answered")
            call.end(grpc.StatusCode.INTERNAL, "the call could not be answered")
        finally:
            self._tasks.pop(key, None)

    async def _intercepted(self, call: Call, handler: Handler) -> Handler:
        async def found(details: grpc.HandlerCallDetails) -> Handler:
            return handler

        intercepted: Handler = await self._interceptor.intercept_service(found, CallDetails(call.method, call.metadata))
        return intercepted


class CallDetails(grpc.HandlerCallDetails):
    """What handlers are found by."""

    def __init__(self, method: str, invocation_metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata = invocation_metadata


async def _run(call: Call, handler: Handler, request: bytes | None) -> None:
    read, call.write_with = handler.request_deserializer, handler.response_serializer
    behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    given: Any = call.requests() if request is None else request
    if read:
        given = _each(read, given) if request is None else read(given)
    answers = behaviour(given, call)
    if handler.response_streaming:
        if asyncio.iscoroutine(answers):  # a handler that calls ``context.write`` itself
            await answers
        else:
            async for answer in answers:
                await call.write(answer)
        call.end(grpc.StatusCode.OK)
    else:
        answer = await answers
        call.end(grpc.StatusCode.OK, message=call.write_with(answer) if call.write_with else answer)


async def _each(read: Callable[[bytes], Any], requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for request in requests:
        yield read(request)
