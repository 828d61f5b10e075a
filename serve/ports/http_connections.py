"""The HTTP port's connections: how many there are, how long a head may take, and what is answered to what is no HTTP.

aiohttp limits the size of a request's head but not its time, and accepts connections until no descriptors are left, not even for
gRPC.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import grpc
from aiohttp import StreamReader, web
from aiohttp.http_exceptions import LineTooLong

from serve.api.http_call import error_answer, refused
from serve.api.status import Refusal, refusal
from serve.errors import OverloadedError

log = logging.getLogger(__name__)

LONGEST_LINE = 32 * 1024  # bytes of a request's first line: 4,096 labels take half of it where their commas are sent as %2C
# A header's, and how many there may be. Browsers send localhost the cookies of every program that listens on it.
LONGEST_HEADER, MOST_HEADERS = 32 * 1024, 64
MOST_HEAD_BYTES = 1 << 20  # of all of them, and what has come of a body by then
MOST_BYTES_BEHIND = 64 << 10  # of further requests, sent before the one in hand is answered
MOST_HELD_BYTES = 16 << 20  # of the heads of all connections, which take twice that in memory
HEAD_END = b"\r\n\r\n"
MOST_CONNECTIONS = 512
TOO_BUSY = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, 503, "too many requests are open; try again", 1.0, OverloadedError.reason)
ANY_ADDRESS = "::"  # of either family
# On every answer: nobody else's page shows it, or guesses at what it is.
ANSWER_HEADERS = {
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
}


def connection_limit(ports: int) -> int:
    """How many connections each HTTP port may have: all a quarter of the descriptors, so that gRPC has its own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, (MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, soft // 4)) // ports)


def usable_host(host: str) -> str:
    """``::`` is every address of either family, and where this kernel has no IPv6, of IPv4, as gRPC has it."""
    bare = host.strip("[]")
    return "0.0.0.0" if bare == ANY_ADDRESS and not socket.has_dualstack_ipv6() else bare


class Connections:
    """The port's open connections. For the event loop's thread alone.

    When there are too many, the one that has waited longest for a request makes room: those who probe find a place, whoever
    holds the others.
    """

    def __init__(self, limit: int, head_timeout_s: float, is_probe: Callable[[str], object]) -> None:
        self._limit = limit
        self._most_busy = limit - limit // 4  # the rest answers probes, or waits and can make room
        self._head_timeout_s = head_timeout_s
        self._is_probe = is_probe
        self._open: set[Connection] = set()
        self._held_bytes = 0
        self.idle: dict[Connection, None] = {}  # in the order in which they began to wait

    def add(self, connection: Connection) -> bool:
        """Count a connection, and begin to wait for its first head; False when there is no room."""
        if len(self._open) >= self._limit:
            if not self.idle:
                return False
            self._end(next(iter(self.idle)))
        self._open.add(connection)
        connection.wait(self._head_timeout_s)
        return True

    def remove(self, connection: Connection) -> None:
        if connection in self._open:
            self._open.remove(connection)
            self.hold(-connection.head_bytes)

    def hold(self, more_bytes: int) -> None:
        """Count what has come of heads. Where all are too large, the largest ends: hardly that of who asks for digits."""
        self._held_bytes += more_bytes
        if self._held_bytes > MOST_HELD_BYTES:
            self._end(max(self._open, key=lambda connection: connection.head_bytes))

    def _end(self, connection: Connection) -> None:
        connection.end()
        self.remove(connection)

    @web.middleware
    async def note_requests(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        """A head has come: there is time again until its answer is there."""
        connection = request.protocol
        if not isinstance(connection, Connection) or connection not in self._open:
            raise ConnectionResetError  # it has just made room for another
        connection.begin(request)
        try:
            if len(self._open) - len(self.idle) > self._most_busy and not self._is_probe(request.path):
                return refused(TOO_BUSY)
            answer: web.StreamResponse = await handler(request)
            return answer
        finally:
            if connection in self._open:
                connection.wait(self._head_timeout_s)


class Connection(web.RequestHandler):
    """aiohttp's protocol, which ends what is too much or takes too long.

    Its own errors are answered like all others, and not logged with what the caller sent.
    """

    __slots__ = ("_after_head", "_body", "_connections", "_handshake", "_head_ended", "_last", "_taken", "_timer", "head_bytes")

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop, connections: Connections) -> None:
        limits = {"max_line_size": LONGEST_LINE, "max_field_size": LONGEST_HEADER, "max_headers": MOST_HEADERS}
        # Compressed bodies are read by their handler, which knows what is a caller's mistake and where it ends.
        super().__init__(server, loop=loop, access_log=None, auto_decompress=False, **limits)  # type: ignore[arg-type]
        self._connections = connections
        self._handshake: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._taken = False
        self._body: StreamReader | None = None  # of the request in hand
        self._head_ended = False
        self._last = b""  # the head's last bytes: its end may come in pieces
        self.head_bytes = self._after_head = 0

    def shake_hands(self, handshake: asyncio.Task[None]) -> bool:
        """Take a place already while TLS is agreed on, which counts against a head's time; False when there is no room."""
        self._handshake = handshake
        self._taken = self._connections.add(self)
        return self._taken

    def give_up(self) -> None:
        """Give the place back: TLS was not agreed on."""
        self.stop_waiting()
        self._connections.remove(self)

    def wait(self, timeout_s: float) -> None:
        """Close the connection unless a request begins in time."""
        self.stop_waiting()
        self._connections.hold(-self.head_bytes)
        self._body, self._head_ended, self._last = None, False, b""
        self.head_bytes = self._after_head = 0
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._abort)
        self._connections.idle[self] = None

    def begin(self, request: web.BaseRequest) -> None:
        """A request's head is complete. Of its body whoever reads it takes account."""
        self.stop_waiting()
        self._body = request.content

    def stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            del self._connections.idle[self]

    def end(self) -> None:
        self.stop_waiting()
        self._abort()

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        elif self._handshake is not None:
            self._handshake.cancel()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._taken = self._taken or self._connections.add(self)
        if self._taken:
            super().connection_made(transport)
        else:
            self._abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.stop_waiting()
        if self._taken:
            self._connections.remove(self)
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._taken:
            return
        more = 0
        if not self._head_ended:
            joined = self._last + data
            end = joined.find(HEAD_END)
            more = len(data) if end < 0 else end + len(HEAD_END) - len(self._last)
            self._head_ended, self._last = end >= 0, joined[1 - len(HEAD_END) :]
            self.head_bytes += more
            self._connections.hold(more)
        self._after_head += len(data) - more
        super().data_received(data)
        behind, most = self._after_head, MOST_HEAD_BYTES
        if self._body is not None:
            behind, most = behind - self._body.total_bytes, MOST_BYTES_BEHIND
        if self.head_bytes > MOST_HEAD_BYTES or behind > most:
            self.end()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer, and close the connection: that is what ConnectionError does."""
        if not isinstance(exc, ConnectionError) and request.writer.output_size == 0 and request.transport is not None:
            text = "what came is no HTTP request"
            if isinstance(exc, LineTooLong):
                status = 431
                text = f"the first line or a header is longer than {LONGEST_LINE} bytes, or there are over {MOST_HEADERS}"
            elif status == 500 and isinstance(exc, Exception):
                text = refusal(exc).text
            body = json.dumps({"error": text}).encode()
            about = {**ANSWER_HEADERS, "Content-Type": "application/json; charset=utf-8", "Content-Length": len(body)}
            lines = [f"{name}: {value}" for name, value in about.items()]
            head = "\r\n".join((f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *lines, "Connection: close", "", ""))
            request.transport.write(head.encode() + body)
        raise ConnectionResetError

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Also what aiohttp answers by an exception."""
        if isinstance(resp, web.HTTPException):
            headers = {"Allow": resp.headers["Allow"]} if "Allow" in resp.headers else {}
            resp = error_answer(resp.status, f"{resp.reason}: {request.method} {request.path[:200]}", **headers)
        return await super().finish_response(request, resp, start_time)


class Site(web.BaseSite):
    """A listening TCP socket whose connections are bounded."""

    def __init__(self, runner: web.AppRunner, host: str, port: int, connections: Connections) -> None:
        super().__init__(runner)
        self._host, self._port, self._connections = host, port, connections

    @property
    def name(self) -> str:
        return f"http://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen. Raises OSError."""
        await super().start()
        server = self._runner.server
        assert server is not None
        where: dict[str, Any] = {"host": self._host, "port": self._port, "reuse_port": False}
        if self._host == ANY_ADDRESS:  # asyncio would listen on IPv6 alone; gRPC's port takes both
            where = {"sock": socket.create_server((self._host, self._port), family=socket.AF_INET6, dualstack_ipv6=True)}
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(server, loop, self._connections), **where)
