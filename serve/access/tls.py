"""TLS for the gRPC port: PEM files, checked before they are used, and read anew when they change.

Renewed certificates are taken up at the next handshake; connections that stand keep theirs. gRPC's TLS is 1.2 or newer.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from serve.config.file_state import FileState, file_state
from serve.errors import SettingsError

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


def credentials(files: TlsFiles, note_reload: Callable[[str], None]) -> grpc.ServerCredentials:
    """Credentials that follow the files. Raises SettingsError. ``note_reload`` gets ``ok`` or ``failed`` later on.

    Files that cannot be used when they have changed, a certificate without its new key for one, leave the old ones in force.
    """
    state = files.state()
    first = files.read()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal state
        now = files.state()
        if now == state:
            return None
        state = now
        try:
            changed = files.read()
        except SettingsError as error:
            log.error("the certificate stays as it was: %s", error)
            note_reload("failed")
            return None
        log.info("%s has been read anew", files.cert)
        note_reload("ok")
        return changed

    return grpc.dynamic_ssl_server_credentials(first, fetch, require_client_authentication=files.client_ca is not None)  # type: ignore[arg-type]


def _no_password() -> str:
    raise ValueError("the key is encrypted; give it without a passphrase")
