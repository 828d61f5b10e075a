"""The gRPC port by grpcio: a ``grpc.aio`` server around the method tables.

Why asyncio and not grpcio's threads: docs/decisions/0001-asyncio.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve.api.rpc import RpcTable
from serve.config.settings import Settings
from serve.errors import StartError
from serve.observability.tracing import Tracing

MAX_REQUEST_BYTES = 4 << 20
CONNECTION_AGE_GRACE_S = 60
KEEPALIVE_MS = 30_000


def bind_grpc(
    settings: Settings,
    tables: Sequence[RpcTable],
    servicer: health.aio.HealthServicer,
    credentials: grpc.ServerCredentials | None,
    tracing: Tracing | None,
) -> tuple[grpc.aio.Server, int]:
    """A server that is bound and not yet started, and its port. Raises StartError when the port cannot be had."""
    server = grpc.aio.server(
        interceptors=[tracing.interceptor] if tracing else None,
        options=[
            ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it in silence
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_S * 1000),
            ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
    server.add_generic_rpc_handlers(tuple(table.handler() for table in tables))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    if settings.reflection:
        names = {table.service for table in tables} | {health.SERVICE_NAME, reflection.SERVICE_NAME}
        reflection.enable_server_reflection(sorted(names), server)
    host = f"[{settings.host}]" if ":" in settings.host.strip("[]") else settings.host
    address = f"{host}:{settings.grpc_port}"
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise StartError(f"--grpc-port {settings.grpc_port} on {settings.host} cannot be had; name another")
    return server, port
