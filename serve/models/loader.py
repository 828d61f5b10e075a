"""Loads versions from the repository as models, and remembers those that failed.

It does not decide what is served. Reading, checking and warming up happen in a thread, so the event loop goes on, and one that
hangs is given up.
"""

from __future__ import annotations

import logging
import time
from asyncio import CancelledError
from collections.abc import Collection
from concurrent.futures import Future
from typing import NamedTuple

from serve.background import finished, in_daemon_thread
from serve.engine.cuda import Device
from serve.engine.driver import device_names
from serve.engine.provider import Provider, choose_provider
from serve.errors import BundleError, DigestError, GoldenError, ProviderError
from serve.models.model import JOIN_S, Model, open_model
from serve.models.repository import Fingerprint, Repository
from serve.observability.metrics import Metrics
from serve.settings import Settings

log = logging.getLogger(__name__)

LOAD_LIMIT_S = 600.0

Key = tuple[str, int]  # model, version

FAILURE_KINDS: dict[type[Exception], str] = {
    DigestError: "digest", GoldenError: "golden", BundleError: "bundle", ProviderError: "provider", TimeoutError: "overdue",
}  # fmt: skip


class Failure(NamedTuple):
    """Why a version could not be loaded, and how its files looked then."""

    reason: str
    fingerprint: Fingerprint


class Loader:
    """Opens models on one execution provider."""

    def __init__(self, repository: Repository, settings: Settings, metrics: Metrics) -> None:
        self._repository = repository
        self._settings = settings
        self._metrics = metrics
        self._provider: Provider = "cpu"
        self.loading: set[Key] = set()
        self.failures: dict[Key, Failure] = {}
        metrics.read_failed = lambda: self.failures

    async def choose_provider(self) -> None:
        """Settle where models run. Raises ProviderError."""
        chosen = in_daemon_thread("provider", lambda: choose_provider(self._settings.provider, self._settings.device))
        self._provider = await finished(chosen, LOAD_LIMIT_S, "looking for CUDA")
        self._metrics.device.info({"number": "", "name": "cpu"})
        if self._provider == "cuda":
            device, names = Device(self._settings.device), device_names()
            self._metrics.gpu_memory.set_function(device.memory_in_use_bytes)
            self._metrics.gpu_memory_total.set(device.memory_total_bytes())
            self._metrics.device.info({"number": str(device.number), "name": names[device.number]})
            if unused := [f"{number} ({name})" for number, name in enumerate(names) if number != device.number]:
                log.info("this process uses CUDA device %d; start one more for each of: %s", device.number, ", ".join(unused))

    def fall_back(self, error: ProviderError) -> None:
        """Go on on the CPU if ``--provider auto`` allows it; raises ``error`` if not."""
        if self._settings.provider != "auto" or self._provider == "cpu":
            raise error
        log.warning("provider auto: serving on the CPU, because %s", error)
        self._metrics.device.info({"number": "", "name": "cpu"})
        self._provider = "cpu"

    async def open(self, key: Key) -> Model:
        """Read, check, warm and start one version. Raises whatever is wrong with it, and TimeoutError."""
        name, version = key
        started = time.perf_counter()

        def load() -> Model:
            return open_model(self._repository.read(name, version), self._provider, self._settings, self._metrics)

        self.loading.add(key)
        loading = in_daemon_thread("load", load)
        try:
            model = await finished(loading, LOAD_LIMIT_S, f"loading {name}/{version}")
        except (TimeoutError, CancelledError):
            loading.add_done_callback(_discard)
            raise
        finally:
            self.loading.discard(key)
        self.failures.pop(key, None)
        self._metrics.model_loads.labels(name, "ok").inc()
        log.info("%s/%d is loaded, in %.2f s", name, version, time.perf_counter() - started)
        return model

    def note_failure(self, key: Key, error: Exception, fingerprint: Fingerprint) -> None:
        """Remember, log and count a failure."""
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

    def forget_all_but(self, name: str, kept: Collection[int] = ()) -> None:
        """Forget the failures of a model's versions, but for those ``kept``."""
        for key in [key for key in self.failures if key[0] == name and key[1] not in kept]:
            del self.failures[key]


def _discard(loading: Future[Model]) -> None:
    """Release a model that came too late."""
    if loading.exception() is None:
        loading.result().batcher.close(JOIN_S)
