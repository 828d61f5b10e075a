"""TLS in front of the HTTP port's connections. A caller has a place among them from the first packet on, not only once it has
spoken TLS: asyncio's own TLS server tells of a connection when its handshake is over, so those that say nothing were not bounded.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial

from aiohttp import web

from serve.ports.http_connections import ANY_ADDRESS, Connection, Connections

log = logging.getLogger(__name__)

PAUSE_S = 0.1  # before the next try where descriptors or memory are used up
USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
BACKLOG = 128


class TlsSite(web.BaseSite):
    """A listening TCP socket with TLS, whose connections are bounded. ``context`` gives each handshake its certificate."""

    def __init__(
        self, runner: web.AppRunner, host: str, port: int, connections: Connections, context: Callable[[], ssl.SSLContext]
    ) -> None:
        super().__init__(runner)
        self._host, self._port, self._connections, self._context = host, port, connections, context

    @property
    def name(self) -> str:
        return f"https://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen. Raises OSError."""
        await super().start()
        server = self._runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        sockets = await _listening(self._host, self._port)
        accepting = TlsServer(sockets, lambda: Connection(server, loop, self._connections), self._context)
        self._server = accepting  # type: ignore[assignment]  # aiohttp asks for its sockets and closes it, no more


class TlsServer:
    """Accepts connections, and speaks TLS with each before its protocol is told of it."""

    def __init__(
        self, sockets: list[socket.socket], make: Callable[[], Connection], context: Callable[[], ssl.SSLContext]
    ) -> None:
        self.sockets = sockets
        self._make, self._context = make, context
        self._tasks = {asyncio.create_task(self._accept(each), name="accept") for each in sockets}  # and handshakes

    def close(self) -> None:
        """Accept no more; those that have not agreed on TLS yet are ended."""
        for task in self._tasks:
            task.cancel()
        for each in self.sockets:
            each.close()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:  # also of a caller who has left already
                await asyncio.sleep(PAUSE_S if error.errno in USED_UP else 0)
                continue
            connection = self._make()
            task = asyncio.create_task(self._shake_hands(accepted, connection), name="handshake")
            self._tasks.add(task)
            task.add_done_callback(partial(self._after_handshake, accepted, connection))
            if not connection.shake_hands(task):
                task.cancel()

    async def _shake_hands(self, accepted: socket.socket, connection: Connection) -> None:
        context = await asyncio.to_thread(self._context)  # it looks at files
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: connection, accepted, ssl=context)

    def _after_handshake(self, accepted: socket.socket, connection: Connection, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if connection.transport is None:
            connection.give_up()
            accepted.close()
        error = None if task.cancelled() else task.exception()
        if isinstance(error, OSError):  # ssl.SSLError is one: the caller's affair
            log.debug("a TLS handshake failed: %s", error)
        elif error is not None:
            log.error("a TLS handshake failed", exc_info=error)


async def _listening(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address of the host, as asyncio's servers have them. Raises OSError."""
    if host == ANY_ADDRESS:  # IPv4 too, as gRPC's port has it
        return [_not_blocking(socket.create_server((host, port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True))]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, where in dict.fromkeys((family, where) for family, _, _, _, where in found):
            sockets.append(_not_blocking(socket.create_server(where[:2], family=family, backlog=BACKLOG)))
    except OSError:
        for each in sockets:
            each.close()
        raise
    return sockets


def _not_blocking(listener: socket.socket) -> socket.socket:
    listener.setblocking(False)
    return listener
