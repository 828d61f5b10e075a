"""Liveness and readiness, of the server and of each model, for gRPC's health protocol and the HTTP probes.

Ready means that a request can be answered: some model is ready, and the process is not draining. That is the status of the
service's name over gRPC and of ``/readyz`` over HTTP. ``""`` is SERVING when all models are ready, including the default;
``<service>/<model>`` and ``/readyz/<model>`` when that model is; ``liveness`` and ``/healthz`` as long as the process needs no
restart, draining or not.
"""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health, health_pb2

from serve.api.digits_v1 import SERVICE
from serve.models.catalog import Catalog

LIVENESS = "liveness"
WITHOUT_SLOTS_S = 60.0  # a model that has had no working slot for so long is taken for beyond mending from inside

Status = health_pb2.HealthCheckResponse


class EndingServicer(health.aio.HealthServicer):
    """gRPC's servicer, whose watches can be ended: by themselves they go on for ever, and a stopping server waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self._ending = asyncio.Event()

    def end_watches(self) -> None:
        """End every watch, now and from now on."""
        self._ending.set()

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802  # gRPC's name; its types are newer than the stubs
        """Every service's status; grpcio's servicer lists none."""
        known = self._server_status  # type: ignore[attr-defined]  # not in the stubs
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in known.items()}
        return health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:  # noqa: N802  # gRPC's name
        tasks = [asyncio.ensure_future(super().Watch(request, context)), asyncio.ensure_future(self._ending.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()


class Health:
    """The answers, and gRPC's servicer that they are published to."""

    def __init__(self, catalog: Catalog) -> None:
        self.servicer = EndingServicer()
        self.draining = False
        self._catalog = catalog
        self._names: set[str] = set()
        self._turn = asyncio.Lock()  # so that a round which began before draining cannot end after it

    def not_alive(self) -> str | None:
        """Why the process is to be restarted; None when it is not."""
        for model in self._catalog.models():
            if model.batcher.device_lost:
                return model.batcher.device_lost
            if model.batcher.without_slots_s > WITHOUT_SLOTS_S:
                return f"{model.manifest.name}/{model.manifest.version} has had no working slot for {WITHOUT_SLOTS_S:g} s"
        return None

    def not_ready(self, model: str | None = None) -> str | None:
        """Why no request can be answered, or none for ``model``; None when one can."""
        if self.draining:
            return "draining"
        names = self._catalog.names() if model is None else [model]
        if any(self._catalog.ready(name) for name in names):
            return None
        return f"not ready: {', '.join(names)}" if names else "no model is served yet"

    def not_complete(self) -> str | None:
        """Why not all models are ready, the default among them; None when they are."""
        if self.draining:
            return "draining"
        names = self._catalog.names()
        if self._catalog.default_model not in names:
            return f"default model {self._catalog.default_model} is not served"
        unready = [name for name in names if not self._catalog.ready(name)]
        return f"not ready: {', '.join(unready)}" if unready else None

    async def publish(self) -> None:
        """Tell gRPC's servicer, and those who watch it, how things stand."""
        async with self._turn:
            names = self._catalog.names()
            states = {f"{SERVICE}/{name}": self._catalog.ready(name) and not self.draining for name in names}
            states[""] = self.not_complete() is None
            states[SERVICE] = self.not_ready() is None
            states[LIVENESS] = self.not_alive() is None
            for service, good in states.items():
                await self.servicer.set(service, Status.SERVING if good else Status.NOT_SERVING)
            for service in self._names - states.keys():
                await self.servicer.set(service, Status.SERVICE_UNKNOWN)
            self._names = set(states)
