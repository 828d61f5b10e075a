"""Explains why no server could be reached: gRPC reports only the last address that it tried, or that time has passed."""

from __future__ import annotations

import os
import queue
import socket
import ssl
import threading
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import grpc

from serve.client.channel import PLAIN, Access
from serve.client.errors import DigitError, retry_after_s
from serve.client.target import DEFAULT_TARGET, addresses, is_loopback

TIMEOUT_S = 2.0  # for one step on the way to one address
WHOLE_TIMEOUT_S = 5.0  # for the whole of it, names' resolution included
HTTP2 = ["h2"]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and settings, of which there are none
SETTINGS_FRAME = 4
HEALTH_REQUEST, NOT_SERVING = b"\x0a\x18digits.v1.DigitGenerator", b"\x08\x02"  # as grpc.health.v1's messages are on the wire
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")  # the first that is set has effect, as in gRPC's core
EXEMPTION_VARIABLES = ("no_grpc_proxy", "no_proxy")


def failure_of(error: Any, target: str, access: Access, timeout_s: float) -> DigitError:
    """What a client raises in the place of a ``grpc.RpcError``, or of a TimeoutError: a stream's next answer was late."""
    if isinstance(error, DigitError):  # of an answer that cannot be used
        return error
    late = isinstance(error, TimeoutError)
    code = grpc.StatusCode.DEADLINE_EXCEEDED if late else error.code()
    text = "" if late else error.details() or ""
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        reason = why_unreachable(target, access)
        if reason is None and (late or not _by_a_server(error)):
            reason = _why_not_called(target, access)
        if reason is not None:
            return DigitError(grpc.StatusCode.UNAVAILABLE, reason)
    if late or text == "Deadline Exceeded":  # gRPC's own words, which do not say how long it was
        text = f"no answer from {target} within {timeout_s:g} s"
    return DigitError(code, text, None if late else retry_after_s(error))


def _by_a_server(error: Any) -> bool:
    """Whether a server of ours made this error, and not gRPC on the way to one."""
    return any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())


def _why_not_called(target: str, access: Access) -> str | None:
    """Whether the server says that it is not to be called: clients keep away from such a server, and gRPC does not say so."""
    with access.open_channel(target, follow_health=False) as channel:
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            status = check(HEALTH_REQUEST, timeout=TIMEOUT_S)
        except grpc.RpcError:
            return None
    if status != NOT_SERVING:
        return None
    return f"the server at {target} says that it is not ready: it is stopping, or none of its models can answer (its /readyz)"


def why_unreachable(target: str, access: Access) -> str | None:
    """What is wrong with the way to a server, found by going it again; None when nothing is, or it is none that can be gone."""
    found: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: found.put(_why_unreachable(target, access)), daemon=True).start()
    try:
        return found.get(timeout=WHOLE_TIMEOUT_S)
    except queue.Empty:
        return f"no connection to {target} came about within {WHOLE_TIMEOUT_S:g} s"


def _why_unreachable(target: str, access: Access) -> str | None:
    found = None
    for host, port in addresses(target):
        proxy = None if is_loopback(target) else _proxy_for(host)
        try:
            with _connected(host, port, proxy) as connection:
                return _why_refused(connection, host, port, access) if access.ca else _why_not_grpc(connection, host, port)
        except OSError as error:
            reason = error.strerror or str(error)
            found = _not_through(proxy[0], host, port, reason) if proxy else _nobody_at(host, port, reason)
    return found


def _not_through(variable: str, host: str, port: int, reason: str) -> str:
    return f"the proxy that {variable} names does not lead to {host}:{port} ({reason}); no_proxy={host} leaves it out"


def _nobody_at(host: str, port: int, reason: str) -> str:
    flag = "" if DEFAULT_TARGET.endswith(f":{port}") else f' ARGS="--grpc-port {port}"'
    return f"nobody answers at {host}:{port} ({reason}); is a server running there? make serve{flag} starts one"


def _connected(host: str, port: int, proxy: tuple[str, str, int] | None) -> socket.socket:
    """Raises OSError."""
    if proxy is None:
        return socket.create_connection((host, port), TIMEOUT_S)
    connection = socket.create_connection(proxy[1:], TIMEOUT_S)
    connection.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode("ascii", "replace"))
    line = connection.recv(1024).partition(b"\r\n")[0].decode("ascii", "replace")
    if line.split()[1:2] != ["200"]:
        connection.close()
        raise OSError(line[:64] or "it ends the connection")
    return connection


def _proxy_for(host: str) -> tuple[str, str, int] | None:
    """The variable that has gRPC go through a proxy, and the proxy's host and port."""
    exempt, variable = (next(filter(os.environ.get, names), "") for names in (EXEMPTION_VARIABLES, PROXY_VARIABLES))
    suffixes = [each.strip() for each in os.environ.get(exempt, "").split(",")]
    if not variable or any(suffix and host.endswith(suffix) for suffix in suffixes):
        return None
    try:
        parts = urlsplit(os.environ[variable])
        return variable, parts.hostname or "", parts.port or 80
    except ValueError:
        return variable, "", 80


def _why_not_grpc(connection: socket.socket, host: str, port: int) -> str | None:
    """An HTTP/2 server answers the preface with its settings."""
    connection.settimeout(TIMEOUT_S)
    try:
        connection.sendall(PREFACE)
        answer = connection.recv(1024)
    except TimeoutError:
        return f"what is at {host}:{port} takes connections and says nothing: it hangs, or speaks another protocol"
    except OSError:
        answer = b""
    if answer.startswith(b"HTTP/"):
        return _no_grpc_port(host, port, "an HTTP port")
    if answer[3:4] == bytes([SETTINGS_FRAME]):
        return None
    with suppress(OSError), socket.create_connection((host, port), TIMEOUT_S) as again:
        if (reason := _why_refused(again, host, port, PLAIN)) is not None:
            return reason
    return f"what answers at {host}:{port} is no gRPC server"


def _no_grpc_port(host: str, port: int, kind: str) -> str:
    usual = DEFAULT_TARGET.rpartition(":")[2]
    return f"{host}:{port} is {kind}; give the server's gRPC port ({usual} unless it was told otherwise)"


def _why_refused(connection: socket.socket, host: str, port: int, access: Access) -> str | None:
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
            if secure.selected_alpn_protocol() not in HTTP2:
                reason = _no_grpc_port(host, port, "an HTTPS port, or behind something that does not speak HTTP/2")
            elif access.ca is not None:
                reason = _why_hung_up(secure, access)
    except ssl.SSLCertVerificationError as error:
        reason = f"the server's certificate is not accepted ({error.verify_message}); --ca {access.ca} names whom to trust"
    except ssl.SSLError:
        reason = None if access.ca is None else "the server there speaks plaintext: leave --ca out"
    except OSError:
        reason = None
    return reason


def _why_hung_up(secure: ssl.SSLSocket, access: Access) -> str | None:
    """An HTTP/2 server speaks first; one that wants a certificate of its client hangs up instead (TLS 1.3)."""
    secure.settimeout(TIMEOUT_S)
    try:
        spoken = secure.recv(1)
    except TimeoutError:
        return None
    except OSError:
        spoken = b""
    if spoken:
        return None
    wanted = f"it may not accept {access.cert}" if access.cert else "it may want a certificate of its client (--cert and --key)"
    return f"the server ends the connection: {wanted}"
