"""Version policies, as in ``--versions``: which versions of a model are served unless the desired state names them."""

from __future__ import annotations

from collections.abc import Collection

from serve.errors import SettingsError
from serve.manifest import NAME_PATTERN

MAX_VERSION_DIGITS = 18  # so that every version fits an int64

Policy = int | tuple[int, ...]  # the latest so many, or those


def pick(policy: Policy, versions: Collection[int]) -> list[int]:
    """The versions to serve out of those there are, lowest first."""
    return sorted(versions)[-policy:] if isinstance(policy, int) else sorted(set(policy) & set(versions))


def parse_policies(text: str) -> dict[str, Policy]:
    """Read ``latest``, ``latest:3``, ``1+4`` and ``mlp=latest:2,dcgan=1+4,latest``: by model, ``""`` for all others.

    Raises SettingsError.
    """
    policies: dict[str, Policy] = {"": 1}
    for entry in text.split(","):
        name, separator, policy = entry.strip().rpartition("=")
        if separator and not NAME_PATTERN.fullmatch(name):
            raise SettingsError(f"--versions: {name[:64]!r} is no model name")
        policies[name] = parse_policy(policy)
    return policies


def parse_policy(text: str) -> Policy:
    """Read one policy: ``latest``, ``latest:3`` or ``1+4``. Raises SettingsError."""
    kind, _, number = text.partition(":")
    if kind == "latest" and (not number or is_version(number)):
        return int(number or 1)
    numbers = text.split("+")
    if all(is_version(each) for each in numbers):
        return tuple(map(int, numbers))
    raise SettingsError(f"--versions: {text[:64]!r} is no policy; give latest, latest:N, or numbers as in 1+4")


def is_version(text: str) -> bool:
    """Whether a text, a folder's name for one, is a version number: decimal, 1 or more, no leading zero."""
    return text.isascii() and text.isdecimal() and len(text) <= MAX_VERSION_DIGITS and not text.startswith("0")
