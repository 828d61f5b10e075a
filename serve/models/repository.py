"""Bundles on disk: finds them, reads them whole, and verifies their digests. Knows no session.

A bundle is read into memory once, so the verified bytes are the ones served, whatever happens to the folder afterwards.
Symbolic links are followed if they stay inside the repository (Kubernetes mounts consist of them).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from serve.errors import BundleError, DigestError
from serve.manifest import MANIFEST_FILE, NAME_PATTERN, ONNX_FILE, PARITY_FILE, QUALITY_FILE, Manifest, parse_manifest, sha256
from serve.models.version_policy import is_version

MAX_FILE_BYTES = 1 << 30

# Changes when any of a version's files does: name, time, size, inode. Cheap, and no proof of what is in them.
Fingerprint = tuple[tuple[str, int, int, int], ...]
Scan = Mapping[str, Mapping[int, Fingerprint]]  # model → version


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files all have the digests its manifest lists. ``model`` is model.onnx's bytes."""

    path: Path
    manifest: Manifest
    model: bytes
    parity_json: str
    quality_json: str = ""  # empty for a bundle whose digits were not judged

    @property
    def digest(self) -> str:
        """SHA-256 of the model file."""
        return self.manifest.files[ONNX_FILE]


class Repository:
    """The folder ``<name>/<version>/``. Raises BundleError for whatever in it cannot be used, naming the file.

    ``single``: ``<version>/`` of one model, called as its manifests say: what KServe puts before a server.
    """

    def __init__(self, models_dir: Path, *, single: bool = False) -> None:
        self.models_dir = models_dir
        self._single = single

    def scan(self) -> Scan:
        """The complete versions of every model, each with a fingerprint. Raises BundleError when there is no such folder.

        A version without a manifest is still being copied: export writes that last.
        """
        if not self.models_dir.is_dir():
            raise BundleError(f"--models-dir {self.models_dir} is not a folder; make export writes one, or leave the flag out")
        if self._single:
            versions = self._versions(self.models_dir)
            return {self._name(versions): versions} if versions else {}
        names = sorted(entry.name for entry in self.models_dir.iterdir() if NAME_PATTERN.fullmatch(entry.name) and entry.is_dir())
        found = {name: self._versions(self.models_dir / name) for name in names}
        return {name: versions for name, versions in found.items() if versions}

    def _name(self, versions: Mapping[int, Fingerprint]) -> str:
        """What the newest version's manifest calls the model."""
        path = self.models_dir / str(max(versions)) / MANIFEST_FILE
        return parse_manifest(_read(path, self.models_dir.resolve()), str(path)).name

    def _versions(self, folder: Path) -> dict[int, Fingerprint]:
        versions = {}
        for entry in folder.iterdir():
            if is_version(entry.name) and (entry / MANIFEST_FILE).is_file():
                with contextlib.suppress(OSError):  # it is being taken away at this moment
                    versions[int(entry.name)] = _fingerprint(entry)
        return dict(sorted(versions.items()))

    def read(self, name: str, version: int) -> Bundle:
        """Read and check one version. Raises BundleError, or DigestError when a file is not what was exported."""
        if not NAME_PATTERN.fullmatch(name):
            raise BundleError(f"{name[:64]!r} is no model name: lower-case letters, digits, - and _, at most 63")
        folder = self.models_dir if self._single else self.models_dir / name
        return read_bundle(folder / str(version), self.models_dir, name)


def read_bundle(path: Path, root: Path | None = None, name: str | None = None) -> Bundle:
    """Read and check one ``<name>/<version>`` folder, whose files must lie below ``root`` (default: the folder itself).

    ``name`` is the model's where the folder above is not called after it.

    Raises BundleError naming the file and the way out; DigestError when a file is not the one that was exported.
    """
    root = (root or path).resolve()
    manifest = parse_manifest(_read(path / MANIFEST_FILE, root), str(path / MANIFEST_FILE))
    if (manifest.name, str(manifest.version)) != (name or path.parent.name, path.name):
        raise BundleError(
            f"{path} holds model {manifest.name}/{manifest.version}; the folders must be called as the manifest says"
        )
    contents = {}
    for file, digest in manifest.files.items():
        if "/" in file or "\0" in file or file.startswith("."):
            raise BundleError(f"{path / MANIFEST_FILE} lists {file[:40]!r}, which is no plain file name; export again")
        contents[file] = _read(path / file, root)
        if sha256(contents[file]) != digest:
            raise DigestError(f"{path / file} is not the file that was exported (SHA-256 differs); export the model again")
    parity, quality = (contents.get(name, b"").decode("utf-8", "replace") for name in (PARITY_FILE, QUALITY_FILE))
    return Bundle(path, manifest, contents[ONNX_FILE], parity, quality)


def _read(path: Path, root: Path) -> bytes:
    """A bundle file's bytes, if it is a plain file of a sane size inside the repository."""
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root):
            raise BundleError(f"{path} leads out of {root}; copy the file instead of linking it")
        # Not to be caught waiting on a pipe that somebody put there.
        with os.fdopen(os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
                raise BundleError(f"{path} is no plain file of at most {MAX_FILE_BYTES} bytes; export the model again")
            return file.read(MAX_FILE_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise BundleError(f"{path} cannot be read ({reason}); export the model again") from None


def _fingerprint(folder: Path) -> Fingerprint:
    files = [(entry.name, entry.stat()) for entry in sorted(folder.iterdir())]
    return tuple((name, status.st_mtime_ns, status.st_size, status.st_ino) for name, status in files)
