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
import logging
import os
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from serve.errors import LifecycleError, SettingsError
from serve.files import file_state, locked, replace_file
from serve.manifest import BUNDLED_DIR, NAME_PATTERN
from serve.models.version_policy import VersionPolicy, parse_policy

log = logging.getLogger(__name__)

FILE_NAME = "serving.json"
SCHEMA_VERSION = 1
MAX_FILE_BYTES = 1 << 20
HISTORY = 16  # routes of a model that a rollback can go back through

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

    def policy(self, otherwise: VersionPolicy) -> VersionPolicy:
        """The version policy; ``otherwise`` where the state has none of its own."""
        if self.versions is None:
            return otherwise
        return parse_policy(self.versions) if isinstance(self.versions, str) else VersionPolicy(pinned=self.versions)


class ServingState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is wanted of every model that is named."""

    schema_version: int = SCHEMA_VERSION
    models: dict[str, ModelState] = {}

    def of(self, name: str) -> ModelState:
        """What is wanted of the model of that name."""
        return self.models.get(name, UNNAMED)

    def with_model(self, name: str, model: ModelState) -> ServingState:
        """The same with one model's state replaced."""
        return ServingState(models={**self.models, name: model})


UNNAMED = ModelState()


def parse_serving_state(content: bytes, where: str) -> ServingState:
    """Read the file's bytes. Raises SettingsError naming ``where`` and the field that is wrong."""
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError(f"{where} is over {MAX_FILE_BYTES} bytes")
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


class ServingFile:
    """The file: read anew when it changes, written whole or not at all."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError when there is a file and it cannot be used."""
        self.path = path
        self._seen = file_state(path)
        self._missing = self._seen is None
        self.state = ServingState() if self._seen is None else self._read()

    def look(self) -> str | None:
        """Take up a change of the file: ``ok``, ``failed`` or None for no change. What cannot be used changes nothing.

        A file that is gone is believed to be gone at the second look: a network volume may fail for a moment.
        """
        now = file_state(self.path)
        if now is None:
            if self._seen is None or not self._missing:
                self._missing = True
                return None
            self._seen, self.state = None, ServingState()
            log.warning("%s is gone: every model follows --versions", self.path)
            return "ok"
        self._missing = False
        if now == self._seen:
            return None
        self._seen = now
        try:
            self.state = self._read()
        except SettingsError as error:
            log.error("the desired state stays as it was: %s", error)
            return "failed"
        log.info("%s has been read", self.path)
        return "ok"

    def prepare(self) -> None:
        """Raises LifecycleError, naming the file and the way out, when a change could not be written or would be lost."""
        if self.path.parent == BUNDLED_DIR:
            raise LifecycleError("the bundled models are part of the program: name --models-dir, or --serving-file for changes")
        if file_state(self.path) != self._seen:
            raise LifecycleError(f"{self.path} has been changed by somebody else just now; look at the status and try again")
        try:
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{FILE_NAME}-")
        except OSError as error:
            raise self._unwritable(error) from None
        os.close(handle)
        Path(temporary).unlink()

    def write(self, state: ServingState) -> None:
        """Replace the file. Raises LifecycleError as ``prepare`` does."""
        content = msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n"
        try:
            with locked(self.path.parent):  # another replica's change is made before this one's look at the file, or after it
                self.prepare()
                replace_file(self.path, content, 0o644)
        except OSError as error:
            raise self._unwritable(error) from None
        self._seen, self._missing, self.state = file_state(self.path), False, state

    def _unwritable(self, error: OSError) -> LifecycleError:
        return LifecycleError(f"{self.path} cannot be written ({error.strerror}); change it where it comes from, or make room")

    def _read(self) -> ServingState:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise SettingsError(f"--serving-file {self.path} cannot be read ({error.strerror})") from None
        return parse_serving_state(content, f"--serving-file {self.path}")
