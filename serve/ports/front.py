"""What the gRPC port serves, and how its address is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from serve.api.rpc import RpcTable
from serve.errors import StartError
from serve.observability.tracing import Tracing
from serve.ports.reflection import add_reflection
from serve.settings import UNIX, Settings

KEEPALIVE_MS = 30_000


@dataclass(frozen=True)
class Services:
    """What is served on the port."""

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
