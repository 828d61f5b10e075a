"""Checks that the ports are free before the models are loaded."""

from __future__ import annotations

import socket

from serve.ports.front import port_taken
from serve.ports.http_connections import usable_host
from serve.ports.http_port import http_port_taken
from serve.settings import UNIX, Settings


def check_ports(settings: Settings) -> None:
    """Raises StartError where another process listens.

    gRPC's servers share their port: sharing it with another process would succeed, and in silence.
    """
    if settings.grpc_port and not settings.host.startswith(UNIX):
        try:
            _try(settings.host, settings.grpc_port)
        except OSError:
            raise port_taken(settings) from None
    if settings.http_port:
        try:
            _try(settings.http_host, settings.http_port)
        except OSError as error:
            raise http_port_taken(settings.http_host, settings.http_port, error) from None


def _try(host: str, port: int) -> None:
    """Raises OSError when the port is taken, or there is no such address."""
    for family, kind, protocol, _, where in socket.getaddrinfo(usable_host(host), port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as probe:
            # Ports of connections that have just ended are free; without SO_REUSEPORT a listener is a conflict.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(where)
