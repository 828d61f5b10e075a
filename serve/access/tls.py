"""TLS for the gRPC port: PEM files, checked before use and reloaded when they change.

A renewed certificate is used from the next handshake on; open connections keep the old one. gRPC's TLS is 1.2 or newer.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import grpc

from serve.errors import SettingsError
from serve.files import Watched


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
        self._watched = Watched(flags, partial(_configuration, flags))

    def credentials(self) -> grpc.ServerCredentials:
        """For one server: grpcio ties them to it."""
        given = self._watched.value

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            with self._lock:
                if result := self._watched.look():
                    self._note_reload(result)
                if given is self._watched.value:
                    return None
                given = self._watched.value
                return given

        return grpc.dynamic_ssl_server_credentials(given, fetch, require_client_authentication=self._client_auth)  # type: ignore[arg-type]


def _configuration(flags: Sequence[tuple[str, Path]], contents: Sequence[bytes]) -> grpc.ServerCertificateConfiguration:
    """For grpcio, what the files hold. Raises SettingsError when they cannot be used together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    cert_file, key_file, *authority_files = (path for _, path in flags)
    try:
        context.load_cert_chain(cert_file, key_file, password=_no_password)
        for path in authority_files:
            context.load_verify_locations(path)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = " and ".join(f"{flag} {path}" for flag, path in flags)
        raise SettingsError(f"{files} cannot be used: {error.args[-1] if error.args else error}") from None
    cert, key, *authorities = contents
    return grpc.ssl_server_certificate_configuration([(key, cert)], *authorities)


def _no_password() -> str:
    raise ValueError("the key is encrypted; give it without a passphrase")
