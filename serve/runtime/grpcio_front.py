"""The gRPC port by grpcio: several ``grpc.aio`` servers on one event loop that share the port.

A ``grpc.aio`` server takes one call a turn of the event loop, because it keeps one request for a call pending. Several
servers take several: with eight a call costs a third less. The kernel spreads the connections over them. Why asyncio, and
what the number of servers gave: docs/decisions/0001-asyncio.md, 0009-fronts.md.
"""

from __future__ import annotations

import asyncio
from typing import cast

import grpc

from serve.access.tls import Certificates
from serve.config.settings import UNIX, Settings
from serve.runtime.front import KEEPALIVE_MS, MAX_REQUEST_BYTES, Services, address, port_taken

SERVERS = 8
CONNECTION_AGE_GRACE_S = 60


class GrpcioFront:
    """A bound port. Raises StartError when it cannot be had."""

    def __init__(self, settings: Settings, services: Services, certificates: Certificates | None) -> None:
        options = [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        if settings.max_connection_age_s:
            options += [
                ("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1000)),
                ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_S * 1000),
            ]
        interceptors = [services.tracing.interceptor] if services.tracing else []
        self.port = settings.grpc_port
        self._servers: list[grpc.aio.Server] = []
        # A path cannot be shared.
        for _ in range(1 if settings.host.startswith(UNIX) else SERVERS):
            server = grpc.aio.server(interceptors=interceptors, options=options)
            services.add_to(cast(grpc.aio.Server, _GenericHandlersOnly(server)))
            where = address(settings, self.port)
            try:
                if certificates:
                    self.port = server.add_secure_port(where, certificates.credentials())
                else:
                    self.port = server.add_insecure_port(where)
            except RuntimeError:
                self.port = 0
            if self.port == 0:
                raise port_taken(settings)
            self._servers.append(server)

    async def start(self) -> None:
        for server in self._servers:
            await server.start()

    async def stop(self, grace_s: float) -> None:
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))


class _GenericHandlersOnly:
    """A server as those who add services see it. Each registered method would cost every call (grpc PR 43461, open)."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Leave them out: the generic handlers cover them."""
