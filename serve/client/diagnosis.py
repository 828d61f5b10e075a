"""Explains why no server could be reached: gRPC reports only the last address that it tried."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import grpc

from serve.client.channel import DEFAULT_TARGET, PLAIN, Access

TIMEOUT_S = 2.0
HTTP2 = ["h2"]


def described(error: grpc.RpcError, target: str, access: Access = PLAIN) -> str:
    """A failed call's status in one line, with the way out where nobody could be reached."""
    details = " ".join((error.details() or "").split())
    reason = why_unreachable(target, access) if error.code() is grpc.StatusCode.UNAVAILABLE else None
    return f"{error.code().name}: {reason or details}"


def why_unreachable(target: str, access: Access) -> str | None:
    """What is wrong with the way to a server, found by going it again; None when nothing is, or it is none that can be gone."""
    found = None
    for host, port in _addresses(target):
        try:
            connection = socket.create_connection((host, port), TIMEOUT_S)
        except OSError as error:
            found = (
                f"nobody answers at {host}:{port} ({error.strerror or error}); is a server running there? "
                f"make serve{_port_flag(port)} starts one"
            )
            continue
        with connection:
            return _why_refused(connection, host, access)
    return found


def _port_flag(port: int) -> str:
    return "" if DEFAULT_TARGET.endswith(f":{port}") else f' ARGS="--grpc-port {port}"'


def _why_refused(connection: socket.socket, host: str, access: Access) -> str | None:
    context = ssl.create_default_context()
    context.set_alpn_protocols(HTTP2)
    if access.ca is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        if access.ca is not None:
            context.load_verify_locations(access.ca)
        if access.cert is not None and access.key is not None:
            context.load_cert_chain(access.cert, access.key)
    except OSError:  # ssl.SSLError is one
        return f"{access.cert or access.ca} cannot be used: PEM files of certificates and their key are needed"
    reason: str | None = "the server there speaks TLS: give --ca, the file of the authority that its certificate is by"
    try:
        with context.wrap_socket(connection, server_hostname=host) as secure:
            if access.ca is not None:
                reason = _why_hung_up(secure)
    except ssl.SSLCertVerificationError as error:
        reason = f"the server's certificate is not accepted ({error.verify_message}); --ca {access.ca} names whom to trust"
    except ssl.SSLError:
        reason = None if access.ca is None else "the server there speaks plaintext: leave --ca out"
    except OSError:
        reason = None
    return reason


def _why_hung_up(secure: ssl.SSLSocket) -> str | None:
    """An HTTP/2 server speaks first; one that wants a certificate of its client hangs up instead (TLS 1.3)."""
    secure.settimeout(TIMEOUT_S)
    try:
        spoken = secure.recv(1)
    except TimeoutError:
        return None
    except OSError:
        spoken = b""
    return None if spoken else "the server ends the connection: it may want a certificate of its client (--cert and --key)"


def _addresses(target: str) -> Iterator[tuple[str, int]]:
    """The hosts and ports of a target, where they can be told from its text."""
    for each in target.removeprefix("dns:///").removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:").split(","):
        host, _, port = each.rpartition(":")
        if port.isascii() and port.isdecimal():
            yield host.strip("[]") or "localhost", int(port)
