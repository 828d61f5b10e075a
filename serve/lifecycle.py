"""Which versions are served, and how that changes while requests are answered. For the event loop's thread alone.

A version comes in beside what is there: read and checked by digest, run against its golden samples by every instance,
warmed, and only then put into the catalog, between two requests. What it replaces answers the calls it has and is
released. Whatever fails on the way leaves everything as it was; the reason is in the log, the status and the metrics.

Three modes. ``none``: what the folder held at the start. ``poll``: the folder is looked at every so often; a version is
taken once it has looked the same twice. ``explicit``: as an administrator says. In all of them a version policy picks
among the versions that are there and can be loaded; what an administrator asked for by number is kept beside those.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from serve.catalog import Catalog, Route
from serve.errors import BundleError, LifecycleError, ProviderError, SettingsError
from serve.loader import Loader
from serve.metrics import Metrics
from serve.model import Model
from serve.repository import Fingerprint, Repository, Scan
from serve.settings import Settings

log = logging.getLogger(__name__)

HISTORY = 16  # routes of a model that Rollback can go back through


@dataclass(frozen=True)
class VersionStatus:
    """One version as ``Lifecycle.status`` sees it. ``state``: UNLOADED, LOADING, READY, UNREADY, DRAINING or FAILED."""

    name: str
    version: int
    state: str
    reason: str = ""
    digest: str = ""
    share: float = 0.0  # of the requests that name no version
    calls: int = 0  # under way
    queued_images: int = 0


class Lifecycle:
    """Fills the catalog and changes it, one change at a time."""

    def __init__(self, repository: Repository, catalog: Catalog, settings: Settings, metrics: Metrics) -> None:
        self._repository = repository
        self._catalog = catalog
        self._settings = settings
        self._metrics = metrics
        self._turn = asyncio.Lock()
        self._scan: Scan = {}
        self._loader = Loader(repository, settings, metrics)
        self._asked_for: dict[str, set[int]] = {}  # by number, beside what the policy picks
        self._pinned: dict[str, Route] = {}  # set by an administrator; the policy moves it no more
        self._history: dict[str, list[Route]] = {}
        self._draining: dict[Model, asyncio.Task[None]] = {}
        self._cut_off = 0

    async def start(self) -> None:
        """Load what the policies pick. Raises StartError; with ``poll`` and ``explicit`` a bad bundle is only reported."""
        self._scan = await asyncio.to_thread(self._repository.scan)
        await self._loader.choose_provider()
        try:
            await self._start_models()
        except ProviderError as error:
            self._loader.fall_back(error)
            await self._start_models()

    async def _start_models(self) -> None:
        strict = self._settings.model_control == "none"
        if strict and not self._scan:
            raise BundleError(f"--models-dir {self._settings.models_dir} holds no complete model; make export writes one")
        if strict and self._catalog.default_model not in self._scan:
            there = ", ".join(self._scan)
            raise SettingsError(f"--default-model {self._catalog.default_model!r} is not served; there are {there}")
        for name in self._scan:
            await self._apply_policy(name, strict)

    async def poll_forever(self) -> None:
        """Look at the folder every ``poll_interval_s``."""
        while True:
            await asyncio.sleep(self._settings.poll_interval_s)
            try:
                await self.poll()
            except Exception as error:
                log.exception("the repository could not be polled: %s", error)

    async def poll(self) -> None:
        """Take up what has appeared and settled, and release what has gone."""
        async with self._turn:
            try:
                scan = await asyncio.to_thread(self._repository.scan)
            except BundleError as error:  # the folder itself is gone: a mount, rather than a wish to serve nothing
                log.error("%s; serving what was loaded", error)
                return
            before, self._scan = self._scan, scan
            for name in sorted({*scan, *self._catalog.names()}):
                moving = {
                    version
                    for version, fingerprint in scan.get(name, {}).items()
                    if before.get(name, {}).get(version) != fingerprint
                }
                await self._apply_policy(name, passed_over=moving)

    async def load(self, name: str, version: int) -> None:
        """Load a version, or with 0 what the model's policy picks, from what the folder holds now. Raises LifecycleError."""
        self._need_mode("explicit", "Load")
        await self._change(partial(self._load_now, name, version))

    async def unload(self, name: str, version: int) -> None:
        """Stop serving a version, or with 0 the model. Raises LifecycleError."""
        self._need_mode("explicit", "Unload")
        await self._change(partial(self._unload_now, name, version))

    async def set_default(self, name: str, route: Route) -> None:
        """Send requests that name no version where ``route`` says, until told otherwise; default 0: as the policy has it."""
        self._need_mode("poll", "SetDefault")
        await self._change(partial(self._set_default_now, name, route))

    async def rollback(self, name: str) -> None:
        """Undo the last change of where requests without a version go, loading what that takes. Raises LifecycleError."""
        self._need_mode("poll", "Rollback")
        await self._change(partial(self._rollback_now, name))

    async def status(self) -> list[VersionStatus]:
        """Every version there is, on disk or served, by name and version."""
        try:
            scan = await asyncio.to_thread(self._repository.scan)
        except BundleError:  # the folder is gone; what is served is not
            scan = {}
        keys = {(name, version) for name, versions in scan.items() for version in versions}
        keys |= {(model.manifest.name, model.manifest.version) for model in (*self._catalog.models(), *self._draining)}
        keys |= self._loader.failures.keys() | self._loader.loading
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
        for name in self._catalog.names():
            self._remove_model(name, left)
        await asyncio.gather(*self._draining.values())
        return self._cut_off

    def _need_mode(self, least: str, action: str) -> None:
        order = ("none", "poll", "explicit")
        mode = self._settings.model_control
        if order.index(mode) < order.index(least):
            raise LifecycleError(f"{action} needs --model-control {' or '.join(order[order.index(least) :])}, and it is {mode}")

    async def _change(self, action: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """One change at a time, and to its end even if the caller who asked for it leaves."""

        async def in_turn() -> None:
            async with self._turn:
                await action()

        await asyncio.shield(asyncio.create_task(in_turn()))

    async def _load_now(self, name: str, version: int) -> None:
        try:
            self._scan = await asyncio.to_thread(self._repository.scan)
        except BundleError as error:
            raise LifecycleError(str(error)) from None
        there = self._scan.get(name, {})
        if not there or (version and version not in there):
            listed = ", ".join(map(str, there)) or "no complete one"
            wanted = f"version {version}" if version else "version"
            raise LifecycleError(f"the repository has no {wanted} of {name[:64]!r}; there is {listed}")
        if version:
            if problem := await self._load_version(name, version):
                raise LifecycleError(problem)
            self._asked_for.setdefault(name, set()).add(version)
            return
        for failed in self._loader.failures_of(name):
            self._loader.forget_failure((name, failed))  # an administrator's word is reason enough to try again
        for served in set(self._catalog.versions(name)) & set(there):
            if problem := await self._load_version(name, served):
                raise LifecycleError(problem)
        await self._apply_policy(name)
        for failure in self._loader.failures_of(name).values():
            raise LifecycleError(failure.reason)

    async def _unload_now(self, name: str, version: int) -> None:
        served = self._catalog.versions(name)
        if not served or (version and version not in served):
            raise LifecycleError(f"{name[:64]!r} version {version or 'any'} is not served; there are {served or 'none'}")
        if version == 0 or served == [version]:
            self._remove_model(name, self._settings.drain_deadline_s)
            return
        if self._catalog.route(name).share(version):
            raise LifecycleError(f"version {version} of {name} answers requests that name none; SetDefault first")
        self._asked_for.get(name, set()).discard(version)
        self._retire(self._catalog.remove(name, version), self._settings.drain_deadline_s)

    async def _set_default_now(self, name: str, route: Route) -> None:
        served = self._catalog.versions(name)
        for version in (route.default, route.canary):
            if version and version not in served:
                raise LifecycleError(f"version {version} of {name[:64]!r} is not served; there are {served or 'none'}")
        if not served:
            raise LifecycleError(f"model {name[:64]!r} is not served")
        if route.default == 0:
            self._pinned.pop(name, None)
            await self._apply_policy(name)
            return
        self._move(name, route)
        self._pinned[name] = route

    async def _rollback_now(self, name: str) -> None:
        history = self._history.get(name)
        if not history:
            raise LifecycleError(f"model {name[:64]!r} has no earlier default to go back to")
        route = history[-1]
        for version in {route.default, route.canary} - {0, *self._catalog.versions(name)}:
            if problem := await self._load_version(name, version):
                raise LifecycleError(problem)
        self._move(name, route)
        self._history[name] = history[:-1]
        self._pinned[name] = route

    async def _apply_policy(self, name: str, strict: bool = False, passed_over: frozenset[int] | set[int] = frozenset()) -> None:
        """Serve what the policy picks among the versions that are there; one that fails makes room for the next lower.

        ``passed_over`` are versions to leave alone for now unless they are served. Raises what loading raised if
        ``strict``, and always ProviderError.
        """
        policy, there = self._repository.policies.of(name), self._scan.get(name, {})
        failures = self._loader.failures_of(name)
        for gone in failures.keys() - there.keys():
            self._loader.forget_failure((name, gone))
        if strict and (missing := set(policy.pinned) - set(there)):
            raise BundleError(f"--versions: {name} has no version {min(missing)}; there are {', '.join(map(str, there))}")

        def has_failed(version: int, fingerprint: Fingerprint) -> bool:
            failure = self._loader.failures.get((name, version))
            return failure is not None and failure.fingerprint == fingerprint

        while True:
            served = self._catalog.versions(name)
            usable = [
                version
                for version, fingerprint in there.items()
                if version in served or (version not in passed_over and not has_failed(version, fingerprint))
            ]
            picked = policy.pick(usable)
            missing_now = [version for version in picked if version not in served]
            if not missing_now:
                break
            await self._load_version(name, missing_now[-1], strict)
        if not served:
            return
        if not picked and not self._asked_for.get(name):
            self._remove_model(name, self._settings.drain_deadline_s)
            return
        if picked and name not in self._pinned:
            self._move(name, Route(picked[-1]))
        kept = {*picked, *self._asked_for.get(name, ())}
        for version in served:
            if version not in kept and not self._catalog.route(name).share(version):
                self._retire(self._catalog.remove(name, version), self._settings.drain_deadline_s)

    async def _load_version(self, name: str, version: int, strict: bool = False) -> str | None:
        """Load one version beside what is served and put it into the catalog. Returns what was wrong with it, or None.

        A served version is loaded anew if its files have changed. Raises what went wrong if ``strict``.
        """
        current = self._catalog.model(name, version)
        siblings = [model for model in self._catalog.models() if model.manifest.name == name]
        try:
            model = await self._loader.open(name, version, siblings)
        except Exception as error:
            if strict or (isinstance(error, ProviderError) and not self._catalog.names()):
                raise
            return self._loader.note_failure((name, version), error, self._scan.get(name, {}).get(version))
        if model is None:
            return None
        if current is not None:
            self._retire(current, self._settings.drain_deadline_s)
        self._catalog.put(model)
        gauges: dict[str, Callable[[], float]] = {**model.gauges(), "traffic_share": partial(self._share, name, version)}
        self._metrics.bind_gauges(name, version, model.provider, model.bundle.digest, gauges)
        self._metrics.models_loaded.set(len(self._catalog.models()))
        return None

    def _move(self, name: str, route: Route) -> None:
        before = self._catalog.route(name)
        if route == before:
            return
        self._catalog.set_route(name, route)
        self._history[name] = [*self._history.get(name, []), before][-HISTORY:]
        canary = f", {route.canary_share:.1%} to version {route.canary}" if route.canary_share else ""
        log.info("requests for %s that name no version go to version %d%s", name, route.default, canary)

    def _remove_model(self, name: str, timeout_s: float) -> None:
        versions = self._catalog.versions(name)
        self._catalog.set_route(name, Route(versions[-1]))
        for version in versions:
            self._retire(self._catalog.remove(name, version), timeout_s)
        for memory in (self._asked_for, self._pinned, self._history):
            memory.pop(name, None)

    def _retire(self, model: Model, timeout_s: float) -> None:
        """Let a model that is out of the catalog finish its calls, beside everything else, and release it."""

        async def drain() -> None:
            cut_off = await model.release(timeout_s)
            self._cut_off += cut_off  # only now: others have added theirs meanwhile
            del self._draining[model]
            log.info("%s/%d is released", model.manifest.name, model.manifest.version)

        self._metrics.drop_gauges(model.manifest.name, model.manifest.version, model.provider, model.bundle.digest)
        self._metrics.models_loaded.set(len(self._catalog.models()))
        self._draining[model] = asyncio.create_task(drain())

    def _share(self, name: str, version: int) -> float:
        return self._catalog.route(name).share(version)

    def _status_of(self, name: str, version: int) -> VersionStatus:
        model = self._catalog.model(name, version)
        failure = self._loader.failures.get((name, version))
        if model is not None:
            status = ("READY" if model.ready else "UNREADY", failure.reason if failure else "")
        elif (name, version) in self._loader.loading:
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
        return VersionStatus(name, version, *status, model.bundle.digest, share, model.calls, model.batcher.queued_images)
