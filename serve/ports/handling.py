"""Runs a call's handler, with or without the event loop. Both gRPC transports use it."""

from __future__ import annotations

import asyncio
import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Hashable, Sequence
from typing import Any, NoReturn, TypeAlias

import grpc

from serve.waiting import Steps, until

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
    """The handlers at work. Once it is started its plain methods may be called in any thread.

    A handler is a task on the event loop, or, if it needs none, is run by ``Steps``.
    """

    def __init__(self, stepped: Collection[str], interceptor: Any = None) -> None:
        """``stepped``: the methods whose handlers need no event loop.

        ``interceptor``: a ``grpc.aio.ServerInterceptor`` that every handler is given to first; it needs the event loop.
        """
        self._stepped = frozenset() if interceptor else frozenset(stepped)
        self._interceptor = interceptor
        self._at_work: dict[Hashable, asyncio.Task[None] | Steps] = {}
        self._waiting: deque[tuple[Callable[..., object], Sequence[Any]]] = deque()  # for the event loop
        self._woken = False  # whether the event loop knows
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        """On the event loop."""
        self._loop = asyncio.get_running_loop()

    def begin(self, key: Hashable, call: Call, handler: Handler, request: bytes | None) -> None:
        """Answer a call, which ``leave`` is told by its ``key``; ``request`` is None when its requests are a stream."""
        if call.method in self._stepped:
            steps = self._at_work[key] = Steps(self._answer(key, call, handler, request))
            steps.begin()
        else:
            self.later(self._begin_task, key, call, handler, request)

    def leave(self, key: Hashable) -> None:
        """The caller has left, or the deadline has passed: it has been told so. In the thread in which the call was begun."""
        if isinstance(self._at_work.get(key), Steps):
            self._leave(key)
        else:
            self.later(self._leave, key)

    @property
    def at_work(self) -> list[Any]:
        """The keys of the calls whose handlers have not ended."""
        return list(self._at_work)

    async def wait(self, deadline: float = math.inf) -> None:
        """Wait until every handler has ended, or ``deadline`` (monotonic)."""
        await until(lambda: not self._at_work, deadline)

    def cancel_all(self) -> None:
        for handler in list(self._at_work.values()):
            handler.cancel()

    def later(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call the function on the event loop. Functions are called in the order in which they came."""
        self._waiting.append((function, arguments))
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._catch_up)

    def _catch_up(self) -> None:
        self._woken = False  # before the queue is looked at: what comes from here on wakes again
        while self._waiting:
            function, arguments = self._waiting.popleft()
            function(*arguments)

    def _begin_task(self, key: Hashable, call: Call, handler: Handler, request: bytes | None) -> None:
        self._at_work[key] = self._loop.create_task(self._answer(key, call, handler, request))

    def _leave(self, key: Hashable) -> None:
        if handler := self._at_work.pop(key, None):
            handler.cancel()

    async def _answer(self, key: Hashable, call: Call, handler: Handler, request: bytes | None) -> None:
        """Answer a call, whatever happens: one without an answer would leave its caller waiting for ever."""
        try:
            if self._interceptor is not None:
                handler = await self._intercepted(call, handler)
            await _run(call, handler, request)
        except CallAbortedError as end:
            call.end(end.code, end.text, end.trailing)
        except asyncio.CancelledError:
            if key in self._at_work:  # the caller has not left
                call.end(grpc.StatusCode.CANCELLED, "cancelled")
        except Exception:
            log.exception("a call could not be answered")
            call.end(grpc.StatusCode.INTERNAL, "the call could not be answered")
        finally:
            self._at_work.pop(key, None)

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
