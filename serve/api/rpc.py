"""Wraps every gRPC method of the APIs: request bytes in, response bytes out. Knows no service and no port.

A method is one of two kinds. Digits with one answer are *begun*: a plain function takes the request in the thread that receives
it, and the answer is made and sent by the thread of the instance that ended its batch. Everything else is a *task* on the event
loop. What takes long in either half, because the request or the answer is large, is done by ``workers``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from serve.access.identity import Caller, Scope, peer_address
from serve.api.admission import Admission, Call
from serve.api.status import Refusal
from serve.api.wire_format import Bulk, check_size
from serve.batching.ticket import Send
from serve.core.generate import Core
from serve.core.request import Digits, DigitsRequest
from serve.errors import CallerLeftError, RequestError
from serve.observability.call_metrics import RpcMetrics
from serve.observability.logs import REQUEST_ID_KEY
from serve.observability.tracing import Described, server_of, trace_context

REQUEST_COPIES = 2  # of its bytes, in memory: as they came, and parsed
SMALL_REQUEST_BYTES = 1 << 10  # what is smaller need not be counted: so many calls cannot be open
LARGE_REQUEST_BYTES = 16 << 10  # what is larger is parsed by a worker: the thread that receives is everybody's

RequestT = TypeVar("RequestT", bound=Message)
Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]


class Wire(Protocol):
    """A call as the port has it (``serve.ports.grpc_call``)."""

    metadata: Metadata

    def peer(self) -> str: ...

    def authority(self) -> str:
        """The server's name and port as the caller has them."""
        ...

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None without one."""

    def when_over(self, sent: Callable[[], None]) -> None:
        """Have ``sent`` called once when the status has been sent, or the caller is gone."""

    def when_left(self, left: Callable[[], object]) -> None:
        """Have ``left`` called if the caller leaves before, or has left already."""

    def ending(self, code: grpc.StatusCode, text: str = "", trailing: Metadata = (), message: bytes | None = None) -> Send:
        """What sends the only answer, if there is one, and the status."""

    async def send(self, message: bytes) -> None:
        """Send one answer of a stream; waits while the caller is behind. Raises CancelledError when it has left."""

    def requests(self) -> AsyncIterator[bytes]:
        """The requests of a stream, until the caller sends no more."""


class Method(NamedTuple):
    """How the port answers a method: ``begin`` is called where requests are received, ``task`` is run on the event loop.

    Both get the call, and its request, or None where requests are a stream. Neither raises.
    """

    begin: Callable[[Wire, bytes], None] | None = None
    task: Callable[[Wire, bytes | None], Coroutine[Any, Any, None]] | None = None
    streams_requests: bool = False


class DigitsMethod(NamedTuple):
    """A method that is asked for digits and gives one answer."""

    request_type: type[Message]
    to_request: Callable[[Any, Call], DigitsRequest]  # raises ServeError
    encode: Callable[[Any, Digits], bytes]
    takes_long: Callable[[Any, Digits], bool]  # to encode
    bulk: Bulk  # the fields whose bytes are cheap to parse
    heavy: bool = False  # whether even a small request takes long to begin


class RpcTable:
    """A service's ``methods``, by the path they have on the wire. ``scope`` is what a caller needs for a method."""

    def __init__(self, service: str, admission: Admission, workers: ThreadPoolExecutor) -> None:
        self.service = service
        self.methods: dict[str, Method] = {}
        self._admission = admission
        self._workers = workers

    def digits(self, name: str, core: Core, method: DigitsMethod) -> None:
        """Add a method with one answer of digits."""
        observed = RpcMetrics(self._admission.metrics, "unary", self.service, name)

        def begin(wire: Wire, raw: bytes) -> None:
            call = self._call(wire, observed)
            try:
                call.admit("generate")
                if len(raw) > SMALL_REQUEST_BYTES:
                    call.hold.take(0, REQUEST_COPIES * len(raw))
                if method.heavy or len(raw) > LARGE_REQUEST_BYTES:
                    self._workers.submit(call.within, ask, wire, call, raw)
                else:
                    call.within(ask, wire, call, raw)
            except Exception as error:
                call.within(_refuse, wire, call, error)()

        def ask(wire: Wire, call: Call, raw: bytes) -> None:
            try:
                if len(raw) > LARGE_REQUEST_BYTES:
                    check_size(raw, method.bulk)
                message = parse(method.request_type, raw)
                request = method.to_request(message, call)
                call.asks(request)
                wire.when_left(core.begin(request, call.hold, partial(finish, wire, call, message)))
            except Exception as error:
                _refuse(wire, call, error)()

        def finish(wire: Wire, call: Call, message: Message, result: Digits | Exception) -> Send | None:
            """In the thread of the instance that ran the last of the digits."""
            if isinstance(result, Exception):
                return call.within(_refuse, wire, call, result)
            if method.takes_long(message, result):
                self._workers.submit(answer_and_send, wire, call, message, result)
                return None
            return call.within(answer, wire, call, message, result)

        def answer(wire: Wire, call: Call, message: Message, digits: Digits) -> Send:
            try:
                started = time.perf_counter()
                encoded = method.encode(message, digits)
                call.encoded(digits, time.perf_counter() - started)
                call.answered()
                return wire.ending(grpc.StatusCode.OK, message=encoded)
            except Exception as error:
                return _refuse(wire, call, error)

        def answer_and_send(wire: Wire, call: Call, message: Message, digits: Digits) -> None:
            call.within(answer, wire, call, message, digits)()

        self.methods[f"/{self.service}/{name}"] = Method(begin=begin)

    def unary(
        self,
        name: str,
        request_type: type[RequestT],
        answer: Callable[[RequestT, Call], Awaitable[bytes]],
        scope: Scope = "generate",
    ) -> None:
        """Add another method with one answer."""

        async def run(wire: Wire, call: Call, raw: bytes | None) -> bytes:
            assert raw is not None
            check_size(raw, {})
            return await answer(parse(request_type, raw), call)

        self._add("unary", name, run, scope)

    def stream(self, name: str, request_type: type[RequestT], answers: Callable[[RequestT, Call], AsyncGenerator[bytes]]) -> None:
        """Add a method with a stream of answers."""

        async def run(wire: Wire, call: Call, raw: bytes | None) -> None:
            assert raw is not None
            call.hold.take(0, REQUEST_COPIES * len(raw))
            check_size(raw, {})
            await _send_all(wire, call, answers(parse(request_type, raw), call))

        self._add("server_stream", name, run)

    def bidirectional(self, name: str, answers: Callable[[AsyncIterator[bytes], Call], AsyncGenerator[bytes]]) -> None:
        """Add a method with a stream of requests, given as they lie on the wire, and one of answers."""

        async def run(wire: Wire, call: Call, raw: bytes | None) -> None:
            await _send_all(wire, call, answers(wire.requests(), call))

        self._add("bidi_stream", name, run)

    def _add(
        self,
        kind: str,
        name: str,
        run: Callable[[Wire, Call, bytes | None], Awaitable[bytes | None]],
        scope: Scope = "generate",
    ) -> None:
        observed = RpcMetrics(self._admission.metrics, kind, self.service, name)

        async def task(wire: Wire, raw: bytes | None) -> None:
            call = self._call(wire, observed)
            call.enter_log()
            try:
                call.admit(scope)
                message = await run(wire, call, raw)
                call.answered()
                wire.ending(grpc.StatusCode.OK, message=message)()
            except asyncio.CancelledError:
                _refuse(wire, call, CallerLeftError("the caller has left, or the server has stopped"))()
                raise
            except Exception as error:
                _refuse(wire, call, error)()

        self.methods[f"/{self.service}/{name}"] = Method(task=task, streams_requests=kind == "bidi_stream")

    def _call(self, wire: Wire, observed: RpcMetrics) -> Call:
        remaining = wire.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        traced = self._admission.tracing is not None
        describe = partial(_described, wire, observed.name) if traced else None
        call = Call(self._admission, observed, caller_of(wire, traced=traced), deadline, describe)
        wire.when_over(call.sent)
        return call


async def _send_all(wire: Wire, call: Call, answers: AsyncGenerator[bytes]) -> None:
    async with aclosing(answers):
        async for answer in answers:
            call.check_again()  # a token may have been revoked since
            await wire.send(answer)


def _refuse(wire: Wire, call: Call, error: Exception) -> Send:
    """What sends the status of an error."""
    return refused(wire, call.failed(error))


def refused(wire: Wire, answer: Refusal) -> Send:
    """What sends the status of a call that failed, with what programs are told."""
    return wire.ending(answer.code, answer.text, answer.trailing())


def caller_of(wire: Wire, *, traced: bool = False) -> Caller:
    """Who calls, by the call's peer and metadata."""
    authorization: list[str | bytes] = []
    request_id = ""
    for key, value in wire.metadata:
        if key == "authorization":
            authorization.append(value)
        elif key == REQUEST_ID_KEY and isinstance(value, str) and not request_id:
            request_id = value
    return Caller(wire.peer, authorization, request_id, trace_context(wire.metadata) if traced else {})


def _described(wire: Wire, method: str) -> Described:
    about = {"rpc.system.name": "grpc", "rpc.method": method, "client.address": peer_address(wire.peer())}
    return Described(method, {**about, **server_of(wire.authority())})


def parse(request_type: type[RequestT], raw: bytes) -> RequestT:
    """A message. Raises RequestError when the bytes are none."""
    try:
        return request_type.FromString(raw)
    except DecodeError:
        raise RequestError(f"the request is not a valid {request_type.DESCRIPTOR.full_name} message", "") from None
