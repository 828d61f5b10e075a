"""What the heads of HTTP requests may take up, all together: there is no token yet by which anybody could be told apart."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
from collections.abc import Callable
from contextlib import ExitStack, closing

import psutil
import pytest

from serve.manifest import BUNDLED_DIR
from serve.ports.http_connections import Connection
from tests.in_process import Running, until, with_server
from tests.server_process import ServerProcess
from tests.waiting import wait_until

BIG_HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(
    b"A%d: " % number + b"x" * 14_000 + b"\r\n" for number in range(60)
)
MANY = 200  # of which 19 have room
MOST_MIB = 150


def is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def test_large_heads_that_never_end_are_bounded_all_together_and_keep_nobody_out(
    start_server: Callable[..., ServerProcess],
) -> None:
    """512 of them took 835 MiB, and a pod has 512."""
    server = start_server()
    host, _, port = server.http.rpartition(":")
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    with ExitStack() as stack:
        held = []
        for _ in range(MANY):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
            with contextlib.suppress(OSError):
                connection.sendall(BIG_HEAD)
            connection.setblocking(False)
            held.append(connection)
        assert (process.memory_info().rss - before) >> 20 < MOST_MIB
        wait_until(lambda: sum(map(is_open, held)) * len(BIG_HEAD) <= 16 << 20)
        for _ in range(3):
            with closing(http.client.HTTPConnection(host, int(port), timeout=20)) as connection:
                connection.request("GET", "/v1/digits?model=mlp", headers={"Cookie": "c=" + "x" * 30_000})
                assert connection.getresponse().status == 200
    wait_until(lambda: (process.memory_info().rss - before) >> 20 < MOST_MIB)


def test_a_head_whose_end_comes_in_pieces_and_a_large_body_are_no_large_head(monkeypatch: pytest.MonkeyPatch) -> None:
    honest, come = Connection.data_received, bytearray()

    def data_received(connection: Connection, data: bytes) -> None:
        come.extend(data)
        honest(connection, data)

    monkeypatch.setattr(Connection, "data_received", data_received)

    async def so_far() -> int:
        return len(come)

    async def test(running: Running) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.ports.http)
        head = b"POST /v2/models/mlp/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (4 << 20)
        for length in range(len(head) - 5, len(head) + 1):
            writer.write(head[len(come) : length])
            await until(so_far, lambda seen: seen == length)  # noqa: B023  # called before the next turn
        writer.write(b" " * (4 << 20))
        assert (await reader.read(100)).startswith(b"HTTP/1.1 400"), "all of it was read"
        writer.close()

    with_server(test, monkeypatch, BUNDLED_DIR)


def test_what_is_sent_behind_a_request_in_hand_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(running: Running) -> None:
        running.orders.hold()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.ports.http)
        request = b"GET /v1/digits?model=mlp HTTP/1.1\r\nHost: localhost\r\n\r\n"
        writer.write(request)
        await running.until_held()
        writer.write(BIG_HEAD)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b"", "the connection ends, and its request with it"
        writer.close()
        running.orders.release()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.ports.http)
        writer.write(request * 20)  # a few are answered one after another
        for _ in range(20):
            assert b"HTTP/1.1 200" in await reader.readuntil(b"\r\n\r\n")
        writer.close()

    with_server(test, monkeypatch, BUNDLED_DIR)
