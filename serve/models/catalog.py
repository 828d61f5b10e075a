"""The models that are served, by name and version, and which of them answers when a request leaves either open.

Read by any thread, changed by the event loop's thread: a change makes new tables, so a reader sees all of it or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from serve.errors import UnknownModelError
from serve.models.model import Model
from serve.models.serving_file import Route
from serve.settings import DEFAULT_MODEL


class _Served(NamedTuple):
    """What is served under one name."""

    versions: Mapping[int, Model]
    route: Route


class Catalog:
    """Looks models up. ``default_model`` answers requests that name none, while it is served; no other takes its place."""

    def __init__(self, default_model: str = "") -> None:
        """``default_model`` '': what ``choose_default`` finds."""
        self._chosen = default_model
        self._served: Mapping[str, _Served] = {}

    @property
    def default_model(self) -> str:
        return self._chosen or DEFAULT_MODEL

    def choose_default(self, there: Collection[str]) -> None:
        """Without a named default: choose ``DEFAULT_MODEL`` if it is ``there``, else the first served model by name, for good."""
        if not self._chosen and self._served:
            self._chosen = DEFAULT_MODEL if DEFAULT_MODEL in there else min(self._served)

    def put(self, model: Model) -> None:
        """Serve a model; one of the same name and version is served no longer. The first of a name is its default."""
        name, version = model.manifest.name, model.manifest.version
        before = self._served.get(name) or _Served({}, Route(version))
        self._served = {**self._served, name: before._replace(versions={**before.versions, version: model})}

    def keep(self, name: str, versions: Collection[int], route: Route) -> list[Model]:
        """Serve of a model these versions alone, with the route's among them. Returns those that are served no longer."""
        before = self._served[name].versions
        kept = {version: before[version] for version in versions}
        assert not kept or route.versions <= kept.keys(), "a version with traffic must be served"
        others = {other: each for other, each in self._served.items() if other != name}
        self._served = {**others, name: _Served(kept, route)} if kept else others
        return [model for version, model in before.items() if version not in kept]

    def find(self, name: str, version: int, seed: Callable[[], int] = lambda: 0) -> Model:
        """The model of that name ('' for the default) and version (0: as the route has it). Raises UnknownModelError.

        ``seed`` is asked for only when traffic is split.
        """
        name = name or self.default_model
        served = self._served.get(name)
        if served is None:
            there = ", ".join(self.names()) or "none at the moment"
            raise UnknownModelError(f"model {name[:64]!r} is not served; there are {there}", name)
        versions, route = served.versions, served.route
        if version == 0:
            return versions[route.pick(seed()) if route.canary_share else route.default]
        if version not in versions:
            there = ", ".join(map(str, sorted(versions)))
            raise UnknownModelError(f"model {name!r} has no version {version}; there are {there}", name, version)
        return versions[version]

    def route(self, name: str) -> Route:
        return self._served[name].route

    def names(self) -> list[str]:
        return sorted(self._served)

    def versions(self, name: str) -> list[int]:
        """The versions of ``name`` that are served, lowest first; none when the model is not."""
        served = self._served.get(name)
        return sorted(served.versions) if served else []

    def model(self, name: str, version: int) -> Model | None:
        served = self._served.get(name)
        return served.versions.get(version) if served else None

    def models(self) -> list[Model]:
        """All models by name, then version."""
        return [model for _, served in sorted(self._served.items()) for _, model in sorted(served.versions.items())]

    def ready(self, name: str) -> bool:
        """Whether all versions that answer requests without one do."""
        served = self._served.get(name)
        return served is not None and all(served.versions[version].ready for version in served.route.versions)
