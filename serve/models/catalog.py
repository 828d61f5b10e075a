"""The models that are being served, by name and version, and who answers when a request leaves either open.

For the event loop's thread alone: a change is seen by the next request and by none that has begun.
"""

from __future__ import annotations

from collections.abc import Callable

from serve.config.settings import DEFAULT_MODEL
from serve.errors import UnknownModelError
from serve.models.desired_state import Route
from serve.models.model import Model


class Catalog:
    """Looks models up. ``default_model`` answers requests that name none, once it is there."""

    def __init__(self, default_model: str = "") -> None:
        """``default_model`` '': ``DEFAULT_MODEL`` if it is served, else the first by name."""
        self._wanted_default = default_model
        self._models: dict[str, dict[int, Model]] = {}
        self._routes: dict[str, Route] = {}

    @property
    def default_model(self) -> str:
        if self._wanted_default or not self._models or DEFAULT_MODEL in self._models:
            return self._wanted_default or DEFAULT_MODEL
        return min(self._models)

    def put(self, model: Model) -> None:
        """Serve a model; one of the same name and version is served no longer. The first of a name is its default."""
        name, version = model.manifest.name, model.manifest.version
        self._models.setdefault(name, {})[version] = model
        self._routes.setdefault(name, Route(version))

    def remove(self, name: str, version: int) -> Model:
        """Serve it no longer. The last of a name takes the name with it; a default must have been moved before."""
        versions = self._models[name]
        model = versions.pop(version)
        if not versions:
            del self._models[name], self._routes[name]
        else:
            assert not self._routes[name].share(version), "a version with traffic must not be removed"
        return model

    def set_route(self, name: str, route: Route) -> None:
        """Send the requests that name no version elsewhere. The route's versions must be served."""
        versions = self._models[name]
        assert route.default in versions
        assert not route.canary or route.canary in versions
        self._routes[name] = route

    def find(self, name: str, version: int, seed: Callable[[], int] = lambda: 0) -> Model:
        """The model of that name ('' for the default) and version (0: as the route has it). Raises UnknownModelError.

        ``seed`` is asked for only when traffic is split.
        """
        versions = self._models.get(name or self.default_model)
        if versions is None:
            there = ", ".join(sorted(self._models)) or "none at the moment"
            raise UnknownModelError(f"model {(name or self.default_model)[:64]!r} is not served; there are {there}")
        if version == 0:
            route = self._routes[name or self.default_model]
            return versions[route.pick(seed()) if route.canary_share else route.default]
        if version not in versions:
            there = ", ".join(map(str, sorted(versions)))
            raise UnknownModelError(f"model {(name or self.default_model)!r} has no version {version}; there are {there}")
        return versions[version]

    def route(self, name: str) -> Route:
        return self._routes[name]

    def names(self) -> list[str]:
        return sorted(self._models)

    def versions(self, name: str) -> list[int]:
        """The versions of ``name`` that are served, lowest first; none when the model is not."""
        return sorted(self._models.get(name, ()))

    def model(self, name: str, version: int) -> Model | None:
        return self._models.get(name, {}).get(version)

    def models(self) -> list[Model]:
        """All models by name, then version."""
        return [self._models[name][number] for name in sorted(self._models) for number in sorted(self._models[name])]

    def ready(self, name: str) -> bool:
        """Whether all versions that answer requests without one do."""
        route = self._routes.get(name)
        return route is not None and all(
            model.ready for version, model in self._models[name].items() if route.share(version) or version == route.default
        )
