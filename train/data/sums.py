"""``SHA256SUMS``: which digests the files of a folder must have; without it, MNIST's own.

Lines as GNU's sha256sum writes them, or with ``--tag``, as BSD and macOS do; of the files as they are, or unpacked.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import shlex
from pathlib import Path

from train.data.files import DIGESTS, Found, canonical
from train.errors import DataError

SUMS_FILE = "SHA256SUMS"
_GNU = re.compile(r"\\?([0-9a-fA-F]{64})\s+\*?(.+?)\s*")
_TAGGED = re.compile(r"\\?SHA256 ?\((.+)\) ?= ?([0-9a-fA-F]{64})\s*")


def check(found: Found, root: Path, name: str, stored: bytes, content: bytes) -> str:
    """The SHA-256 of a file's ``content``. Raises DataError unless it, or that of the ``stored`` file, is the expected one."""
    digest, path = sha256(content), found.paths[name]
    sums = next((each / SUMS_FILE for each in (found.folder, root) if (each / SUMS_FILE).exists()), None)
    if sums is None:
        if digest != DIGESTS[name]:
            raise DataError(
                f"{path} has SHA-256 {digest[:12]}…, and MNIST's is {DIGESTS[name][:12]}…: empty {found.folder} to have MNIST"
                f" fetched, or list the digests of a data set of your own: {how_to_list(found)}"
            )
        return digest
    listed = listed_digests(sums)
    wanted = {each for each in (listed.get(name), listed.get(f"{name}.gz")) if each}
    if not wanted:
        raise DataError(f"{sums} lists no digest of {name}; write it again: {how_to_list(found)}")
    if not wanted & {digest, sha256(stored)}:
        raise DataError(
            f"{path} has SHA-256 {digest[:12]}…, and {sums} lists {min(wanted)[:12]}…: copy the file anew, or, if it was meant"
            f" to change: {how_to_list(found)}"
        )
    return digest


def listed_digests(sums: Path) -> dict[str, str]:
    """By MNIST's names of the files, with ``.gz`` behind that of a packed one. Raises DataError when it is no text."""
    try:
        stored = sums.read_bytes()
        # PowerShell's ">" writes UTF-16.
        text = stored.decode("utf-16" if stored.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{sums} is no text file of digests and names; delete it, or write it with sha256sum") from None
    digests = {}
    for line in text.splitlines():
        if match := _GNU.fullmatch(line):
            digest, name = match.groups()
        elif match := _TAGGED.fullmatch(line):
            name, digest = match.groups()
        else:
            continue
        base = re.split(r"[/\\]", name)[-1]
        digests[canonical(base) + ".gz" * base.endswith(".gz")] = digest.lower()
    return digests


def how_to_list(found: Found) -> str:
    """The command that lists the digests of the files that are there."""
    names = " ".join(shlex.quote(path.relative_to(found.folder).as_posix()) for path in found.paths.values())
    return f"(cd {shlex.quote(str(found.folder))} && sha256sum {names} > {SUMS_FILE})"


def sha256(content: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()
