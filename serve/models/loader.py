"""Loads versions from the repository as models, and remembers those that failed.

It does not decide what is served. Reading, checking and warming up happen in a thread, so the event loop goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from serve.engine.cuda import memory_in_use_bytes, memory_total_bytes
from serve.engine.provider import Provider, choose_provider
from serve.errors import BundleError, DigestError, GoldenError, ProviderError
from serve.models.model import Model, open_model
from serve.models.repository import Fingerprint, Repository
from serve.observability.metrics import Metrics
from serve.settings import Settings

log = logging.getLogger(__name__)

Key = tuple[str, int]  # model, version

FAILURE_KINDS: dict[type[Exception], str] = {
    DigestError: "digest", GoldenError: "golden", BundleError: "bundle", ProviderError: "provider",
}  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """Why a version could not be loaded, and how its files looked then."""

    reason: str
    fingerprint: Fingerprint | None


class Loader:
    """Opens models on one execution provider."""

    def __init__(self, repository: Repository, settings: Settings, metrics: Metrics) -> None:
        self._repository = repository
        self._settings = settings
        self._metrics = metrics
        self._provider: Provider = "cpu"
        self.loading: set[Key] = set()
        self.failures: dict[Key, Failure] = {}

    async def choose_provider(self) -> None:
        """Settle where models run. Raises ProviderError."""
        self._provider = await asyncio.to_thread(choose_provider, self._settings.provider)
        if self._provider == "cuda":
            self._metrics.gpu_memory.set_function(memory_in_use_bytes)
            self._metrics.gpu_memory_total.set(memory_total_bytes())

    def fall_back(self, error: ProviderError) -> None:
        """Go on on the CPU if ``--provider auto`` allows it; raises ``error`` if not."""
        if self._settings.provider != "auto" or self._provider == "cpu":
            raise error
        log.warning("provider auto: serving on the CPU, because %s", error)
        self._provider = "cpu"

    async def open(self, name: str, version: int, siblings: list[Model]) -> Model | None:
        """Read, check, warm and start one version; None if it is among the ``siblings`` and has not changed.

        Raises whatever is wrong with it.
        """
        started = time.perf_counter()
        self.loading.add((name, version))
        try:
            bundle = await asyncio.to_thread(self._repository.read, name, version)
            if any(bundle.manifest == sibling.manifest for sibling in siblings):
                return None
            model = await asyncio.to_thread(open_model, bundle, self._provider, self._settings, self._metrics)
        finally:
            self.loading.discard((name, version))
        self.forget_failure((name, version))
        self._metrics.model_loads.labels(name, "ok").inc()
        log.info("%s/%d is loaded, in %.2f s", name, version, time.perf_counter() - started)
        return model

    def note_failure(self, key: Key, error: Exception, fingerprint: Fingerprint | None) -> str:
        """Remember, log and count a failure; returns what may be told of it."""
        name, version = key
        kind = FAILURE_KINDS.get(type(error))
        if kind is None:
            log.error("%s/%d cannot be loaded", name, version, exc_info=error)
            reason = f"{name}/{version} cannot be loaded: {type(error).__name__}; the log has more"
        else:
            log.error("%s/%d cannot be loaded: %s", name, version, error)
            reason = str(error)
        self.failures[key] = Failure(reason, fingerprint)
        self._metrics.model_loads.labels(name, kind or "unforeseen").inc()
        self._metrics.model_failed.labels(name, str(version)).set(1)
        return reason

    def forget_failure(self, key: Key) -> None:
        if self.failures.pop(key, None):
            self._metrics.model_failed.remove(key[0], str(key[1]))

    def forget_gone(self, name: str, there: Collection[int]) -> None:
        """Forget the failures of versions that are in the folder no longer."""
        for version in self.failures_of(name).keys() - set(there):
            self.forget_failure((name, version))

    def has_failed(self, name: str, version: int, fingerprint: Fingerprint) -> bool:
        """Whether a version could not be loaded and looks as it did then."""
        failure = self.failures.get((name, version))
        return failure is not None and failure.fingerprint == fingerprint

    def failures_of(self, name: str) -> dict[int, Failure]:
        """By version."""
        return {version: failure for (model, version), failure in self.failures.items() if model == name}
