"""The desired state: a JSON file that says which versions of a model are served, and which one is the default.

    {"schema_version": 1, "models": {
        "mlp": {"versions": [1, 2], "route": {"default": 1, "canary": 2, "canary_share": 0.05}},
        "dcgan": {"versions": "latest:2"},
        "cdcgan": {"versions": []}
    }}

The file outlives the process and is the same for every replica that reads it. A model that is not in it, or has no ``versions``
there, follows ``--versions``; without a ``route`` the highest version answers. ``previous`` has the earlier routes, newest last,
for a rollback.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from serve.errors import SettingsError
from serve.files import Watched
from serve.manifest import NAME_PATTERN, is_version

FILE_NAME = "serving.json"
FLAG = "--serving-file"
SCHEMA_VERSION = 1

Policy = int | tuple[int, ...]  # the latest so many versions, or those
Version = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which version answers a request that names none: the default, or for ``canary_share`` of the seeds the canary."""

    default: Version
    canary: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0  # 0: none
    canary_share: Annotated[float, Meta(ge=0, lt=1)] = 0.0

    def pick(self, seed: int) -> int:
        """The version for a seed below 2^64: always the same one as long as the route stands."""
        drawn = int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).digest(), "little")
        return self.canary if drawn < self.canary_share * 2**64 else self.default

    def share(self, version: int) -> float:
        """The share of such requests that ``version`` answers."""
        return {self.canary: self.canary_share, self.default: 1 - self.canary_share}.get(version, 0.0)

    @property
    def versions(self) -> set[int]:
        """The default, and the canary if there is one."""
        return {self.default, self.canary} - {0}


class ModelState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is wanted of one model. ``versions``: a policy as in ``--versions``, or a list; None: what ``--versions`` says."""

    versions: str | tuple[Version, ...] | None = None
    route: Route | None = None
    previous: tuple[Route, ...] = ()

    def policy(self, otherwise: Policy) -> Policy:
        """The version policy; ``otherwise`` where the state has none of its own."""
        if self.versions is None:
            return otherwise
        return parse_policy(self.versions) if isinstance(self.versions, str) else self.versions


class ServingState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is wanted of every model that is named."""

    schema_version: int = SCHEMA_VERSION
    models: dict[str, ModelState] = {}

    def of(self, name: str) -> ModelState:
        """What is wanted of the model of that name."""
        return self.models.get(name) or ModelState()


def parse_serving_state(content: bytes, where: str) -> ServingState:
    """Read the file's bytes. Raises SettingsError naming ``where`` and the field that is wrong."""
    try:
        state = msgspec.json.decode(content, type=ServingState)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SettingsError(f"{where}: {str(error).partition(chr(10))[0][:200]}") from None
    if state.schema_version != SCHEMA_VERSION:
        raise SettingsError(f"{where} has schema version {state.schema_version}, this server reads {SCHEMA_VERSION}")
    for name, model in state.models.items():
        if not NAME_PATTERN.fullmatch(name):
            raise SettingsError(f"{where}: {name[:64]!a} is no model name")
        if isinstance(model.versions, str):
            try:
                parse_policy(model.versions)
            except SettingsError:
                raise SettingsError(f"{where}: model {name}: {model.versions[:64]!a} is no version policy") from None
        for route in filter(None, (model.route, *model.previous)):
            if bool(route.canary) != bool(route.canary_share) or route.canary == route.default:
                raise SettingsError(f"{where}: model {name}: a canary needs a share, and another version than the default")
    return state


def watched_serving_file(path: Path) -> Watched[ServingState]:
    """The file, read anew when it changes. Raises SettingsError when there is a file and it cannot be used."""
    where = f"{FLAG} {path}"
    return Watched([(FLAG, path)], lambda contents: parse_serving_state(contents[0], where), missing=ServingState())


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
