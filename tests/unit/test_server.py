"""What the server does beside its calls: its watchdog, its start and its end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve import server as server_module
from serve.errors import EngineError, StartError
from serve.ports.health import LIVENESS
from serve.server import DRAIN_OVERHEAD_S, ENDED_LATE, MUCH_BYTES, OPEN_CALL_BYTES, Server
from serve.settings import Settings
from tests.fake_engine import TIMEOUT_S, FakeEngine, Gate, make_ticket, start_batcher, wait_for

WATCHDOG_S = 2.0


def unstarted(*batchers: Any) -> tuple[Server, list[float]]:
    """A server of these batchers, without ports; and what its gRPC port is told of the time."""
    server, seen = Server(Settings(watchdog_s=WATCHDOG_S)), list[float]()
    server._grpc = cast(Any, SimpleNamespace(watch=seen.append, open=[], not_alive=lambda: None))
    server._admission = cast(Any, SimpleNamespace(budget=SimpleNamespace(held_bytes=0)))
    for number, batcher in enumerate(batchers):
        name = SimpleNamespace(name=f"m{number}", version=1)
        server.catalog.put(cast(Any, SimpleNamespace(manifest=name, batcher=batcher, ready=batcher.broken is None)))
    return server, seen


def test_time_in_which_the_process_was_stopped_is_told_to_nobody() -> None:
    batcher = SimpleNamespace(broken=None, watched=list[float]())
    batcher.watch = batcher.watched.append

    async def scenario() -> None:
        server, seen = unstarted(batcher)
        interval_s = server._watch_interval_s
        assert interval_s <= WATCHDOG_S / 4
        server._watched_at = time.monotonic() - interval_s
        await server._watch()
        server._watched_at = time.monotonic() - 3600  # as after SIGSTOP
        await server._watch()
        assert batcher.watched == seen
        usual, stopped = seen
        assert interval_s <= usual <= 2 * interval_s
        assert stopped == 2 * interval_s
        assert not server._stopping.is_set()

    asyncio.run(scenario())


def test_a_hung_run_stops_the_server_and_liveness_says_so_at_once() -> None:
    async def scenario() -> None:
        server, _ = unstarted(batcher)
        server._health.publish()
        for _ in range(20):
            if server._stopping.is_set():
                break
            server._watched_at = time.monotonic() - 3600
            await server._watch()
        assert server._stopping.is_set()
        assert server.broken == server._health.not_alive() == batcher.broken
        assert server._health._statuses[LIVENESS] == health_pb2.HealthCheckResponse.NOT_SERVING

    gate = Gate()
    batcher, _ = start_batcher(lambda: FakeEngine(gate), watchdog_s=WATCHDOG_S)
    batcher.submit(hung := make_ticket())
    assert gate.reached.wait(TIMEOUT_S)
    asyncio.run(scenario())
    with pytest.raises(EngineError, match="2 s"):
        wait_for(hung)
    gate.open()
    batcher.close(TIMEOUT_S)


@pytest.mark.parametrize("held_by", ["budget", "open calls"])
def test_memory_is_given_back_once_after_much_was_held(held_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(server_module, "give_memory_back", lambda: given.append(1))

    async def scenario() -> None:
        server, _ = unstarted()
        server._workers = ThreadPoolExecutor(1)  # what is submitted has run once what was submitted after it has

        async def holds(size: int) -> int:
            if held_by == "budget":
                server._admission.budget.held_bytes = size
            else:
                cast(Any, server._grpc).open = range(size // OPEN_CALL_BYTES)
            await server._watch()
            server._workers.submit(lambda: None).result(TIMEOUT_S)
            return len(given)

        assert [await holds(size) for size in (MUCH_BYTES // 2, 0, 0)] == [0, 0, 0], "little is not worth it"
        assert [await holds(size) for size in (2 * MUCH_BYTES, MUCH_BYTES)] == [0, 0], "while it is held there is nothing to give"
        assert [await holds(size) for size in (0, 0, 0)] == [1, 1, 1]
        assert [await holds(size) for size in (2 * MUCH_BYTES, 0)] == [1, 2]
        server._workers.shutdown()

    asyncio.run(scenario())


def test_the_allocator_is_asked_to_give_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve.engine import resources  # noqa: PLC0415  # its library is replaced

    asked: list[int] = []
    monkeypatch.setattr(resources.ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=asked.append))
    resources.give_memory_back()
    assert asked == [0]
    monkeypatch.setattr(resources.ctypes, "CDLL", lambda name: SimpleNamespace())  # not glibc's
    resources.give_memory_back()


def run_server(monkeypatch: pytest.MonkeyPatch, models: Path, when_stopping: Callable[[float], object]) -> None:
    """Start a server with the mlp and stop it at once."""
    monkeypatch.setattr(server_module, "FLUSH_GRACE_S", 0.0)
    chosen = Settings(
        models_dir=models, grpc_port=0, http_port=0, instances=1, provider="cpu", drain_deadline_s=3.0, drain_grace_s=0.1
    )

    async def whole() -> None:
        server = Server(chosen, when_stopping)
        await server.run(lambda server, ports: server.stop())

    asyncio.run(asyncio.wait_for(whole(), TIMEOUT_S))


@pytest.fixture
def mlp(bundles: Path) -> Path:
    for name in ("dcgan", "cdcgan", "rpgan"):
        (bundles / name).rename(bundles.parent / name)
    return bundles


def test_the_core_is_tried_before_the_server_says_that_it_is_ready(mlp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(methods: Any) -> None:
        raise StartError("grpcio does not answer calls")

    monkeypatch.setattr(server_module, "check_calls", failing)
    with pytest.raises(StartError, match="does not answer"):
        run_server(monkeypatch, mlp, lambda seconds: None)


def test_stopping_tells_beforehand_how_long_it_may_take(mlp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []
    run_server(monkeypatch, mlp, times.append)
    assert times == [pytest.approx(3.1 + DRAIN_OVERHEAD_S)]


def test_who_watches_health_costs_no_drain(mlp: Path) -> None:
    chosen = Settings(models_dir=mlp, grpc_port=0, http_port=0, instances=1, provider="cpu", drain_deadline_s=20.0)

    async def watch(server: Server, port: int) -> list[int]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            told = []
            async for answer in stub.Watch(health_pb2.HealthCheckRequest()):
                told.append(answer.status)
                server.stop()
            return told

    async def whole() -> None:
        watching: list[asyncio.Task[list[int]]] = []
        server = Server(chosen)
        started = time.monotonic()
        await server.run(lambda server, ports: watching.append(asyncio.create_task(watch(server, ports.grpc))))
        assert time.monotonic() - started < 12
        assert await watching[0] == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_a_process_that_hangs_while_stopping_ends_all_the_same() -> None:
    program = "import time; from serve.server import _end_process_after; _end_process_after(0.1); time.sleep(20)"
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, "-c", program], timeout=50, check=False, env=environment)
    assert done.returncode == ENDED_LATE
