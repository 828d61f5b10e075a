"""Turns an administrator's requests into changes of the desired state. For the event loop's thread alone.

A change is first made on this replica and written only if that works, so the file never asks for what could not be loaded
here. The other replicas follow when they read the file.
"""

from __future__ import annotations

import asyncio
from functools import partial

import msgspec

from serve.errors import BundleError, LifecycleError
from serve.models.reconcile import Reconciler, VersionStatus
from serve.models.serving_file import HISTORY, ModelState, Route


class Administration:
    """Changes which versions are served, and where requests go that name none. Raises LifecycleError."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._catalog = reconciler.catalog
        self._file = reconciler.serving_file

    async def load(self, name: str, version: int) -> None:
        """Load a version beside the others, or with 0 what the model's version policy picks."""
        await self._reconciler.change(partial(self._load, name, version))

    async def unload(self, name: str, version: int) -> None:
        """Stop serving a version, or with 0 the model."""
        await self._reconciler.change(partial(self._unload, name, version))

    async def set_default(self, name: str, route: Route | None) -> None:
        """Send requests that name no version where ``route`` says; None: to the highest version served."""
        await self._reconciler.change(partial(self._set_default, name, route))

    async def rollback(self, name: str) -> None:
        """Send those requests where they went before the last change, loading what that takes.

        Where no change was made by an administrator, the version policy has: the next lower version becomes the default.
        """
        await self._reconciler.change(partial(self._rollback, name))

    async def status(self) -> list[VersionStatus]:
        """Every version there is, on disk or served."""
        return await self._reconciler.status()

    async def _load(self, name: str, version: int) -> None:
        try:
            await self._reconciler.look()
        except BundleError as error:
            raise LifecycleError(str(error)) from None
        there, served = self._reconciler.there(name), self._catalog.versions(name)
        if not there or (version and version not in there):
            listed = ", ".join(map(str, there)) or "no complete one"
            wanted = f"version {version}" if version else "version"
            raise LifecycleError(f"the repository has no {wanted} of {name[:64]!r}; there is {listed}")
        state = self._file.state.of(name)
        if version == 0:
            for failed in self._reconciler.loader.failures_of(name):
                self._reconciler.loader.forget_failure((name, failed))  # being asked for is reason enough to try again
            for number in set(served) & set(there):
                await self._need(name, number)
            await self._apply(name, state if state.versions is None else msgspec.structs.replace(state, versions=None))
            for failure in self._reconciler.loader.failures_of(name).values():
                raise LifecycleError(failure.reason)
            return
        wanted_state = state
        if version not in served:
            await self._check_writable()
            route = state.route or (self._catalog.route(name) if served else None)
            wanted_state = msgspec.structs.replace(state, versions=tuple(sorted({*served, version})), route=route)
        await self._need(name, version)
        await self._apply(name, wanted_state)

    async def _unload(self, name: str, version: int) -> None:
        served = self._catalog.versions(name)
        if not served or (version and version not in served):
            raise LifecycleError(f"{name[:64]!r} version {version or 'any'} is not served; there are {served or 'none'}")
        if version == 0 or served == [version]:
            await self._apply(name, ModelState(versions=()))
            return
        if self._catalog.route(name).share(version):
            raise LifecycleError(f"version {version} of {name} answers requests that name none; SetDefault first")
        left = tuple(number for number in served if number != version)
        await self._apply(name, msgspec.structs.replace(self._file.state.of(name), versions=left))

    async def _set_default(self, name: str, route: Route | None) -> None:
        served = self._catalog.versions(name)
        if not served:
            raise LifecycleError(f"model {name[:64]!r} is not served")
        for version in sorted(route.versions - set(served)) if route else ():
            raise LifecycleError(f"version {version} of {name[:64]!r} is not served; there are {served}")
        state, current = self._file.state.of(name), self._catalog.route(name)
        previous = state.previous if route == current else (*state.previous, current)[-HISTORY:]
        await self._apply(name, msgspec.structs.replace(state, route=route, previous=previous))

    async def _rollback(self, name: str) -> None:
        served, state = self._catalog.versions(name), self._file.state.of(name)
        default = self._catalog.route(name).default if served else 0
        lower = [number for number in self._reconciler.there(name) if number < default]
        if not served or not (state.previous or lower):
            raise LifecycleError(f"model {name[:64]!r} has no earlier default to go back to")
        route = state.previous[-1] if state.previous else Route(max(lower))
        previous = state.previous[:-1]
        await self._check_writable()
        for version in route.versions - set(served):
            await self._need(name, version)
        await self._apply(name, msgspec.structs.replace(state, route=route, previous=previous))

    async def _need(self, name: str, version: int) -> None:
        if problem := await self._reconciler.load_version(name, version):
            raise LifecycleError(problem)

    async def _check_writable(self) -> None:
        await asyncio.to_thread(self._file.prepare)

    async def _apply(self, name: str, state: ModelState) -> None:
        """Write a model's state, if it is another than before, and serve what it says."""
        if state != self._file.state.of(name):
            await asyncio.to_thread(self._file.write, self._file.state.with_model(name, state))
        await self._reconciler.reconcile(name)
