"""Makes the served models follow the desired state and the models folder, while requests are answered.

A new version is read and its digests verified, checked against its golden samples, warmed up, and only then put into the
catalog, atomically. The version that it replaces finishes the calls it has and is released. If a step fails, nothing
changes; the reason is in the log, the status and the metrics. A change or removal of a version, or the file's removal, takes
effect once two polls in a row agree on it. For the event loop's thread alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from serve.background import finished, in_daemon_thread
from serve.errors import BundleError, ProviderError, SettingsError
from serve.files import Watched
from serve.models.catalog import Catalog
from serve.models.loader import Key, Loader
from serve.models.model import Model
from serve.models.repository import Fingerprint, Repository, Scan
from serve.models.serving_file import Route, ServingState, parse_policies, pick
from serve.observability.metrics import Metrics, Served
from serve.settings import Settings

log = logging.getLogger(__name__)

LOOK_LIMIT_S = 60.0
FOLDER, FILE = "the models folder", "the serving file"
LOAD_PATIENCE_S = 5.0  # from then on the next models' turn comes beside the one that is being loaded

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class VersionStatus:
    """One version, as ``digits.v1`` has it. ``state``: UNLOADED, LOADING, READY, UNREADY, DRAINING or FAILED."""

    model: str
    version: int
    state: str
    reason: str = ""
    digest: str = ""
    traffic_share: float = 0.0  # of the requests that name no version
    calls: int = 0  # under way
    queued_images: int = 0


class Reconciler:
    """Fills the catalog and changes it. Raises SettingsError for an unusable ``--versions``."""

    def __init__(
        self, repository: Repository, serving: Watched[ServingState], catalog: Catalog, settings: Settings, metrics: Metrics
    ) -> None:
        self.catalog = catalog
        self.loader = Loader(repository, settings, metrics)
        self._repository = repository
        self._serving = serving
        self._policies = parse_policies(settings.versions)
        self._settings = settings
        self._metrics = metrics
        self._last_look: Scan = {}
        self._scan: Scan = {}  # what counts as there: the last look, and what only that one missed
        self._settled: set[Key] = set()  # looked the same twice in a row
        self._looks: dict[str, Future[Any]] = {}
        self._problems: dict[str, str] = {}  # of the looks
        self._changing: dict[str, asyncio.Task[None]] = {}  # by model
        self._closing = False
        self._draining: dict[Model, asyncio.Task[None]] = {}
        self._cut_off = 0
        metrics.read_served = lambda: map(self._served, catalog.models())

    async def start(self) -> None:
        """Load what is wanted. Raises StartError; with ``wait_for_models`` an unusable bundle is only reported."""
        try:
            await self._look_at_models()
            self._settled = {(name, version) for name, versions in self._scan.items() for version in versions}
            await self.loader.choose_provider()
            try:
                await self._start_models()
            except ProviderError as error:
                self.loader.fall_back(error)
                await self._start_models()
        except TimeoutError as error:
            raise BundleError(str(error)) from None
        self.catalog.choose_default(self._scan)

    async def _start_models(self) -> None:
        if not self._settings.wait_for_models:
            there, wanted = ", ".join(self._scan), self._settings.default_model
            if not self._scan:
                raise BundleError(f"--models-dir {self._settings.models_dir} holds no complete model; make export writes one")
            if wanted and wanted not in self._scan:
                raise SettingsError(f"--default-model {wanted!r} is not served; there are {there}")
            if unknown := self._policies.keys() - self._scan.keys() - {""}:
                raise SettingsError(f"--versions: there is no model {min(unknown)!r}; there are {there}")
        for name in self._scan:
            await self._reconcile(name, starting=True)

    async def poll(self) -> None:
        """Take up what has changed: in the desired state, and in the folder what has settled."""
        for what, look in ((FOLDER, self._look_at_models), (FILE, self._look_at_file)):
            try:
                await look()
            except (BundleError, TimeoutError) as error:
                self._metrics.background_failures.labels("reconcile").inc()
                if self._problems.get(what) != str(error):
                    log.error("%s; serving what was loaded", error)
                self._problems[what] = str(error)
            else:
                self._problems.pop(what, None)
        for name in sorted({*self._scan, *self.catalog.names()} - self._changing.keys()):
            if self._closing:
                return
            task = self._changing[name] = asyncio.create_task(self._change(name))
            await asyncio.wait([task], timeout=LOAD_PATIENCE_S)
        self.catalog.choose_default(self._scan)

    async def _look_at_file(self) -> None:
        before = self._serving.value
        # In the models folder it is missing with the models, and as little believed to be gone as they are.
        alone = self._settings.serving_file is not None or FOLDER not in self._problems
        if result := await self._look(FILE, partial(self._serving.look, may_be_gone=alone)):
            self._metrics.serving_file_reads.labels(result).inc()
        for name in before.models.keys() | self._serving.value.models.keys():
            if before.of(name) != self._serving.value.of(name):
                self.loader.forget_all_but(name)  # being asked for is reason enough to try again

    async def _look_at_models(self) -> None:
        """Raises BundleError when the folder is not there, or has become empty: a mount, rather than a wish to serve nothing."""
        before, self._settled = self._last_look, set()
        now = await self._look(FOLDER, self._repository.scan)
        if self.catalog.names() and not now:
            raise BundleError(f"--models-dir {self._settings.models_dir} holds no complete model any more")
        self._last_look = now
        self._settled = {
            (name, version) for name in now for version, mark in now[name].items() if before.get(name, {}).get(version) == mark
        }
        names = sorted({*before, *now})
        self._scan = {name: dict(sorted({**before.get(name, {}), **now.get(name, {})}.items())) for name in names}

    async def _look(self, what: str, action: Callable[[], ResultT]) -> ResultT:
        """Look at files in a thread. Raises TimeoutError when that hangs, or does so since an earlier look."""
        last = self._looks.get(what)
        if last is None or last.done():
            last = self._looks[what] = in_daemon_thread("look", action)
            return await finished(last, LOOK_LIMIT_S, f"looking at {what}")
        raise TimeoutError(f"looking at {what} still hangs")

    async def _change(self, name: str) -> None:
        try:
            await self._reconcile(name)
        except Exception:
            log.exception("%s cannot be reconciled", name)
            self._metrics.background_failures.labels("reconcile").inc()
        finally:
            del self._changing[name]

    async def _reconcile(self, name: str, *, starting: bool = False) -> None:
        """Serve what is wanted of a model; under ``latest`` a version that fails makes room for the next lower.

        When ``starting``, raises what loading raised: unless models are waited for, and ProviderError while nothing is served.
        """
        wanted, there = self._serving.value.of(name), self._scan.get(name, {})
        policy = wanted.policy(self._policies.get(name, self._policies[""]))
        pinned, served = set() if isinstance(policy, int) else set(policy), self.catalog.versions(name)
        self.loader.forget_all_but(name, there)
        if starting and not self._settings.wait_for_models and (gone := pinned - set(there)):
            raise BundleError(f"--versions: {name} has no version {min(gone)}; there are {', '.join(map(str, there))}")

        def usable(version: int) -> bool:
            failure = self.loader.failures.get((name, version))
            failed = failure is not None and failure.fingerprint == there[version]
            return version in served or ((name, version) in self._settled and not failed)

        route = wanted.route if wanted.versions != () else None
        routed = route.versions if route else set()
        while True:
            available = [version for version in there if usable(version)]
            picked = sorted({*pick(policy, available), *routed.intersection(available)})
            missing = [version for version in picked if version not in served]
            if not missing:
                break
            await self._load((name, missing[-1]), there[missing[-1]], starting)
            served = self.catalog.versions(name)
        if not served:
            return
        if not picked and (wanted.versions == () or not there):
            self._keep(name, (), Route(served[-1]), self._settings.drain_deadline_s)
        elif picked and routed <= set(picked):
            failed = pinned & set(there) - set(served)  # for these nothing is unloaded
            self._keep(name, served if failed else picked, route or Route(picked[-1]), self._settings.drain_deadline_s)

    async def _load(self, key: Key, fingerprint: Fingerprint, starting: bool) -> None:
        """Load one version beside what is served and put it into the catalog, or note what is wrong with it."""
        try:
            model = await self.loader.open(key)
        except Exception as error:
            fatal = not self._settings.wait_for_models or (isinstance(error, ProviderError) and not self.catalog.names())
            if starting and fatal:
                raise
            self.loader.note_failure(key, error, fingerprint)
            return
        self.catalog.put(model)

    def status(self) -> list[VersionStatus]:
        """Every version there is, on disk at the last poll or served, by name and version."""
        keys = {(name, version) for name, versions in self._scan.items() for version in versions}
        keys |= {(model.manifest.name, model.manifest.version) for model in (*self.catalog.models(), *self._draining)}
        return [self._status_of(key) for key in sorted(keys | self.loader.failures.keys() | self.loader.loading)]

    def _status_of(self, key: Key) -> VersionStatus:
        model, failure = self.catalog.model(*key), self.loader.failures.get(key)
        share, reason = 0.0, failure.reason if failure else ""
        if model is not None:
            state, share = "READY" if model.ready else "UNREADY", self._share(*key)
        elif key in self.loader.loading:
            state = "LOADING"
        elif failure is not None:
            state = "FAILED"
        else:
            model = next((each for each in self._draining if (each.manifest.name, each.manifest.version) == key), None)
            state = "DRAINING" if model else "UNLOADED"
        if model is None:
            return VersionStatus(*key, state, reason)
        return VersionStatus(*key, state, reason, model.bundle.digest, share, model.in_use.calls, model.batcher.queued_images)

    async def close(self, timeout_s: float) -> int:
        """Release everything, and give up what is being loaded. Returns how many requests the timeout cut off."""
        self._closing = True
        for task in self._changing.values():
            task.cancel()
        await asyncio.gather(*self._changing.values(), return_exceptions=True)
        for name in self.catalog.names():
            self._keep(name, (), self.catalog.route(name), timeout_s)
        await asyncio.gather(*self._draining.values())
        return self._cut_off

    def _keep(self, name: str, versions: Collection[int], route: Route, timeout_s: float) -> None:
        """Change the catalog, and retire what is served no longer."""
        if versions and route != self.catalog.route(name):
            canary = f", {route.canary_share:.1%} to version {route.canary}" if route.canary_share else ""
            log.info("requests for %s that name no version go to version %d%s", name, route.default, canary)
        for model in self.catalog.keep(name, versions, route):
            self._retire(model, timeout_s)

    def _retire(self, model: Model, timeout_s: float) -> None:
        """Let a model that is out of the catalog finish its calls, beside everything else, and release it."""

        async def drain() -> None:
            cut_off = await model.release(timeout_s)
            self._cut_off += cut_off  # only now: others have added theirs meanwhile
            del self._draining[model]
            log.info("%s/%d is released", model.manifest.name, model.manifest.version)

        self._draining[model] = asyncio.create_task(drain())

    def _served(self, model: Model) -> Served:
        name, version = model.manifest.name, model.manifest.version
        gauges = model.gauges() | {"model_traffic_share": self._share(name, version)}
        return Served(name, str(version), model.provider, model.bundle.digest, gauges)

    def _share(self, name: str, version: int) -> float:
        return self.catalog.route(name).share(version)
