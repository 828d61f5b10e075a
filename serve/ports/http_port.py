"""The HTTP port: /metrics, /healthz and /readyz; limits on connections and on request heads; which host names it accepts.

aiohttp limits the size of a request's head but not its time, and accepts connections until no descriptors are left, not even for
gRPC.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
import socket
from collections.abc import Callable, Collection
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from serve.errors import StartError

log = logging.getLogger(__name__)

Reason = Callable[[], str | None]
ReasonOf = Callable[[str | None], str | None]

LONGEST_LINE = 32 * 1024  # bytes of a request's first line: 4,096 labels take half of it where their commas are sent as %2C
HEAD_TIMEOUT_S = 10.0  # for a request's line and headers, from the connection's start or the answer before
MOST_CONNECTIONS = 512
OPEN_TO_EVERY_NAME = re.compile(r"/metrics|/healthz|/readyz(/[^/]+)?")  # asked by address, by those who watch
ANY_ADDRESS = "::"  # of either family
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def connection_limit() -> int:
    """How many HTTP connections may be open: a quarter of the descriptors at most, so that gRPC has its own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(8, min(MOST_CONNECTIONS, soft // 4))


class Connections:
    """The port's open connections, by the protocol object that aiohttp has for each. For the event loop's thread alone."""

    def __init__(self, limit: int, head_timeout_s: float) -> None:
        self._limit = limit
        self._head_timeout_s = head_timeout_s
        self._open: dict[Any, Connection] = {}

    def add(self, connection: Connection) -> bool:
        """Count a connection, and begin to wait for its first head; False when there are too many."""
        if len(self._open) >= self._limit:
            return False
        self._open[connection.inner] = connection
        connection.wait(self._head_timeout_s)
        return True

    def remove(self, connection: Connection) -> None:
        self._open.pop(connection.inner, None)

    @web.middleware
    async def note_requests(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        """A head has come: there is time again until its answer is there."""
        connection = self._open.get(request.protocol)
        if connection is not None:
            connection.stop_waiting()
        try:
            answer: web.StreamResponse = await handler(request)
            return answer
        finally:
            if connection is not None and request.protocol in self._open:
                connection.wait(self._head_timeout_s)


class Connection(asyncio.Protocol):
    """Stands between a transport and aiohttp's protocol, and ends what is too much or takes too long."""

    def __init__(self, inner: Any, connections: Connections) -> None:
        self.inner = inner
        self._connections = connections
        self._timer: asyncio.TimerHandle | None = None
        self._taken = False
        self._transport: Any = None

    def wait(self, timeout_s: float) -> None:
        """Close the connection unless a request begins in time."""
        self.stop_waiting()
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._transport.abort)

    def stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._taken = self._connections.add(self)
        if self._taken:
            self.inner.connection_made(transport)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_waiting()
        if self._taken:
            self._connections.remove(self)
            self.inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._taken:
            self.inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self.inner.eof_received() if self._taken else None

    def pause_writing(self) -> None:
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.inner.resume_writing()


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
        make_inner = self._runner.server
        assert make_inner is not None
        where: dict[str, Any] = {"host": self._host, "port": self._port, "reuse_port": False}
        if self._host == ANY_ADDRESS:  # asyncio would listen on IPv6 alone; gRPC's port takes both
            where = {"sock": socket.create_server((self._host, self._port), family=socket.AF_INET6, dualstack_ipv6=True)}
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(make_inner(), self._connections), **where)


def usable_host(host: str) -> str:
    """``::`` is every address of either family, and where this kernel has no IPv6, of IPv4, as gRPC has it."""
    bare = host.strip("[]")
    return "0.0.0.0" if bare == ANY_ADDRESS and not socket.has_dualstack_ipv6() else bare


async def start_http(
    app: web.Application, host: str, port: int, cleanup_s: float, names: Collection[str] | None
) -> tuple[web.AppRunner, int]:
    """Listen; returns the runner, to be cleaned up, and the port. Raises StartError when the port cannot be had.

    ``names`` are those in the Host header that are answered to, in lower case; None: all. A handler whose client has gone is
    cancelled. Cleaning up takes at most twice ``cleanup_s``, which is for clients that do not read what they asked for.
    """
    connections = Connections(connection_limit(), HEAD_TIMEOUT_S)
    app.middlewares.extend((connections.note_requests, _as_json, _named(names)))
    app.on_response_prepare.append(_without_banner)
    logging.getLogger("aiohttp.server").addFilter(_is_our_fault)
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, shutdown_timeout=cleanup_s, max_line_size=LONGEST_LINE
    )
    await runner.setup()
    try:
        await Site(runner, usable_host(host), port, connections).start()
    except OSError as error:
        await runner.cleanup()
        raise http_port_taken(host, port, error) from None
    return runner, int(runner.addresses[0][1])


def http_port_taken(host: str, port: int, error: OSError) -> StartError:
    """What to raise when the port cannot be had."""
    return StartError(f"--http-port {port} on {host} cannot be had ({error.strerror}); name another")


@web.middleware
async def _as_json(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    """Errors that aiohttp answers by itself, in the form of all others."""
    try:
        answer: web.StreamResponse = await handler(request)
        return answer
    except web.HTTPException as error:
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        text = json.dumps({"error": f"{error.reason}: {request.method} {request.path[:200]}"})
        return web.Response(status=error.status, text=text, content_type="application/json", headers=headers)


def _named(names: Collection[str] | None) -> Any:
    """Refuses requests for other names: a page elsewhere could otherwise read digits by having its own name lead here."""

    @web.middleware
    async def check(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        if names is not None and not OPEN_TO_EVERY_NAME.fullmatch(request.path):
            host = request.headers.get("Host", "").lower()
            name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
            if name not in names:
                text = json.dumps({"error": f"this server does not answer to the name {name[:100]!r}; --http-names adds one"})
                return web.Response(status=421, text=text, content_type="application/json")
        answer: web.StreamResponse = await handler(request)
        return answer

    return check


async def _without_banner(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.pop("Server", None)


def _is_our_fault(record: logging.LogRecord) -> bool:
    """Anybody can send what is no HTTP: that is no error of the server's, and a stack trace tells nothing of it."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        log.debug("what came is no HTTP: %s", str(error).splitlines()[0][:200] if str(error) else type(error).__name__)
        return False
    return True


def make_app(
    registry: CollectorRegistry | None, not_alive: Reason, not_ready: ReasonOf, max_body_bytes: int = 1 << 20
) -> web.Application:
    """The application. The two say why the server is not alive, or a model (None: any) not ready; None when it is.

    No ``registry``, no /metrics.
    """

    async def metrics(request: web.Request) -> web.Response:
        if registry is None:
            return web.Response(status=404, text="metrics are turned off: --metrics true\n")
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        answer = web.Response(body=encode(registry), headers={"Content-Type": content_type})
        answer.enable_compression()  # where the reader takes it
        return answer

    def probe(reason: str | None, good: str) -> web.Response:
        return web.Response(text=good + "\n") if reason is None else web.Response(status=503, text=reason + "\n")

    async def alive(request: web.Request) -> web.Response:
        return probe(not_alive(), "alive")

    async def ready(request: web.Request) -> web.Response:
        return probe(not_ready(request.match_info.get("model")), "ready")

    app = web.Application(client_max_size=max_body_bytes)
    app.add_routes([web.get("/metrics", metrics)])
    app.add_routes([web.get("/healthz", alive), web.get("/readyz", ready), web.get("/readyz/{model}", ready)])
    return app
