"""Bearer tokens: a JSON file with their hashes, scopes and limits, and the command line that writes it.

    python -m serve.access.tokens add tokens.json --name batch-jobs --scopes generate   # prints the token, this once
    python -m serve.access.tokens remove tokens.json --name batch-jobs

A token is ``<name>.<256 random bits>``; the file holds the SHA-256 of the whole, which at that length is as hard to
turn round as to guess. The name finds the entry, and is what metrics and logs may show; the hashes are compared in
constant time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from serve.access.file_state import file_state
from serve.errors import SettingsError, UnauthenticatedError
from serve.one_line import OneLineParser

log = logging.getLogger(__name__)

SCOPES = ("generate", "admin")
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
HASH_PATTERN = re.compile(r"[0-9a-f]{64}")
SECRET_BYTES = 32
MAX_FILE_BYTES = 1 << 20
MAX_TOKEN_CHARACTERS = 256
RELOAD_CHECK_S = 0.5
NO_HASH = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Token:
    """One entry of the file. The limits replace the server's own for this caller; 0 is none."""

    name: str
    sha256: str
    scopes: tuple[str, ...]
    expires: str | None = None  # ISO 8601 with a time zone
    images: int | None = None  # in flight
    requests_per_s: float | None = None

    @property
    def expires_at(self) -> float:
        """Seconds since the epoch; infinite without an expiry."""
        return float("inf") if self.expires is None else datetime.fromisoformat(self.expires).timestamp()


def parse_tokens(content: bytes, where: str) -> dict[str, Token]:
    """Read the file's bytes. Raises SettingsError naming ``where``, the entry and what is wrong; never a hash."""
    try:
        values = json.loads(content) if len(content) <= MAX_FILE_BYTES else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or set(values) != {"tokens"} or not isinstance(values["tokens"], list):
        raise SettingsError(f'{where} is not JSON of the form {{"tokens": [...]}} and at most {MAX_FILE_BYTES} bytes')
    tokens: dict[str, Token] = {}
    for number, entry in enumerate(values["tokens"]):
        token = _parse_entry(entry, f"{where}: token {number}")
        if token.name in tokens:
            raise SettingsError(f"{where}: token {number}: the name {token.name!r} is there twice")
        tokens[token.name] = token
    return tokens


class TokenFile:
    """The tokens of a file, read anew when it changes. One that cannot be read then leaves the old ones in force."""

    def __init__(self, path: Path, note_reload: Callable[[str], None] = lambda result: None) -> None:
        """Raises SettingsError. ``note_reload`` gets ``ok`` or ``failed`` at each later reading."""
        self._path = path
        self._note_reload = note_reload
        self._state = file_state(path)
        self._tokens = _read(path)
        self._look_again_at = time.monotonic() + RELOAD_CHECK_S

    def check(self, presented: str) -> Token:
        """The entry of a token. Raises UnauthenticatedError with one of the reasons malformed, unknown, expired."""
        self._reload()
        name, separator, _ = presented.partition(".")
        if not separator or len(presented) > MAX_TOKEN_CHARACTERS:
            raise UnauthenticatedError("the bearer token is not of the form <name>.<secret>", "malformed")
        token = self._tokens.get(name)
        # The same work whether the name is known or not.
        hashed = hashlib.sha256(presented.encode("utf-8", "replace")).hexdigest()
        if not hmac.compare_digest(hashed, token.sha256 if token else NO_HASH) or token is None:
            raise UnauthenticatedError("the bearer token is not known here", "unknown")
        if token.expires_at <= time.time():
            raise UnauthenticatedError(f"the bearer token {name!r} expired at {token.expires}", "expired")
        return token

    def _reload(self) -> None:
        now = time.monotonic()
        if now < self._look_again_at:
            return
        self._look_again_at = now + RELOAD_CHECK_S
        state = file_state(self._path)
        if state == self._state:
            return
        self._state = state
        try:
            self._tokens = _read(self._path)
        except SettingsError as error:
            log.error("the tokens stay as they were: %s", error)
            self._note_reload("failed")
        else:
            log.info("%s has been read anew: %d tokens", self._path, len(self._tokens))
            self._note_reload("ok")


def main(arguments: Sequence[str] | None = None) -> int:
    """Add a token to a file or remove one. Returns the exit status; an error is one line on stderr."""
    flags = _parser().parse_args(arguments)
    try:
        tokens = _read(flags.file) if flags.file.exists() else {}
        if flags.action == "add":
            if flags.name in tokens:
                raise SettingsError(f"{flags.file} has a token {flags.name!r} already; remove it first")
            presented = f"{flags.name}.{secrets.token_urlsafe(SECRET_BYTES)}"
            entry = {
                "name": flags.name,
                "sha256": hashlib.sha256(presented.encode()).hexdigest(),
                "scopes": flags.scopes.split(","),
                "expires": flags.expires,
                "images": flags.images,
                "requests_per_s": flags.requests_per_s,
            }
            tokens[flags.name] = _parse_entry(entry, "the new token")
            _write(flags.file, tokens)
            print(presented)
        else:
            if flags.name not in tokens:
                raise SettingsError(f"{flags.file} has no token {flags.name!r}; there are {', '.join(tokens) or 'none'}")
            del tokens[flags.name]
            _write(flags.file, tokens)
    except (SettingsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m serve.access.tokens", description="Add a bearer token to a file, or remove one.")
    parser.add_argument("action", choices=("add", "remove"))
    parser.add_argument("file", type=Path, help="the tokens file; made when it is not there")
    parser.add_argument("--name", required=True, help="who the token is for; shown in metrics and logs")
    parser.add_argument("--scopes", default="generate", help=f"joined by commas: {', '.join(SCOPES)} (default: generate)")
    parser.add_argument("--expires", help="when it ends, as 2027-01-31T00:00:00+00:00 (default: never)")
    parser.add_argument("--images", type=int, help="images in flight, instead of --caller-images; 0: no limit")
    parser.add_argument("--requests-per-s", type=float, help="instead of --caller-requests-per-s; 0: no limit")
    return parser


def _parse_entry(entry: Any, where: str) -> Token:
    fields = {field.name: field.default for field in dataclasses.fields(Token)}
    if not isinstance(entry, dict):
        raise SettingsError(f"{where} is not an object")
    if odd := sorted(set(entry) - set(fields)) or [name for name in ("name", "sha256", "scopes") if name not in entry]:
        raise SettingsError(f"{where}: field {odd[0][:40]!r} is missing or unknown")
    values: Mapping[str, Any] = {name: entry.get(name) for name in fields}
    scopes, limits = values["scopes"], (values["images"], values["requests_per_s"])
    checks = {
        "name": _matches(NAME_PATTERN, values["name"]),
        "sha256": _matches(HASH_PATTERN, values["sha256"]),
        "scopes": isinstance(scopes, list) and bool(scopes) and all(scope in SCOPES for scope in scopes),
        "expires": values["expires"] is None or _is_time(values["expires"]),
        "images": limits[0] is None or (type(limits[0]) is int and 0 <= limits[0] < 1 << 31),
        "requests_per_s": limits[1] is None or (type(limits[1]) in (int, float) and 0 <= limits[1] <= 1e6),
    }
    for name, holds in checks.items():
        if not holds:
            raise SettingsError(f"{where}: field {name!r} has an unusable value")
    return Token(**{**values, "scopes": tuple(scopes)})


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_time(value: Any) -> bool:
    try:
        moment = datetime.fromisoformat(value)
        return moment.tzinfo is not None and moment.timestamp() > 0
    except (TypeError, ValueError, OverflowError):
        return False


def _read(path: Path) -> dict[str, Token]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"--tokens-file {path} cannot be read ({error.strerror})") from None
    return parse_tokens(content, f"--tokens-file {path}")


def _write(path: Path, tokens: Mapping[str, Token]) -> None:
    """All or nothing, and for its owner's eyes alone."""
    entries = [{key: value for key, value in dataclasses.asdict(token).items() if value is not None} for token in tokens.values()]
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tokens-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps({"tokens": entries}, indent=2) + "\n")
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


if __name__ == "__main__":
    sys.exit(main())
