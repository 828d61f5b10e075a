"""Bearer tokens: a JSON file with their hashes, scopes and limits, and the command line that writes it.

    python -m serve.access.tokens add tokens.json --name batch-jobs --scopes generate   # prints the token, this once
    python -m serve.access.tokens remove tokens.json --name batch-jobs

A token is ``<name>.<256 random bits>``; the file holds the SHA-256 of the whole, which at that length is as hard to
turn round as to guess. The name finds the entry, and is what metrics and logs may show; the hashes are compared in
constant time.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from serve.background import keep_looking
from serve.command_line import OneLineParser, failed, run_command, within
from serve.errors import SettingsError, UnauthenticatedError
from serve.files import Watched, locked, replace_file

log = logging.getLogger(__name__)

FLAG = "--tokens-file"
NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,62}"
SECRET_BYTES = 32
MAX_TOKEN_CHARACTERS = 256
RELOAD_CHECK_S = 0.5
NO_HASH = "0" * 64


def _is_time(value: str) -> bool:
    try:
        moment = datetime.fromisoformat(value)
        return moment.tzinfo is not None and moment.timestamp() > 0
    except (ValueError, OverflowError):
        return False


class Token(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One entry of the file. The limits replace the server's own for this caller; 0 is none."""

    name: Annotated[str, Meta(pattern=rf"\A{NAME_PATTERN}\Z")]
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    scopes: Annotated[tuple[Literal["generate", "admin"], ...], Meta(min_length=1)]  # admin: of earlier releases, opens nothing
    expires: str | None = None  # ISO 8601 with a time zone
    images: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None  # in flight
    requests_per_s: Annotated[float, Meta(ge=0, le=1e6)] | None = None

    def __post_init__(self) -> None:
        if self.expires is not None and not _is_time(self.expires):
            raise ValueError("expires must be a time as 2027-01-31T00:00:00+00:00")

    @property
    def expires_at(self) -> float:
        """Seconds since the epoch; infinite without an expiry."""
        return float("inf") if self.expires is None else datetime.fromisoformat(self.expires).timestamp()


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[msgspec.Raw]


def parse_tokens(content: bytes, where: str) -> dict[str, Token]:
    """Read the file's bytes. Raises SettingsError naming ``where``, the entry and what is wrong; never a hash."""
    try:
        entries = msgspec.json.decode(content, type=_Document).tokens
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise SettingsError(f'{where} is not JSON of the form {{"tokens": [...]}}') from None
    tokens: dict[str, Token] = {}
    for number, entry in enumerate(entries):
        token = _parse_entry(entry, f"{where}: token {number}")
        if token.name in tokens:
            raise SettingsError(f"{where}: token {number}: the name {token.name!r} is there twice")
        tokens[token.name] = token
    return tokens


class TokenFile:
    """The tokens of a file, read anew by ``look``. A file that cannot be read then leaves the old ones in force."""

    def __init__(self, path: Path, note_reload: Callable[[str], None] = lambda result: None) -> None:
        """Raises SettingsError. ``note_reload`` gets ``ok`` or ``failed`` at each later reading."""
        self._note_reload = note_reload
        self._tokens = Watched([(FLAG, path)], lambda contents: parse_tokens(contents[0], f"{FLAG} {path}"))
        if any("admin" in token.scopes for token in self._tokens.value.values()):
            log.warning("%s: the scope admin has no meaning any more; which models are served is a file (docs/models.md)", path)

    def watch(self) -> None:
        """Check the file twice a second until the process ends, so that no call waits for a disk."""
        keep_looking("tokens", lambda: RELOAD_CHECK_S, self.look, lambda: self._note_reload("failed"))

    def look(self) -> None:
        """Read the file again if it has changed. Call it from one thread at a time."""
        if result := self._tokens.look():
            self._note_reload(result)

    def check(self, presented: str) -> Token:
        """The entry of a token. Raises UnauthenticatedError with one of the reasons malformed, unknown, expired."""
        name, separator, _ = presented.partition(".")
        if not separator or len(presented) > MAX_TOKEN_CHARACTERS:
            raise UnauthenticatedError("the bearer token is not of the form <name>.<secret>", "malformed")
        token = self._tokens.value.get(name)
        # The same work whether the name is known or not.
        hashed = hashlib.sha256(presented.encode("utf-8", "replace")).hexdigest()
        if not hmac.compare_digest(hashed, token.sha256 if token else NO_HASH) or token is None:
            raise UnauthenticatedError("the bearer token is not known here", "unknown")
        if token.expires_at <= time.time():
            raise UnauthenticatedError(f"the bearer token {name!r} expired at {token.expires}", "expired")
        return token


def main(arguments: Sequence[str] | None = None) -> int:
    """Add a token to a file or remove one. Returns the exit status; an error is one line on stderr."""
    flags = _parser().parse_args(arguments)
    try:
        with locked(flags.file.parent):
            _change(flags)
    except SettingsError as error:
        return failed(error)
    except OSError as error:
        return failed(f"{flags.file} cannot be written ({error.strerror}); name another file")
    return 0


def _change(flags: argparse.Namespace) -> None:
    """Change the file; a token that is added is printed first: one that nobody has seen must not be in force."""
    no_tokens: dict[str, Token] = {}
    tokens = Watched([("the file", flags.file)], lambda contents: parse_tokens(contents[0], str(flags.file)), no_tokens).value
    if flags.action == "add":
        if "admin" in flags.scopes.split(","):
            raise SettingsError("the scope admin is gone: python -m serve.admin edits the serving file; give --scopes generate")
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
        tokens[flags.name] = _parse_entry(msgspec.json.encode(entry), "the new token")
        print(presented, flush=True)
    elif flags.name in tokens:
        del tokens[flags.name]
    else:
        raise SettingsError(f"{flags.file} has no token {flags.name!r}; there are {', '.join(tokens) or 'none'}")
    _write(flags.file, tokens)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m serve.access.tokens", description="Add a bearer token to a file, or remove one.")
    parser.add_argument("action", choices=("add", "remove"))
    parser.add_argument("file", type=Path, help="the tokens file; created if it does not exist")
    parser.add_argument("--name", required=True, help="who the token is for; shown in metrics and logs")
    parser.add_argument("--scopes", default="generate", help="scopes of the token; generate is the only one (default: generate)")
    parser.add_argument("--expires", help="when the token expires, for example 2027-01-31T00:00:00+00:00 (default: never)")
    parser.add_argument("--images", type=int, help="limit of images in flight, instead of --caller-images; 0: no limit")
    parser.add_argument(
        "--requests-per-s",
        type=within(0.0, 1e6),
        help="limit of requests a second, instead of --caller-requests-per-s; 0: no limit",
    )
    return parser


def _parse_entry(entry: bytes | msgspec.Raw, where: str) -> Token:
    try:
        return msgspec.json.decode(entry, type=Token)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        # Where, and not what: msgspec's texts name types, bounds and fields, and an unknown field's name.
        raise SettingsError(f"{where}: {ascii(str(error))[1:-1][:200]}") from None


def _write(path: Path, tokens: Mapping[str, Token]) -> None:
    """All or nothing, and for its owner's eyes alone."""
    content = msgspec.json.format(msgspec.json.encode({"tokens": list(tokens.values())}), indent=2) + b"\n"
    replace_file(path, content, 0o600)


if __name__ == "__main__":
    run_command(main)
