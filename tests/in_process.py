"""A whole server in the test's own process, whose engines do as they are told: wait, fail, or give wrong pixels."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from serve.batching.batcher import Batcher
from serve.batching.ticket import Ticket
from serve.models import model as model_module
from serve.pb.digits.v1 import digits_pb2_grpc as digits_grpc
from serve.pb.inference import open_inference_pb2_grpc as inference_grpc
from serve.server import Ports, Server
from serve.settings import Settings
from tests.bench.process import sample_sum

TIMEOUT_S = 30.0
HONEST_MAKE_ENGINE = model_module.make_engine


class Orders:
    """What the engines are to do, and what they did. The engines run in threads of their own."""

    def __init__(self) -> None:
        self.reached = threading.Event()  # set when a run waits
        self.slow_s = 0.0
        self.breached: set[int] = set()  # versions that give wrong pixels
        self.fails: Exception | None = None
        self.rows = 0
        self._open = threading.Event()
        self._open.set()
        self._waits_once = False

    def hold(self) -> None:
        """Let every run wait until ``release``."""
        self.reached.clear()
        self._open.clear()

    def hang_once(self) -> None:
        """Let the next run wait until ``release``, and no other."""
        self.hold()
        self._waits_once = True

    def release(self) -> None:
        self._open.set()

    def obey(self, count: int) -> None:
        """What an engine does before it runs ``count`` rows."""
        open_ = self._open
        if self._waits_once and not open_.is_set():
            self._waits_once, self._open = False, threading.Event()
            self._open.set()
            self.reached.set()
            open_.wait(TIMEOUT_S)
            return
        if not open_.is_set():
            self.reached.set()
            assert open_.wait(TIMEOUT_S)
        time.sleep(self.slow_s)
        if self.fails is not None:
            raise self.fails
        self.rows += count


class Running:
    """A started server and ways to reach it."""

    def __init__(
        self, server: Server, ports: Ports, orders: Orders, channel: grpc.aio.Channel, http: aiohttp.ClientSession
    ) -> None:
        self.server = server
        self.ports = ports
        self.orders = orders
        self.digits: Any = digits_grpc.DigitGeneratorStub(channel)
        self.inference: Any = inference_grpc.GRPCInferenceServiceStub(channel)
        self._http = http

    async def get(self, path: str) -> tuple[int, str, Any]:
        """Status, body and headers of a path on the HTTP port."""
        async with self._http.get(f"http://127.0.0.1:{self.ports.http}{path}") as answer:
            return answer.status, await answer.text(), answer.headers

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a sample over all children with these labels."""
        return sample_sum((await self.get("/metrics"))[1], name, labels)

    async def until_metric(self, value: float, name: str, **labels: str) -> None:
        """Wait until the metric has this value."""
        await until(lambda: self.metric(name, **labels), lambda seen: seen == value)

    async def until_held(self) -> None:
        """Wait until a run is held."""
        assert await asyncio.to_thread(self.orders.reached.wait, TIMEOUT_S)


async def until(ask: Callable[[], Awaitable[Any]], good: Callable[[Any], bool]) -> None:
    """Ask until the answer is good."""
    deadline = time.monotonic() + TIMEOUT_S
    while not good(seen := await ask()):
        assert time.monotonic() < deadline, f"still {seen}"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def _running(settings: Settings, orders: Orders) -> AsyncIterator[Running]:
    started: asyncio.Future[tuple[Server, Ports]] = asyncio.get_running_loop().create_future()
    server = Server(settings)
    life = asyncio.create_task(server.run(lambda server, ports: started.set_result((server, ports))))
    await asyncio.wait([life, started], return_when=asyncio.FIRST_COMPLETED)
    if life.done():
        life.result()
    orders.rows = 0  # of the checks at start
    _, ports = await started
    options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}", options) as channel,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as http,
    ):
        try:
            yield Running(server, ports, orders, channel, http)
        finally:
            orders.release()
    server.stop()
    await life


def with_server(
    test: Callable[[Running], Awaitable[None]], monkeypatch: pytest.MonkeyPatch, models_dir: Path, **settings: Any
) -> None:
    """Run a coroutine function with a server of its own: one instance, no waiting when it stops."""
    orders = Orders()

    def make_engine(model: Any, manifest: Any, options: Any, max_batch_size: int) -> Any:
        engine = HONEST_MAKE_ENGINE(model, manifest, options, max_batch_size)
        honest = engine.run

        def run(feeds: Any, outputs: Any) -> Any:
            orders.obey(len(feeds["latents"]))
            rows = dict(honest(feeds, outputs))
            if manifest.version in orders.breached:
                rows["pixels"] = rows["pixels"] ^ 0x40
            return rows

        engine.run = run
        return engine

    monkeypatch.setattr(model_module, "make_engine", make_engine)
    defaults: dict[str, Any] = {"instances": 1, "self_check_interval_s": 0, "provider": "cpu"}
    chosen = Settings(models_dir=models_dir, grpc_port=0, http_port=0, **defaults | settings)

    async def run() -> None:
        async with _running(chosen, orders) as running:
            await asyncio.wait_for(test(running), 2 * TIMEOUT_S)

    asyncio.run(run())


def record_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, float | None]]:
    """Keep the priority and the deadline of every ticket that a batcher is given."""
    runs: list[tuple[Any, float | None]] = []
    honest = Batcher.submit

    def submit(self: Batcher, ticket: Ticket) -> None:
        runs.append((ticket.priority, ticket.deadline))
        honest(self, ticket)

    monkeypatch.setattr(Batcher, "submit", submit)
    return runs
