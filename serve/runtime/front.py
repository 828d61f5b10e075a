"""The interface between the server and its gRPC transports, and the choice of one by ``--front``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from serve.access.tls import Certificates
from serve.api.rpc import RpcTable
from serve.config.settings import UNIX, Settings
from serve.errors import StartError
from serve.observability.tracing import Tracing
from serve.runtime.reflection import add_reflection

KEEPALIVE_MS = 30_000


class Front(Protocol):
    """A bound gRPC port."""

    port: int

    async def start(self) -> None:
        """Answer calls from now on."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Accept no more calls, wait until every answer is written, and cut off what is not after ``grace_s``."""
        ...


@dataclass(frozen=True)
class Services:
    """What is served on the port, whichever transport carries it."""

    tables: Sequence[RpcTable]
    health: health.aio.HealthServicer
    reflection: bool
    tracing: Tracing | None

    def add_to(self, server: Any) -> None:
        """Add every method to a server that takes them as grpcio's do."""
        handlers = [grpc.method_handlers_generic_handler(table.service, table.methods) for table in self.tables]
        server.add_generic_rpc_handlers(handlers)
        self.add_health_and_reflection(server)

    @property
    def stepped(self) -> set[str]:
        """The methods whose handlers need no event loop, as they go over the wire."""
        return {f"/{table.service}/{name}" for table in self.tables for name in table.stepped}

    def add_health_and_reflection(self, server: Any) -> None:
        """Add what grpcio's own packages answer, about all of the services."""
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        if self.reflection:
            add_reflection({*(table.service for table in self.tables), health.SERVICE_NAME}, server)


def bind(settings: Settings, services: Services, certificates: Certificates | None) -> Front:
    """A port that is bound and not yet started. Raises StartError when it cannot be had."""
    if settings.front == "native":
        from serve.runtime.native_front import NativeFront  # noqa: PLC0415  # an extra

        return NativeFront(settings, services)
    from serve.runtime.grpcio_front import GrpcioFront  # noqa: PLC0415  # only the transport that is used

    return GrpcioFront(settings, services, certificates)


def address(settings: Settings, port: int) -> str:
    """``host:port``, as gRPC reads it: ``[::1]:50051`` for an IPv6 address, and a Unix socket's path without a port."""
    return settings.host if settings.host.startswith(UNIX) else join(settings.host, port)


def join(host: str, port: int) -> str:
    """``host:port``, with an IPv6 address in brackets."""
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def port_taken(settings: Settings) -> StartError:
    """What to raise when the port cannot be had."""
    return StartError(f"--grpc-port {settings.grpc_port} on {settings.host} cannot be had; name another")
