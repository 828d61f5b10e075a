"""Both transports of gRPC by themselves: every call is answered, whatever its handler or its caller does.

Handlers with one answer run in both ways: as tasks on the event loop, and without it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health

from serve.errors import StartError
from serve.ports import grpc_port
from serve.ports.front import Services
from serve.ports.grpc_port import GrpcPort
from serve.ports.handling import MAX_REQUEST_BYTES, STOPPING
from serve.settings import Settings
from serve.waiting import done

SERVICE = "test.Service"
GRPCIO = Settings(grpc_port=0)

Run = Callable[[Callable[[grpc.aio.Channel], Any]], Any]  # of a coroutine, on the front's event loop
Serving = Callable[..., AbstractContextManager[Run]]


class Table:
    """A method table by hand: ``serve.api.rpc.RpcTable`` as the front sees it."""

    service = SERVICE

    def __init__(self, *, stepped: bool, **methods: Any) -> None:
        self.methods = methods
        self.stepped = {name for name, handler in methods.items() if stepped and handler.unary_unary}


class Pause:
    """A while to wait for, with an event loop or without; ``given_up`` once its waiter is."""

    def __init__(self, seconds: float) -> None:
        self._timer: threading.Timer
        self._seconds = seconds
        self.begun, self.given_up = threading.Event(), threading.Event()

    def begin(self, ended: Callable[[], object]) -> None:
        self._timer = threading.Timer(self._seconds, ended)
        self._timer.daemon = True
        self._timer.start()
        self.begun.set()

    def cancel(self) -> bool:
        self._timer.cancel()
        self.given_up.set()
        return True


def unary(handle: Callable[[bytes, Any], Any]) -> Any:
    return grpc.unary_unary_rpc_method_handler(handle)


def services(*, stepped: bool = False, **methods: Any) -> Services:
    table: Any = Table(stepped=stepped, **methods)
    return Services([table], health.aio.HealthServicer(), reflection=True, tracing=None)


@pytest.fixture(params=[GRPCIO], ids=["grpcio"])
def settings(request: pytest.FixtureRequest) -> Settings:
    chosen: Settings = request.param
    return chosen


@pytest.fixture(params=[False, True], ids=["tasks", "stepped"])
def stepped(request: pytest.FixtureRequest) -> bool:
    chosen: bool = request.param
    return chosen


@pytest.fixture
def serving(settings: Settings, *, stepped: bool) -> Serving:
    return partial(_serving, settings, stepped=stepped)


@contextmanager
def _serving(settings: Settings, *, stepped: bool = False, **methods: Any) -> Iterator[Run]:
    """A front on an event loop of this thread's; yields what runs a coroutine of a channel on it."""
    with asyncio.Runner() as runner:
        front: GrpcPort = runner.run(_bound(settings, stepped=stepped, **methods))
        runner.run(front.start())

        def run(call: Callable[[grpc.aio.Channel], Any]) -> Any:
            async def within() -> Any:
                options = [("grpc.max_send_message_length", -1)]
                async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}", options=options) as channel:
                    return await call(channel)

            return runner.run(asyncio.wait_for(within(), 30))

        yield run
        runner.run(front.stop(5))


async def _bound(settings: Settings, *, stepped: bool, **methods: Any) -> GrpcPort:
    return grpc_port.GrpcPort(settings, services(stepped=stepped, **methods), None)


@asynccontextmanager
async def _started(settings: Settings, *, stepped: bool, **methods: Any) -> AsyncIterator[tuple[GrpcPort, grpc.aio.Channel]]:
    """A front that answers, for the test to stop, and a channel to it."""
    front = await _bound(settings, stepped=stepped, **methods)
    await front.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
        yield front, channel


def code_of(run: Run, method: str, request: bytes = b"", **options: Any) -> tuple[grpc.StatusCode, str]:
    async def call(channel: grpc.aio.Channel) -> bytes:
        answer: bytes = await channel.unary_unary(f"/{SERVICE}/{method}")(request, timeout=20, **options)
        return answer

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        run(call)
    return caught.value.code(), str(caught.value.details())


async def _broken(request: bytes, context: Any) -> bytes:
    raise RuntimeError("secret")


async def _no_bytes(request: bytes, context: Any) -> str:
    return "text"


async def _reserved(request: bytes, context: Any) -> bytes:
    await context.abort(grpc.StatusCode.NOT_FOUND, "gone", (("grpc-retry-pushback-ms", "5"),))
    return b""


async def _aborting(request: bytes, context: Any) -> bytes:
    await context.abort(grpc.StatusCode.NOT_FOUND, "not\there: 你", (("hint", "5"),))
    return b""


def test_a_call_is_answered_whatever_its_handler_does(serving: Serving) -> None:
    methods = {"Broken": unary(_broken), "NoBytes": unary(_no_bytes), "Reserved": unary(_reserved), "Aborting": unary(_aborting)}
    with serving(**methods) as run:
        assert code_of(run, "Reserved") == (grpc.StatusCode.NOT_FOUND, "gone")
        for method in ("Broken", "NoBytes"):
            code, text = code_of(run, method)
            assert (code, text) == (grpc.StatusCode.INTERNAL, "the call could not be answered"), method
        assert code_of(run, "Aborting") == (grpc.StatusCode.NOT_FOUND, "not\there: 你")
        assert code_of(run, "Nowhere")[0] is grpc.StatusCode.UNIMPLEMENTED


def test_a_request_over_the_limit_never_reaches_the_handler(serving: Serving) -> None:
    seen = []

    async def handle(request: bytes, context: Any) -> bytes:
        seen.append(len(request))
        return b""

    with serving(Handle=unary(handle)) as run:
        code, text = code_of(run, "Handle", bytes(MAX_REQUEST_BYTES + 1))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(MAX_REQUEST_BYTES) in text
        run(lambda channel: channel.unary_unary(f"/{SERVICE}/Handle")(bytes(MAX_REQUEST_BYTES), timeout=20))
    assert seen == [MAX_REQUEST_BYTES]


def test_deadline_metadata_and_peer_reach_the_handler_and_leaving_ends_it(serving: Serving) -> None:
    seen: list[Any] = []
    pause = Pause(60)

    async def look(request: bytes, context: Any) -> bytes:
        seen.append((context.time_remaining(), dict(context.invocation_metadata()), context.peer()))
        return request

    async def wait(request: bytes, context: Any) -> bytes:
        await done(pause)
        return b""

    with serving(Look=unary(look), Wait=unary(wait)) as run:

        async def both(channel: grpc.aio.Channel) -> None:
            method = channel.unary_unary(f"/{SERVICE}/Look")
            assert await method(b"x", timeout=20, metadata=(("authorization", "Bearer t"),)) == b"x"
            assert await method(b"x") == b"x"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/Wait")(b"", timeout=0.2)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await asyncio.to_thread(pause.given_up.wait, 20)

        run(both)
    (remaining, metadata, peer), (without, _, _) = seen
    assert 15 < remaining <= 21  # gRPC rounds a timeout up on its way
    assert without is None
    assert metadata["authorization"] == "Bearer t"
    assert peer.startswith("ipv4:127.0.0.1:")


def test_a_stream_runs_no_further_ahead_than_the_transport_lets_it_and_ends_when_its_reader_leaves(serving: Serving) -> None:
    made: list[int] = []
    ended = asyncio.Event()

    async def many(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            for number in range(10_000):
                made.append(number)
                yield bytes(1 << 20)
        finally:
            ended.set()

    with serving(Many=grpc.unary_stream_rpc_method_handler(many)) as run:

        async def read_one(channel: grpc.aio.Channel) -> None:
            call = channel.unary_stream(f"/{SERVICE}/Many")(b"", timeout=20)
            assert len(await call.read()) == 1 << 20
            await asyncio.sleep(0.5)  # a reader that is slow on purpose
            assert len(made) < 200
            call.cancel()
            await asyncio.wait_for(ended.wait(), 20)

        run(read_one)


def test_stopping_lets_calls_finish_and_refuses_new_ones(settings: Settings, *, stepped: bool) -> None:
    pause = Pause(0.3)

    async def slow(request: bytes, context: Any) -> bytes:
        await done(pause)
        return b"done"

    async def scenario() -> None:
        async with _started(settings, stepped=stepped, Slow=unary(slow)) as (front, channel):
            method = channel.unary_unary(f"/{SERVICE}/Slow")
            first = method(b"", timeout=20)
            assert await asyncio.to_thread(pause.begun.wait, 20)
            stopping = asyncio.create_task(front.stop(10))
            await asyncio.sleep(0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(b"", timeout=20)
            # Refused by the server, and not because nobody listens any more.
            assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, STOPPING)
            assert await first == b"done"
            await stopping

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_streams_both_ways_end_as_their_handler_ends(serving: Serving) -> None:
    async def each(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            if not request:
                await context.abort(grpc.StatusCode.OUT_OF_RANGE, "empty", (("hint", "5"),))
            yield request * 2

    with serving(Each=grpc.stream_stream_rpc_method_handler(each)) as run:

        async def both(channel: grpc.aio.Channel) -> None:
            method = channel.stream_stream(f"/{SERVICE}/Each")
            assert [answer async for answer in method(iter((b"a", b"b")), timeout=20)] == [b"aa", b"bb"]
            assert [answer async for answer in method(iter(()), timeout=20)] == []
            call = method(iter((b"a", b"")), timeout=20)
            assert await call.read() == b"aa"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.OUT_OF_RANGE, "empty")
            assert ("hint", "5") in tuple(caught.value.trailing_metadata())

        run(both)


def test_a_handler_may_write_its_answers_by_itself() -> None:
    async def alone(request: bytes, context: Any) -> None:
        await context.write(b"written")
        await context.write(request)

    async def read(channel: grpc.aio.Channel) -> list[bytes]:
        return [answer async for answer in channel.unary_stream(f"/{SERVICE}/Alone")(b"asked", timeout=20)]

    with _serving(GRPCIO, Alone=grpc.unary_stream_rpc_method_handler(alone)) as run:
        assert run(read) == [b"written", b"asked"]


def test_a_call_without_a_request_is_told_so(serving: Serving) -> None:
    async def handle(request: bytes, context: Any) -> bytes:
        return request

    async def ask_nothing(channel: grpc.aio.Channel) -> bytes:
        answer: bytes = await channel.stream_unary(f"/{SERVICE}/Handle")(iter(()), timeout=20)
        return answer

    with serving(Handle=unary(handle)) as run:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            run(ask_nothing)
        assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
        assert run(lambda channel: channel.unary_unary(f"/{SERVICE}/Handle")(b"x", timeout=20)) == b"x"


def test_an_answer_that_takes_longer_than_the_grace_is_cut_off(settings: Settings, *, stepped: bool) -> None:
    pause = Pause(60)

    async def endless(request: bytes, context: Any) -> bytes:
        await done(pause)
        return b""

    async def scenario() -> None:
        async with _started(settings, stepped=stepped, Endless=unary(endless)) as (front, channel):
            call = channel.unary_unary(f"/{SERVICE}/Endless")(b"", timeout=40)
            waiting = asyncio.ensure_future(call)
            assert await asyncio.to_thread(pause.begun.wait, 20)
            await front.stop(0.2)
            with pytest.raises(grpc.aio.AioRpcError):
                await waiting

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_port_is_had_once(settings: Settings) -> None:
    async def scenario() -> None:
        first = grpc_port.GrpcPort(settings, services(), None)
        with pytest.raises(StartError, match=f"--grpc-port {first.port} on 127.0.0.1 cannot be had; name another"):
            grpc_port.GrpcPort(dataclasses.replace(settings, grpc_port=first.port), services(), None)
        await first.start()
        await first.stop(5)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_grpcio_with_another_core_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    core = import_module("grpc._cython.cygrpc")
    monkeypatch.delattr(core, "ReceiveCloseOnServerOperation")
    with pytest.raises(StartError, match=r"has no ReceiveCloseOnServerOperation; install grpcio 1\.85"):
        grpc_port.GrpcPort(GRPCIO, services(), None)
