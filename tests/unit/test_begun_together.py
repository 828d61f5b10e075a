"""Calls that the receiving thread begins together: one that cannot be begun takes none of the others along, nor itself."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
from grpc_health.v1 import health
from serve.ports.front import Services

from serve.ports.grpc_port import GrpcPort
from serve.settings import Settings

METHOD = "/test.Service/Echo"
CALLS = 20


async def _echo(request: bytes, context: Any) -> bytes:
    return request


class Table:
    """``serve.api.rpc.RpcTable`` as the port sees it."""

    service = "test.Service"
    methods = {"Echo": grpc.unary_unary_rpc_method_handler(_echo)}  # noqa: RUF012
    stepped = frozenset({"Echo"})


def test_a_call_that_cannot_be_begun_is_ended_and_its_neighbours_are_answered() -> None:
    others_have_come = threading.Event()

    async def scenario() -> None:
        tables: Any = [Table()]
        port = GrpcPort(
            Settings(grpc_port=0), Services(tables, health.aio.HealthServicer(), reflection=False, tracing=None), None
        )
        honest = port._handling.begin

        def begin(key: Any, call: Any, handler: Any, request: bytes | None) -> None:
            if request == b"first":
                others_have_come.wait(10)  # so that the others are received meanwhile, and begun together
            if request == b"bad":
                raise RuntimeError("not to be begun")
            honest(key, call, handler, request)

        port._handling.begin = begin  # type: ignore[method-assign]
        await port.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port.port}") as channel:
            echo: Any = channel.unary_unary(METHOD)
            first = asyncio.ensure_future(_answered(echo(b"first", timeout=20)))
            await asyncio.sleep(0.3)  # it holds the receiving thread
            requests = [b"bad" if number == CALLS // 2 else b"%d" % number for number in range(CALLS)]
            calls = [asyncio.ensure_future(_answered(echo(request, timeout=20))) for request in requests]
            await asyncio.sleep(0.3)  # they have all come
            others_have_come.set()
            ends = await asyncio.wait_for(asyncio.gather(first, *calls), 15)
        assert ends == [b"first", *(grpc.StatusCode.INTERNAL if request == b"bad" else request for request in requests)]
        await port.stop(5)

    asyncio.run(asyncio.wait_for(scenario(), 60))


async def _answered(call: Any) -> bytes | grpc.StatusCode:
    try:
        answer: bytes = await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return answer
