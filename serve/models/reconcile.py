"""Makes the served models follow the desired state and the models folder, while requests are answered.

A new version is read and its digests verified, checked against its golden samples, warmed up, and only then put into the
catalog, atomically. The version that it replaces finishes the calls it has and is released. If a step fails, nothing
changes; the reason is in the log, the status and the metrics. A change or removal of a version, or of the file, takes effect
once two polls in a row agree on it. For the event loop's thread alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from serve.errors import BundleError, ProviderError, SettingsError
from serve.models.catalog import Catalog
from serve.models.loader import Loader
from serve.models.model import Model
from serve.models.repository import Fingerprint, Repository, Scan
from serve.models.serving_file import Route, ServingFile
from serve.models.version_policy import parse_policies
from serve.observability.metrics import Metrics
from serve.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VersionStatus:
    """One version as ``Reconciler.status`` sees it. ``state``: UNLOADED, LOADING, READY, UNREADY, DRAINING or FAILED."""

    name: str
    version: int
    state: str
    reason: str = ""
    digest: str = ""
    share: float = 0.0  # of the requests that name no version
    calls: int = 0  # under way
    queued_images: int = 0


class Reconciler:
    """Fills the catalog and changes it, one change at a time."""

    def __init__(
        self,
        repository: Repository,
        serving_file: ServingFile,
        catalog: Catalog,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.repository = repository
        self.serving_file = serving_file
        self.catalog = catalog
        self.loader = Loader(repository, settings, metrics)
        self._policies = parse_policies(settings.versions)
        self._settings = settings
        self._metrics = metrics
        self._turn = asyncio.Lock()
        self._last_look: Scan = {}
        self._scan: Scan = {}  # what counts as there: the last look, and what only that one missed
        self._draining: dict[Model, asyncio.Task[None]] = {}
        self._cut_off = 0

    async def start(self) -> None:
        """Load what is wanted. Raises StartError; with ``wait_for_models`` an unusable bundle is only reported."""
        await self.look()
        await self.loader.choose_provider()
        try:
            await self._start_models()
        except ProviderError as error:
            self.loader.fall_back(error)
            await self._start_models()

    async def _start_models(self) -> None:
        strict = not self._settings.wait_for_models
        if strict and not self._scan:
            raise BundleError(f"--models-dir {self._settings.models_dir} holds no complete model; make export writes one")
        if strict and (wanted := self._settings.default_model) and wanted not in self._scan:
            raise SettingsError(f"--default-model {wanted!r} is not served; there are {', '.join(self._scan)}")
        if strict and (unknown := self._policies.own.keys() - self._scan.keys()):
            raise SettingsError(f"--versions: there is no model {min(unknown)!r}; there are {', '.join(self._scan)}")
        for name in self._scan:
            await self.reconcile(name, strict)

    async def poll(self) -> None:
        """Take up what has changed: in the desired state, and in the folder what has settled."""
        async with self._turn:
            if result := await asyncio.to_thread(self.serving_file.look):
                self._metrics.serving_file_reads.labels(result).inc()
            before = self._last_look
            try:
                await self.look()
            except BundleError as error:  # the folder itself is gone: a mount, rather than a wish to serve nothing
                log.error("%s; serving what was loaded", error)
                return
            for name in sorted({*self._scan, *self.catalog.names()}):
                known = before.get(name, {})
                moving = {number for number, mark in self._scan.get(name, {}).items() if known.get(number) != mark}
                await self.reconcile(name, passed_over=moving)

    async def look(self) -> None:
        """Look at the folder. Raises BundleError when it is not there."""
        before, now = self._last_look, await asyncio.to_thread(self.repository.scan)
        self._last_look = now
        names = sorted({*before, *now})
        merged = {name: dict(sorted({**before.get(name, {}), **now.get(name, {})}.items())) for name in names}
        self._scan = {name: versions for name, versions in merged.items() if versions}

    def there(self, name: str) -> dict[int, Fingerprint]:
        """The versions of a model that are in the folder, lowest first."""
        return dict(self._scan.get(name, {}))

    async def change(self, action: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """One change at a time, and to its end even if the caller who asked for it leaves."""

        async def in_turn() -> None:
            async with self._turn:
                await action()

        await asyncio.shield(asyncio.create_task(in_turn()))

    async def reconcile(self, name: str, strict: bool = False, passed_over: Collection[int] = ()) -> None:
        """Serve what is wanted of a model; under ``latest`` a version that fails makes room for the next lower.

        ``passed_over`` are versions to leave alone for now unless they are served. Raises what loading raised if
        ``strict``, and always ProviderError while nothing is served at all.
        """
        wanted, there = self.serving_file.state.of(name), self.there(name)
        policy = wanted.policy(self._policies.of(name))
        self.loader.forget_gone(name, there)
        if strict and (missing := set(policy.pinned or ()) - set(there)):
            raise BundleError(f"--versions: {name} has no version {min(missing)}; there are {', '.join(map(str, there))}")

        def usable(version: int) -> bool:
            served = version in self.catalog.versions(name)
            return served or (version not in passed_over and not self.loader.has_failed(name, version, there[version]))

        routed = wanted.route.versions if wanted.route and wanted.versions != () else set()
        while True:
            available = [version for version in there if usable(version)]
            picked = sorted({*policy.pick(available), *routed.intersection(available)})
            missing_now = [version for version in picked if version not in self.catalog.versions(name)]
            if not missing_now:
                break
            await self.load_version(name, missing_now[-1], strict)
        served = self.catalog.versions(name)
        if not served:
            return
        if not picked and (wanted.versions == () or not there):
            self._remove_model(name, self._settings.drain_deadline_s)
        elif picked and routed <= set(picked):
            self._move(name, wanted.route if routed and wanted.route else Route(picked[-1]))
            if not set(policy.pinned or ()) & set(there) - set(served):  # nothing that is wanted has failed
                self._retire_all_but(name, picked)

    async def load_version(self, name: str, version: int, strict: bool = False) -> str | None:
        """Load one version beside what is served and put it into the catalog. Returns what was wrong with it, or None.

        A served version is loaded anew if its files have changed. Raises what went wrong if ``strict``.
        """
        current = self.catalog.model(name, version)
        siblings = [model for model in self.catalog.models() if model.manifest.name == name]
        try:
            model = await self.loader.open(name, version, siblings)
        except Exception as error:
            if strict or (isinstance(error, ProviderError) and not self.catalog.names()):
                raise
            return self.loader.note_failure((name, version), error, self.there(name).get(version))
        if model is None:
            return None
        if current is not None:
            self._retire(current, self._settings.drain_deadline_s)
        self.catalog.put(model)
        gauges: dict[str, Callable[[], float]] = {**model.gauges(), "traffic_share": partial(self._share, name, version)}
        self._metrics.bind_gauges(name, version, model.provider, model.bundle.digest, gauges)
        self._metrics.models_loaded.set(len(self.catalog.models()))
        return None

    async def status(self) -> list[VersionStatus]:
        """Every version there is, on disk or served, by name and version."""
        try:
            scan = await asyncio.to_thread(self.repository.scan)
        except BundleError:  # the folder is gone; what is served is not
            scan = {}
        keys = {(name, version) for name, versions in scan.items() for version in versions}
        keys |= {(model.manifest.name, model.manifest.version) for model in (*self.catalog.models(), *self._draining)}
        keys |= self.loader.failures.keys() | self.loader.loading
        return [self._status_of(name, version) for name, version in sorted(keys)]

    async def close(self, timeout_s: float) -> int:
        """Release everything. Returns how many requests the timeout cut off."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await self._turn.acquire()  # and never give it back: no change begins any more
        except TimeoutError:
            log.error("a change of the models was still under way")
        left = max(0.0, timeout_s - (time.monotonic() - started))
        for name in self.catalog.names():
            self._remove_model(name, left)
        await asyncio.gather(*self._draining.values())
        return self._cut_off

    def _move(self, name: str, route: Route) -> None:
        if route == self.catalog.route(name):
            return
        self.catalog.set_route(name, route)
        canary = f", {route.canary_share:.1%} to version {route.canary}" if route.canary_share else ""
        log.info("requests for %s that name no version go to version %d%s", name, route.default, canary)

    def _remove_model(self, name: str, timeout_s: float) -> None:
        versions = self.catalog.versions(name)
        self.catalog.set_route(name, Route(versions[-1]))
        for version in versions:
            self._retire(self.catalog.remove(name, version), timeout_s)

    def _retire_all_but(self, name: str, kept: Collection[int]) -> None:
        for version in self.catalog.versions(name):
            if version not in kept and not self.catalog.route(name).share(version):
                self._retire(self.catalog.remove(name, version), self._settings.drain_deadline_s)

    def _retire(self, model: Model, timeout_s: float) -> None:
        """Let a model that is out of the catalog finish its calls, beside everything else, and release it."""

        async def drain() -> None:
            cut_off = await model.release(timeout_s)
            self._cut_off += cut_off  # only now: others have added theirs meanwhile
            del self._draining[model]
            log.info("%s/%d is released", model.manifest.name, model.manifest.version)

        self._metrics.drop_gauges(model.manifest.name, model.manifest.version, model.provider, model.bundle.digest)
        self._metrics.models_loaded.set(len(self.catalog.models()))
        self._draining[model] = asyncio.create_task(drain())

    def _share(self, name: str, version: int) -> float:
        return self.catalog.route(name).share(version)

    def _status_of(self, name: str, version: int) -> VersionStatus:
        model = self.catalog.model(name, version)
        failure = self.loader.failures.get((name, version))
        if model is not None:
            status = ("READY" if model.ready else "UNREADY", failure.reason if failure else "")
        elif (name, version) in self.loader.loading:
            status = ("LOADING", "")
        elif failure is not None:
            status = ("FAILED", failure.reason)
        else:
            draining = [each for each in self._draining if (each.manifest.name, each.manifest.version) == (name, version)]
            model = draining[0] if draining else None
            status = ("DRAINING" if model else "UNLOADED", "")
        if model is None:
            return VersionStatus(name, version, *status)
        share = self._share(name, version) if status[0] in ("READY", "UNREADY") else 0.0
        calls, queued = model.in_use.calls, model.batcher.queued_images
        return VersionStatus(name, version, *status, model.bundle.digest, share, calls, queued)
