"""Bundles on disk: finds them, reads them whole, and verifies their digests. Knows no session.

A bundle is read into memory once, so the verified bytes are the ones served, whatever happens to the folder afterwards.
Symbolic links are followed if they stay inside the repository (Kubernetes mounts consist of them).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from serve.errors import BundleError, DigestError
from serve.files import FileState, file_state, read_regular
from serve.manifest import (
    MANIFEST_FILE,
    NAME_PATTERN,
    ONNX_FILE,
    PARITY_FILE,
    QUALITY_FILE,
    Manifest,
    is_version,
    parse_manifest,
    sha256,
)

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 256 << 20  # of each of a bundle's files; the largest bundled model has 6 MB

KEPT = (ONNX_FILE, PARITY_FILE, QUALITY_FILE)

ReadT = TypeVar("ReadT")

# Changes when any of a version's files does. Cheap, and no proof of what is in them.
Fingerprint = tuple[tuple[str, FileState], ...]
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
        # What could last be read of each path, and what is wrong with it: at the scan before and at this one.
        self._before: dict[Path, tuple[Any, str]] = {}
        self._now: dict[Path, tuple[Any, str]] = {}

    def scan(self) -> Scan:
        """The complete versions of every model, each with a fingerprint. Raises BundleError without a folder that can be read.

        A version without a manifest is still being copied: export writes that last. What is there and cannot be read is named in
        the log, once, and counts as it was at the last scan: it is not gone.
        """
        try:
            entries = list(self.models_dir.iterdir())
        except OSError as error:
            gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
            reason = "is not a folder" if gone else f"cannot be read ({error.strerror})"
            raise BundleError(f"--models-dir {self.models_dir} {reason}; make export writes one, or leave the flag out") from None
        self._before, self._now = self._now, {}
        if self._single:
            return self._scan_single()
        names = sorted(entry.name for entry in entries if NAME_PATTERN.fullmatch(entry.name))
        found = {name: self._versions(self.models_dir / name) for name in names}
        return {name: versions for name, versions in found.items() if versions}

    def _scan_single(self) -> Scan:
        """The model is called what the newest version's manifest that can be read calls it."""
        versions, root = self._versions(self.models_dir), self.models_dir.resolve()
        for path in (self.models_dir / str(number) / MANIFEST_FILE for number in sorted(versions, reverse=True)):
            with contextlib.suppress(BundleError):  # loading this version tells what is wrong with it
                return {parse_manifest(_read(path, root), str(path)).name: versions}
        return {}

    def _versions(self, folder: Path) -> dict[int, Fingerprint]:
        marks = {number: self._look(folder / str(number), self._fingerprint) for number in self._look(folder, _numbers) or ()}
        return {number: mark for number, mark in marks.items() if mark}

    def _fingerprint(self, folder: Path) -> Fingerprint:
        """A version's; empty for one that is not complete."""
        files = [(entry.name, self._look(entry, _file_state)) for entry in sorted(folder.iterdir())]
        marks = tuple((name, state) for name, state in files if state)
        return marks if MANIFEST_FILE in dict(marks) else ()

    def _look(self, path: Path, action: Callable[[Path], ReadT]) -> ReadT | None:
        """What an action reads of a path; what it read before where that fails; None where there is nothing."""
        try:
            result = action(path)
            self._now[path] = result, ""
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR) and not path.is_symlink():
                return None
            before: ReadT | None
            before, problem = self._before.get(path, (None, ""))
            if problem != error.strerror:
                log.warning("%s cannot be read (%s); it counts as it was before", path, error.strerror)
            self._now[path] = before, str(error.strerror)
            return before
        return result

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
        content = _read(path / file, root)
        if sha256(content) != digest:
            raise DigestError(f"{path / file} is not the file that was exported (SHA-256 differs); export the model again")
        if file in KEPT:
            contents[file] = content
    parity, quality = (contents.get(name, b"").decode("utf-8", "replace") for name in (PARITY_FILE, QUALITY_FILE))
    return Bundle(path, manifest, contents[ONNX_FILE], parity, quality)


def _read(path: Path, root: Path) -> bytes:
    """A bundle file's bytes, if it is a regular file of a sane size inside the repository."""
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root):
            raise BundleError(f"{path} leads out of {root}; copy the file instead of linking it")
        return read_regular(real, MAX_FILE_BYTES, os.O_NOFOLLOW)[0]
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise BundleError(f"{path} cannot be read ({reason}); export the model again") from None


def _numbers(folder: Path) -> list[int]:
    """The versions that are in a model's folder."""
    return sorted(int(entry.name) for entry in folder.iterdir() if is_version(entry.name))


def _file_state(path: Path) -> FileState | None:
    """A regular file's; None for anything else."""
    status = path.stat()
    return file_state(status) if stat.S_ISREG(status.st_mode) else None
