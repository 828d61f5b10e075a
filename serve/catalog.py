"""The models that are being served, by name and version, and which one answers when a request names none."""

from __future__ import annotations

from collections.abc import Iterable

from serve.errors import SettingsError, UnknownModelError
from serve.model import Model


class Catalog:
    """Looks models up. Raises SettingsError when the default model is not among them."""

    def __init__(self, models: Iterable[Model], default_model: str) -> None:
        self._models: dict[str, dict[int, Model]] = {}
        for model in models:
            self._models.setdefault(model.manifest.name, {})[model.manifest.version] = model
        if default_model not in self._models:
            raise SettingsError(f"--default-model {default_model!r} is not served; there are {self._names()}")
        self.default_model = default_model

    def find(self, name: str, version: int) -> Model:
        """The model of that name ('' for the default) and version (0 for its default). Raises UnknownModelError."""
        versions = self._models.get(name or self.default_model)
        if versions is None:
            raise UnknownModelError(f"model {name[:64]!r} is not served; there are {self._names()}")
        if version == 0:
            return versions[self.default_version(name or self.default_model)]
        if version not in versions:
            there = ", ".join(map(str, sorted(versions)))
            raise UnknownModelError(f"model {name!r} has no version {version}; there are {there}")
        return versions[version]

    def default_version(self, name: str) -> int:
        """The version of ``name`` that answers when a request names none: the highest."""
        return max(self._models[name])

    def versions(self, name: str) -> list[int]:
        """The versions of ``name`` that are served, lowest first."""
        return sorted(self._models[name])

    def models(self) -> list[Model]:
        """All models by name, then version."""
        return [self._models[name][number] for name in sorted(self._models) for number in sorted(self._models[name])]

    def _names(self) -> str:
        return ", ".join(sorted(self._models))
