"""An authority and its certificates, as files."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import trustme


class Certificates:
    """An authority and the files that a server and its clients use."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.cert, self.key, self.ca = folder / "tls.crt", folder / "tls.key", folder / "ca.crt"
        self.authority.cert_pem.write_to_path(self.ca)
        self.renew()

    def client(self, authority: trustme.CA | None = None, **times: datetime) -> tuple[Path, Path]:
        """Files of a client's certificate chain and of its key."""
        issued = (authority or self.authority).issue_cert("client", **times)  # type: ignore[arg-type]
        cert, key = self.ca.with_name("own.crt"), self.ca.with_name("own.key")
        issued.cert_chain_pems[0].write_to_path(cert)
        issued.private_key_pem.write_to_path(key)
        return cert, key

    def renew(self) -> None:
        """A new certificate and key, the key first, as a renewal by hand may have it."""
        issued = self.authority.issue_cert("localhost", "127.0.0.1")
        self.key.write_bytes(issued.private_key_pem.bytes())
        self.cert.write_bytes(issued.cert_chain_pems[0].bytes())

    @property
    def flags(self) -> list[str]:
        return [f"--tls-cert={self.cert}", f"--tls-key={self.key}"]
