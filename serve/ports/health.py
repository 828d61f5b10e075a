"""Liveness and readiness, of the server and of each model, for gRPC's health protocol and the HTTP probes.

Ready means that a request can be answered: some model is ready, and the process is not draining. That is the status of the
service's name over gRPC and of ``/readyz`` over HTTP. ``""`` is SERVING when all models are ready, including the default;
``<service>/<model>`` and ``/readyz/<model>`` when that model is; ``liveness`` and ``/healthz`` as long as the process needs no
restart, draining or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import grpc
from grpc_health.v1 import health_pb2

from serve.api.digits_v1 import SERVICE
from serve.api.rpc import Method, Wire, parse
from serve.errors import RequestError
from serve.models.catalog import Catalog

HEALTH = "grpc.health.v1.Health"
LIVENESS = "liveness"
MOST_WATCHES = 1024

Status = health_pb2.HealthCheckResponse


class Health:
    """The answers, and gRPC's health service. Its statuses are one value; who watches them is woken when it changes."""

    def __init__(self, catalog: Catalog) -> None:
        self.draining = False
        self.process_not_alive: Callable[[], str | None] = lambda: None  # why the process needs a restart, whatever the models
        self._catalog = catalog
        self._statuses: Mapping[str, int] = {}
        self._changed: asyncio.Future[None] | None = None
        self._watches = 0
        self._ended = False

    def methods(self) -> dict[str, Method]:
        """gRPC's health service, by path."""
        tasks = {"Check": self._check, "List": self._list, "Watch": self._watch}
        return {f"/{HEALTH}/{name}": Method(task=task) for name, task in tasks.items()}

    def not_alive(self) -> str | None:
        """Why the process is to be restarted; None when it is not."""
        broken = (model.batcher.broken for model in self._catalog.models())
        return self.process_not_alive() or next(filter(None, broken), None)

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

    def publish(self) -> None:
        """Look how things stand, and wake those who watch if it is otherwise than before. On the event loop; waits for nobody."""
        good = {f"{SERVICE}/{name}": self._catalog.ready(name) and not self.draining for name in self._catalog.names()}
        good[""] = self.not_complete() is None
        good[SERVICE] = self.not_ready() is None
        good[LIVENESS] = self.not_alive() is None
        statuses = {service: Status.SERVING if each else Status.NOT_SERVING for service, each in good.items()}
        if statuses != self._statuses:
            self._statuses = statuses
            self._wake()

    def end_watches(self) -> None:
        """End every watch, now and from now on: by themselves they go on for ever."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.set_result(None)

    async def _next_change(self) -> None:
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)

    async def _check(self, wire: Wire, raw: bytes | None) -> None:
        service = _service(raw)
        if service is None:
            wire.ending(grpc.StatusCode.INVALID_ARGUMENT, "the request is not a valid HealthCheckRequest message")()
        elif service not in self._statuses:
            wire.ending(grpc.StatusCode.NOT_FOUND, f"there is no service {service[:200]!r}")()
        else:
            wire.ending(grpc.StatusCode.OK, message=_answer(self._statuses[service]))()

    async def _list(self, wire: Wire, raw: bytes | None) -> None:
        statuses = {service: Status(status=status) for service, status in self._statuses.items()}
        response = health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # newer than the stubs
        wire.ending(grpc.StatusCode.OK, message=response.SerializeToString())()

    async def _watch(self, wire: Wire, raw: bytes | None) -> None:
        service = _service(raw)
        if service is None:
            wire.ending(grpc.StatusCode.INVALID_ARGUMENT, "the request is not a valid HealthCheckRequest message")()
        elif self._watches >= MOST_WATCHES:
            wire.ending(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MOST_WATCHES} watches are open; call Check")()
        else:
            self._watches += 1
            try:
                await self._send_changes(wire, service)
            finally:
                self._watches -= 1
            wire.ending(grpc.StatusCode.OK)()

    async def _send_changes(self, wire: Wire, service: str) -> None:
        told = None
        while not self._ended:
            status = self._statuses.get(service, Status.SERVICE_UNKNOWN)
            if status != told:
                await wire.send(_answer(status))
                told = status
            else:
                await self._next_change()


def _service(raw: bytes | None) -> str | None:
    """The service that a request asks about; None when it is no request."""
    try:
        return parse(health_pb2.HealthCheckRequest, raw or b"").service
    except RequestError:
        return None


def _answer(status: int) -> bytes:
    return Status(status=status).SerializeToString()
