"""The adapter of the native front: every call is answered, whatever its handler does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health

from serve.config.settings import Settings
from serve.errors import StartError
from serve.runtime import native_front
from serve.runtime.front import MAX_REQUEST_BYTES, Services

SERVICE = "test.Service"
NATIVE = Settings(front="native", max_connection_age_s=0, grpc_port=0)


class Table:
    """A method table by hand: ``serve.api.rpc.RpcTable`` as the front sees it."""

    service = SERVICE

    def __init__(self, **methods: Any) -> None:
        self.methods = methods


def unary(handle: Callable[[bytes, Any], Any]) -> Any:
    return grpc.unary_unary_rpc_method_handler(handle)


def services(**methods: Any) -> Services:
    return Services([Table(**methods)], health.aio.HealthServicer(), reflection=True, tracing=None)  # type: ignore[list-item]


@contextmanager
def serving(**methods: Any) -> Iterator[Callable[..., Any]]:
    """A front on an event loop of this thread's; yields what runs a coroutine of a channel on it."""
    with asyncio.Runner() as runner:
        front = native_front.NativeFront(NATIVE, services(**methods))
        runner.run(front.start())

        def run(call: Callable[[grpc.aio.Channel], Any]) -> Any:
            async def within() -> Any:
                options = [("grpc.max_send_message_length", -1)]
                async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}", options=options) as channel:
                    return await call(channel)

            return runner.run(asyncio.wait_for(within(), 30))

        yield run
        runner.run(front.stop(5))


def code_of(run: Callable[..., Any], method: str, request: bytes = b"", **options: Any) -> tuple[grpc.StatusCode, str]:
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


def test_a_call_is_answered_whatever_its_handler_does() -> None:
    methods = {"Broken": unary(_broken), "NoBytes": unary(_no_bytes), "Reserved": unary(_reserved), "Aborting": unary(_aborting)}
    with serving(**methods) as run:
        assert code_of(run, "Reserved") == (grpc.StatusCode.NOT_FOUND, "gone")
        for method in ("Broken", "NoBytes"):
            code, text = code_of(run, method)
            assert (code, text) == (grpc.StatusCode.INTERNAL, "the call could not be answered"), method
        assert code_of(run, "Aborting") == (grpc.StatusCode.NOT_FOUND, "not\there: 你")
        assert code_of(run, "Nowhere")[0] is grpc.StatusCode.UNIMPLEMENTED


def test_a_request_over_the_limit_never_reaches_the_handler() -> None:
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


def test_deadline_metadata_and_peer_reach_the_handler_and_leaving_ends_it() -> None:
    seen: list[Any] = []
    ended = asyncio.Event()

    async def look(request: bytes, context: Any) -> bytes:
        seen.append((context.time_remaining(), dict(context.invocation_metadata()), context.peer()))
        return request

    async def wait(request: bytes, context: Any) -> bytes:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return b""

    with serving(Look=unary(look), Wait=unary(wait)) as run:

        async def both(channel: grpc.aio.Channel) -> None:
            method = channel.unary_unary(f"/{SERVICE}/Look")
            assert await method(b"x", timeout=20, metadata=(("authorization", "Bearer t"),)) == b"x"
            assert await method(b"x") == b"x"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/Wait")(b"", timeout=0.2)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.wait_for(ended.wait(), 20)

        run(both)
    (remaining, metadata, peer), (without, _, _) = seen
    assert 15 < remaining <= 21  # gRPC rounds a timeout up on its way
    assert without is None
    assert metadata["authorization"] == "Bearer t"
    assert peer.startswith("ipv4:127.0.0.1:")


def test_a_stream_runs_no_further_ahead_than_the_transport_lets_it_and_ends_when_its_reader_leaves() -> None:
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


def test_stopping_lets_calls_finish_and_refuses_new_ones() -> None:
    begun = asyncio.Event()

    async def slow(request: bytes, context: Any) -> bytes:
        begun.set()
        await asyncio.sleep(0.3)
        return b"done"

    async def scenario() -> None:
        front = native_front.NativeFront(NATIVE, services(Slow=unary(slow)))
        await front.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
            method = channel.unary_unary(f"/{SERVICE}/Slow")
            first = method(b"", timeout=20)
            await begun.wait()
            stopping = asyncio.create_task(front.stop(10))
            await asyncio.sleep(0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(b"", timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert await first == b"done"
            await stopping

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_what_it_needs_and_cannot_have_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Services([], health.aio.HealthServicer(), reflection=False, tracing=object())  # type: ignore[arg-type]
    with pytest.raises(StartError, match="--front native sends no spans: unset OTEL_EXPORTER_OTLP_ENDPOINT"):
        native_front.NativeFront(NATIVE, traced)
    monkeypatch.setitem(__import__("sys").modules, "pygrpc_native", None)
    with pytest.raises(StartError, match="--front native needs the package pygrpc-native: install the extra native"):
        native_front.NativeFront(NATIVE, services())
