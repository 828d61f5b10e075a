"""Version policies, as in ``--versions``: which versions of a model are served unless the desired state names them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from serve.errors import SettingsError
from serve.manifest import NAME_PATTERN

MAX_VERSION_DIGITS = 18  # so that every version fits an int64


@dataclass(frozen=True)
class VersionPolicy:
    """Which of a model's versions are served: the ``latest`` so many, or, where ``pinned`` is not None, those."""

    latest: int = 1
    pinned: tuple[int, ...] | None = None

    def pick(self, versions: Collection[int]) -> list[int]:
        """The versions to serve out of those there are, lowest first."""
        if self.pinned is not None:
            return sorted(set(self.pinned) & set(versions))
        return sorted(versions)[-self.latest :]


@dataclass(frozen=True)
class VersionPolicies:
    """A policy for each model: its own, or the ``default`` one."""

    default: VersionPolicy = field(default_factory=VersionPolicy)
    own: Mapping[str, VersionPolicy] = field(default_factory=dict)

    def of(self, name: str) -> VersionPolicy:
        """The policy of the model of that name."""
        return self.own.get(name, self.default)


def parse_policies(text: str) -> VersionPolicies:
    """Read ``latest``, ``latest:3``, ``1+4`` and ``mlp=latest:2,dcgan=1+4,latest``. Raises SettingsError."""
    default, own = VersionPolicy(), {}
    for entry in text.split(","):
        name, separator, policy = entry.strip().rpartition("=")
        if separator and not NAME_PATTERN.fullmatch(name):
            raise SettingsError(f"--versions: {name[:64]!r} is no model name")
        if separator:
            own[name] = parse_policy(policy)
        else:
            default = parse_policy(policy)
    return VersionPolicies(default, own)


def parse_policy(text: str) -> VersionPolicy:
    """Read one policy: ``latest``, ``latest:3`` or ``1+4``. Raises SettingsError."""
    kind, _, number = text.partition(":")
    if kind == "latest" and (not number or is_version(number)):
        return VersionPolicy(latest=int(number or 1))
    numbers = text.split("+")
    if all(is_version(each) for each in numbers):
        return VersionPolicy(pinned=tuple(map(int, numbers)))
    raise SettingsError(f"--versions: {text[:64]!r} is no policy; give latest, latest:N, or numbers as in 1+4")


def is_version(text: str) -> bool:
    """Whether a text, a folder's name for one, is a version number: decimal, 1 or more, no leading zero."""
    return text.isascii() and text.isdecimal() and len(text) <= MAX_VERSION_DIGITS and not text.startswith("0")
