"""Channels to a server: their options, certificates and tokens. For the client and for tools that call a server."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from serve.client.errors import mistake
from serve.client.target import DEFAULT_TARGET, addresses, check_target, is_loopback

File = str | os.PathLike[str]
TOKEN_VARIABLE = "DIGITS_TOKEN"
MAX_RESPONSE_BYTES = 64 << 20
CONNECT_S = 5.0  # for a connection to stand, and between two tries of one: back within seconds after an outage

# A digit is a pure function of its address, so trying again is always safe. CANCELLED is what gRPC's core answers for
# calls that a stopping server had not yet looked at. What an overloaded one refuses is left to the clients: gRPC would wait as
# long as it says (grpc-retry-pushback-ms), beyond the call's end too, and then tell of the end alone.
# Health checking takes a replica out of the rotation as soon as it begins to drain.
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"weighted_round_robin": {}}, {"round_robin": {}}],
    "healthCheckConfig": {"serviceName": "digits.v1.DigitGenerator"},
    "methodConfig": [
        {
            "name": [{"service": "digits.v1.DigitGenerator"}],
            "waitForReady": True,
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "2s",
                "backoffMultiplier": 4,
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
}
CHANNEL_OPTIONS = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    # Of a request beyond it (256 KiB by default) gRPC keeps no copy, and so does not try it again; a server takes 4 MiB.
    ("grpc.per_rpc_retry_buffer_size", 8 << 20),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(CONNECT_S * 1000)),
]


@dataclass(frozen=True, kw_only=True)
class Access:
    """Credentials for a server. ``ca``, ``cert`` and ``key`` are PEM files; without ``ca``, plaintext."""

    token: str = ""
    ca: File | None = None  # the authorities that the server's certificate is checked against
    cert: File | None = None  # this client's own certificate chain, where the server wants one
    key: File | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call. Raises DigitError for a token that cannot be sent."""
        token = (self.token or "").strip()  # of a file, whose line ends, or of a variable that is not set
        if not (token.isascii() and token.isprintable()):
            raise mistake("the token is not one line of plain characters, as serve.access.tokens prints it")
        return (("authorization", f"Bearer {token}"),) if token else ()

    def open_channel(self, target: str, *, follow_health: bool = True) -> grpc.Channel:
        """A channel to one or more replicas. Raises DigitError naming a target that is none or a file that cannot be read.

        Without ``follow_health`` a replica is called that says it serves nothing: to administer it.
        """
        channel: grpc.Channel = self._open(grpc, target, follow_health)
        return channel

    def open_asyncio_channel(self, target: str) -> grpc.aio.Channel:
        """As ``open_channel``, for asyncio."""
        channel: grpc.aio.Channel = self._open(grpc.aio, target, True)
        return channel

    def _open(self, transport: Any, target: str, follow_health: bool) -> Any:
        check_target(target)
        options: list[tuple[str, Any]] = list(CHANNEL_OPTIONS if follow_health else CHANNEL_OPTIONS[1:])
        if "," in target:
            # gRPC makes all of ``ipv4:host:port,host:port`` the calls' authority, which a strict HTTP/2 server refuses, and
            # the name that a certificate must be for.
            host, port = addresses(target)[0]
            options.append(("grpc.default_authority", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"))
        if is_loopback(target):
            options.append(("grpc.enable_http_proxy", 0))  # whatever http_proxy says: a proxy has another loopback
        if (self.cert is None) != (self.key is None) or (self.cert is not None and self.ca is None):
            raise mistake("--cert and --key go together, and with --ca")
        if self.ca is None:
            return transport.insecure_channel(target, options=options)
        ca, key, cert = (None if path is None else _read(path) for path in (self.ca, self.key, self.cert))
        return transport.secure_channel(target, grpc.ssl_channel_credentials(ca, key, cert), options=options)


PLAIN = Access()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the server's address and of the credentials."""
    parser.add_argument("--target", default=DEFAULT_TARGET, help=f"host:port of the server (default: {DEFAULT_TARGET})")
    parser.add_argument("--token-file", type=Path, help=f"file with the bearer token (default: ${TOKEN_VARIABLE})")
    parser.add_argument("--ca", type=Path, help="PEM file to check the server's certificate against (default: plaintext)")
    parser.add_argument("--cert", type=Path, help="PEM file of this client's certificate, where the server wants one")
    parser.add_argument("--key", type=Path, help="PEM file of its private key")


def access_from(flags: argparse.Namespace) -> Access:
    """The credentials from those flags. Raises DigitError naming a file that cannot be read."""
    token = _read(flags.token_file).decode("ascii", "replace") if flags.token_file else os.environ.get(TOKEN_VARIABLE, "")
    return Access(token=token, ca=flags.ca, cert=flags.cert, key=flags.key)


def _read(path: File) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise mistake(f"{path} cannot be read ({error.strerror})") from None
