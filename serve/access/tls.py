"""TLS for the gRPC and the HTTPS port: PEM files, checked before use and reloaded when they change.

A renewed certificate is used from the next handshake on; open connections keep the old one. TLS is 1.2 or newer.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grpc

from serve.background import keep_looking
from serve.errors import SettingsError
from serve.files import Watched

LOOK_S = 5.0
# gRPC's core frees the old certificate's context though another thread may be about to begin a handshake with it, and crashes
# (https://github.com/grpc/grpc/issues/36693). While it waits for the new one, no other thread gets that far: those that are on
# the way have this time to get past it.
SETTLES_S = 0.2


class Loaded(NamedTuple):
    """The content of the files at one time."""

    for_grpc: grpc.ServerCertificateConfiguration
    for_http: ssl.SSLContext


class Certificates:
    """What PEM files hold, read anew when they change, for any number of servers. Raises SettingsError.

    With ``client_ca`` only clients with a certificate by one of those authorities are accepted. ``note_reload`` gets ``ok`` or
    ``failed`` later on. Files that cannot be used when they have changed, a certificate without its new key for one, leave the
    old ones in force.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None, note_reload: Callable[[str], None]) -> None:
        self._note_reload = note_reload
        self._lock = threading.Lock()  # handshakes are in grpcio's threads
        self._client_auth = client_ca is not None
        named = {"--tls-cert": cert, "--tls-key": key, "--tls-client-ca": client_ca}
        flags = [(flag, path) for flag, path in named.items() if path is not None]
        self._watched = Watched(flags, partial(_loaded, flags))

    def credentials(self) -> grpc.ServerCredentials:
        """For one gRPC server: grpcio ties them to it."""
        given = self._watched.value.for_grpc

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            newest = self._newest().for_grpc
            if given is newest:
                return None
            given = newest
            time.sleep(SETTLES_S)
            return given

        return grpc.dynamic_ssl_server_credentials(given, fetch, require_client_authentication=self._client_auth)  # type: ignore[arg-type]

    def context(self) -> ssl.SSLContext:
        """For the next handshake over HTTP. It looks at the files: not for the event loop's thread."""
        return self._newest().for_http

    def watch(self) -> None:
        """Check the files until the process ends: a failed renewal is noticed before the next connection."""
        keep_looking("certificate", lambda: LOOK_S, self._newest, lambda: self._note_reload("failed"))

    def _newest(self) -> Loaded:
        with self._lock:
            if result := self._watched.look():
                self._note_reload(result)
            return self._watched.value


def _loaded(flags: Sequence[tuple[str, Path]], contents: Sequence[bytes]) -> Loaded:
    """What the files hold. Raises SettingsError when they cannot be used together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    cert_file, key_file, *authority_files = (path for _, path in flags)
    try:
        context.load_cert_chain(cert_file, key_file, password=_no_password)
        for path in authority_files:
            context.load_verify_locations(path)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = " and ".join(f"{flag} {path}" for flag, path in flags)
        raise SettingsError(f"{files} cannot be used: {error.args[-1] if error.args else error}") from None
    cert, key, *authorities = contents
    return Loaded(grpc.ssl_server_certificate_configuration([(key, cert)], *authorities), context)


def _no_password() -> str:
    raise ValueError("the key is encrypted; give it without a passphrase")
