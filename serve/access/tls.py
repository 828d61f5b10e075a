"""TLS for the gRPC port: PEM files, checked before use and reloaded when they change.

A renewed certificate is used from the next handshake on; open connections keep the old one. gRPC's TLS is 1.2 or newer.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from serve.errors import SettingsError
from serve.files import FileState, file_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. With ``client_ca`` only clients with a certificate by one of those authorities are accepted."""

    cert: Path
    key: Path
    client_ca: Path | None

    def state(self) -> tuple[FileState, ...]:
        """Changes when a file does."""
        return tuple(file_state(path) for path in (self.cert, self.key, self.client_ca) if path is not None)

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Raises SettingsError when the files cannot be used together."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
            authorities = None if self.client_ca is None else self.client_ca.read_bytes()
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
            pair = (self.key.read_bytes(), self.cert.read_bytes())
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = " and ".join(f"--tls-{flag} {path}" for flag, path in (("cert", self.cert), ("key", self.key)))
            authority = f" and --tls-client-ca {self.client_ca}" if self.client_ca else ""
            raise SettingsError(f"{files}{authority} cannot be used: {error.args[-1] if error.args else error}") from None
        return grpc.ssl_server_certificate_configuration([pair], authorities)


class Certificates:
    """What the files hold, read anew when they change, for any number of servers. Raises SettingsError.

    ``note_reload`` gets ``ok`` or ``failed`` later on. Files that cannot be used when they have changed, a certificate without
    its new key for one, leave the old ones in force.
    """

    def __init__(self, files: TlsFiles, note_reload: Callable[[str], None]) -> None:
        self._files = files
        self._note_reload = note_reload
        self._lock = threading.Lock()  # handshakes are in grpcio's threads
        self._state = files.state()
        self._current = files.read()

    def credentials(self) -> grpc.ServerCredentials:
        """For one server: grpcio ties them to it."""
        given = self._current

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            with self._lock:
                self._look()
                if given is self._current:
                    return None
                given = self._current
                return given

        return grpc.dynamic_ssl_server_credentials(given, fetch, require_client_authentication=self._files.client_ca is not None)  # type: ignore[arg-type]

    def _look(self) -> None:
        now = self._files.state()
        if now == self._state:
            return
        self._state = now
        try:
            self._current = self._files.read()
        except SettingsError as error:
            log.error("the certificate stays as it was: %s", error)
            self._note_reload("failed")
        else:
            log.info("%s has been read anew", self._files.cert)
            self._note_reload("ok")


def _no_password() -> str:
    raise ValueError("the key is encrypted; give it without a passphrase")
