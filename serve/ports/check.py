"""Checks before the server says that it is ready: that the ports are free, and that grpcio's core answers calls."""

from __future__ import annotations

import asyncio
import fcntl
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.api.rpc import Method
from serve.errors import StartError
from serve.ports.grpc_port import GrpcPort, address, port_taken
from serve.ports.http_connections import usable_host
from serve.ports.http_port import http_port_taken
from serve.settings import UNIX, Settings

ANSWER_S = 1.0
CHECK_TIMEOUT_S, END_S = 10.0, 1.0


def check_ports(settings: Settings) -> IO[bytes] | None:
    """Raises StartError where another process listens. Returns what keeps others from a Unix socket, to be held open.

    gRPC's servers share their port: sharing it with another process would succeed, and in silence.
    """
    held = None
    if settings.host.startswith(UNIX):
        held = _hold(settings.host)
    elif settings.grpc_port:
        try:
            _try(settings.host, settings.grpc_port)
        except OSError:
            raise port_taken(settings) from None
    http_ports = {"--http-port": settings.http_port} | ({"--https-port": settings.https_port} if settings.https else {})
    for flag, port in http_ports.items():
        try:
            if port:
                _try(settings.http_host, port)
        except OSError as error:
            raise http_port_taken(flag, settings.http_host, port, error) from None
    return held


def _hold(host: str) -> IO[bytes]:
    """Make a Unix socket's path this process's own. gRPC takes it from whoever has it, and deletes it in the end, whose it is.

    Hence a lock beside it, for as long as the process lives; what answers there without one is no server of this kind.
    """
    path = Path(host.removeprefix(UNIX).removeprefix("//"))
    try:
        lock = path.with_name(f"{path.name}.lock").open("ab")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists():
            return lock
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(ANSWER_S)
            probe.connect(str(path))
        reason = "another process answers there"
    except ConnectionRefusedError:
        if path.is_socket():  # of a process that has ended
            return lock
        reason = "it is no socket"
    except BlockingIOError:
        reason = "it is another server's"
    except OSError as error:
        reason = error.strerror or str(error)
    raise StartError(f"--host {host} cannot be had ({reason}); name another")


def _try(host: str, port: int) -> None:
    """Raises OSError when the port is taken, or there is no such address."""
    for family, kind, protocol, _, where in socket.getaddrinfo(usable_host(host), port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as probe:
            # Ports of connections that have just ended are free; without SO_REUSEPORT a listener is a conflict.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(where)


async def check_calls(methods: Mapping[str, Method]) -> None:
    """Call health through a port of this kind, on loopback. Raises StartError when that fails.

    What grpcio's core promises to nobody may have changed: that must be found out now, and not by calls without an answer.
    Not through a Unix socket: a container whose root is read-only has no folder for one.
    """

    def call(target: str) -> None:
        with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            stub.Check(health_pb2.HealthCheckRequest(), timeout=CHECK_TIMEOUT_S)
            next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=CHECK_TIMEOUT_S))

    settings = Settings(host="127.0.0.1", grpc_port=0, max_connection_age_s=0)
    port = GrpcPort(settings, methods)
    await port.start()
    try:
        await asyncio.to_thread(call, address(settings.host, port.port))
    except grpc.RpcError as error:
        text = f"grpcio {grpc.__version__} does not answer calls ({error.code().name}: {error.details()})"
        raise StartError(f"{text}; install grpcio >=1.85.1,<1.86") from None
    finally:
        await port.stop(END_S)
