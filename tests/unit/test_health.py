"""Health's watchers: each is told of each change, none holds up another, their number has a bound, and stopping ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2

from serve.models.catalog import Catalog
from serve.ports import health as health_module
from serve.ports.health import HEALTH, LIVENESS, Health
from tests.fake_wire import FakeWire

Status = health_pb2.HealthCheckResponse


class Watcher(FakeWire):
    """Keeps what it is told; one that does not ``read`` takes nothing."""

    def __init__(self, *, reads: bool = True) -> None:
        super().__init__()
        self._reads = reads

    async def send(self, message: bytes) -> None:
        if not self._reads:
            await asyncio.Event().wait()
        await super().send(message)

    @property
    def told(self) -> list[int]:
        return [Status.FromString(answer).status for answer in self.answers]


def with_health(test: Callable[[Health, Any], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine function with the health of one model, which is ready."""
    model = SimpleNamespace(manifest=SimpleNamespace(name="mlp", version=1), ready=True, batcher=SimpleNamespace(broken=None))
    catalog = Catalog("mlp")
    catalog.put(cast(Any, model))
    health = Health(catalog)
    health.publish()
    asyncio.run(asyncio.wait_for(test(health, model), 20))


def watch(health: Health, watcher: FakeWire, service: str = "") -> asyncio.Task[None]:
    task = health.methods()[f"/{HEALTH}/Watch"].task
    assert task is not None
    return asyncio.create_task(task(watcher, health_pb2.HealthCheckRequest(service=service).SerializeToString()))


async def settled() -> None:
    """Let every task do what it can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_each_watcher_is_told_of_each_change_whoever_leaves_or_does_not_read() -> None:
    async def test(health: Health, model: Any) -> None:
        watchers = [Watcher(), Watcher(), Watcher()]
        silent, *tasks = [watch(health, watcher) for watcher in (Watcher(reads=False), *watchers)]
        unknown = watch(health, stranger := Watcher(), "nobody")
        await settled()
        tasks[0].cancel()
        await settled()
        model.ready = False
        health.publish()
        health.publish()  # nothing is new
        await settled()
        model.ready = True
        health.publish()
        await settled()
        changes = [Status.SERVING, Status.NOT_SERVING, Status.SERVING]
        assert [watcher.told for watcher in watchers] == [changes[:1], changes, changes]
        assert stranger.told == [Status.SERVICE_UNKNOWN]
        health.end_watches()
        await asyncio.gather(*tasks[1:], unknown)
        assert [watcher.code for watcher in watchers[1:]] == [grpc.StatusCode.OK] * 2
        await asyncio.wait_for(watch(health, late := Watcher()), 5)
        assert late.code is grpc.StatusCode.OK, "whoever comes afterwards is not kept"
        silent.cancel()
        await settled()
        assert health._watches == 0

    with_health(test)


def test_watches_are_bounded_and_those_that_ended_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "MOST_WATCHES", 2)

    async def test(health: Health, model: Any) -> None:
        tasks = [watch(health, Watcher()) for _ in range(2)]
        await settled()
        await watch(health, refused := Watcher())
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        tasks[0].cancel()
        await settled()
        again = watch(health, taken := Watcher())
        await settled()
        assert taken.told == [Status.SERVING]
        for task in (again, tasks[1]):
            task.cancel()
        await settled()

    with_health(test)


def test_what_liveness_says_is_published() -> None:
    async def test(health: Health, model: Any) -> None:
        task = watch(health, watcher := Watcher(), LIVENESS)
        await settled()
        health.process_not_alive = lambda: "deaf"
        health.publish()
        await settled()
        assert watcher.told == [Status.SERVING, Status.NOT_SERVING]
        health.end_watches()
        await task

    with_health(test)
