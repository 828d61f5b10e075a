"""The server's life: start, run, stop. On SIGTERM: say NOT_SERVING, wait for clients to notice, refuse, finish, release.

Why asyncio and not grpcio's threads: a caller who waits costs a coroutine, not a thread, so a thousand in flight are
nothing special; and threads, the models' own among them, would all wait for the one interpreter lock. Throw-away
prototypes on 2 cores answered 4,850 single digits a second on asyncio and 1,870 with threads. uvloop's event loop is a
tenth faster than asyncio's own (``serve.bench`` tells what else was tried).
"""

from __future__ import annotations

import asyncio
import logging
import platform
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from serve.catalog import Catalog
from serve.engine import Provider, choose_provider
from serve.errors import ProviderError, StartError
from serve.metrics import Metrics
from serve.model import Model, open_model
from serve.open_inference import SERVICE as OPEN_INFERENCE
from serve.open_inference import OpenInferenceService
from serve.repository import Bundle, latest_bundles, read_bundle
from serve.rpc import Gate
from serve.service import SERVICE, DigitService
from serve.settings import Settings
from serve.web import make_app, start_http

log = logging.getLogger(__name__)

SUPERVISION_S = 1.0
MAX_REQUEST_BYTES = 4 << 20
CONNECTION_AGE_GRACE_S = 60
LAST_WORDS_S = 0.25
JOIN_S = 5.0
KEEPALIVE_MS = 30_000


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    grpc: int
    http: int


class Server:
    """Everything one process serves. ``run`` takes it from start to stop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry = _new_registry()
        self._metrics = Metrics(self._registry)
        self._health = health.aio.HealthServicer()
        self._stop = asyncio.Event()
        self._draining = False
        self._gate = Gate()
        self.catalog: Catalog

    async def run(self, announce: Callable[[Server, Ports], None]) -> None:
        """Serve until ``stop`` is called or SIGTERM or SIGINT arrives. Raises StartError before any port is bound."""
        self.catalog = await self._open_models()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        grpc_server, grpc_port = self._bind_grpc()
        app = make_app(self._registry, self._not_ready)
        http_runner, http_port = await start_http(app, self._settings.http_host, self._settings.http_port)
        await grpc_server.start()
        await self._publish_health()
        background = [asyncio.create_task(self._supervise()), asyncio.create_task(self._self_checks())]
        announce(self, Ports(grpc_port, http_port))
        await self._stop.wait()
        await self._drain(grpc_server)
        for task in background:
            task.cancel()
        await http_runner.cleanup()

    def stop(self) -> None:
        """Begin to drain."""
        self._stop.set()

    async def _open_models(self) -> Catalog:
        bundles = [read_bundle(path) for path in latest_bundles(self._settings.models_dir)]
        loop = asyncio.get_running_loop()
        models = await asyncio.to_thread(self._open_all, bundles, choose_provider(self._settings.provider), loop)
        self._metrics.models_loaded.set(len(models))
        self._metrics.build.info(
            {"version": version("digits-serve"), "python": platform.python_version(), "grpcio": version("grpcio")}
        )
        return Catalog(models, self._settings.default_model)

    def _open_all(self, bundles: list[Bundle], provider: Provider, loop: asyncio.AbstractEventLoop) -> list[Model]:
        try:
            return [open_model(bundle, provider, self._settings, self._metrics, loop) for bundle in bundles]
        except ProviderError as error:
            if self._settings.provider != "auto" or provider == "cpu":
                raise
            log.warning("provider auto: serving on the CPU, because %s", error)
            return [open_model(bundle, "cpu", self._settings, self._metrics, loop) for bundle in bundles]

    def _bind_grpc(self) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it in silence
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_connection_age_ms", int(self._settings.max_connection_age_s * 1000)),
                ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_S * 1000),
                ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        DigitService(self.catalog, self._settings).table(self._metrics, self._gate).add_to(server)
        open_inference = OpenInferenceService(self.catalog, self._settings, lambda: self._not_ready() is None)
        open_inference.table(self._metrics, self._gate).add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._settings.reflection:
            names = (SERVICE, OPEN_INFERENCE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        address = f"{self._settings.host}:{self._settings.grpc_port}"
        try:
            port = server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise StartError(f"--grpc-port {self._settings.grpc_port} on {self._settings.host} cannot be had; name another")
        return server, port

    async def _publish_health(self) -> None:
        for model in self.catalog.models():
            await self._set_health(f"{SERVICE}/{model.manifest.name}", model.ready and not self._draining)
        # The process as a whole is healthy with all its models; the service can be used with any of them.
        await self._set_health("", self._not_ready() is None)
        await self._set_health(SERVICE, not self._draining and any(model.ready for model in self.catalog.models()))

    async def _set_health(self, service: str, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    def _not_ready(self) -> str | None:
        if self._draining:
            return "draining"
        unready = [model.manifest.name for model in self.catalog.models() if not model.ready]
        return f"not ready: {', '.join(unready)}" if unready else None

    async def _supervise(self) -> None:
        while True:
            for model in self.catalog.models():
                model.batcher.check_stalled()
            await self._publish_health()
            await asyncio.sleep(SUPERVISION_S)

    async def _self_checks(self) -> None:
        while self._settings.self_check_interval_s:
            await asyncio.sleep(self._settings.self_check_interval_s)
            for model in self.catalog.models():
                await model.self_check()
            await self._publish_health()

    async def _drain(self, grpc_server: grpc.aio.Server) -> None:
        log.info("stopping: not serving any more, %g s until new requests are refused", self._settings.drain_grace_s)
        self._draining = True
        await self._publish_health()
        await asyncio.sleep(self._settings.drain_grace_s)
        deadline = time.monotonic() + self._settings.drain_deadline_s
        self._gate.close()
        await self._gate.wait_idle(self._settings.drain_deadline_s)
        leftovers = await asyncio.to_thread(self._drain_models, deadline)
        # What is still open then are answers on their way out, and health watchers, who never leave by themselves.
        await grpc_server.stop(LAST_WORDS_S)
        await asyncio.to_thread(self._close_models)
        if leftovers:
            self._metrics.drained.inc(leftovers)
        log.info("stopped; %d requests were cancelled by the drain deadline", leftovers)

    def _drain_models(self, deadline: float) -> int:
        return sum(model.batcher.drain(deadline) for model in self.catalog.models())

    def _close_models(self) -> None:
        for model in self.catalog.models():
            if stuck := model.batcher.close(JOIN_S):
                log.error("%d instances of %s did not end", stuck, model.manifest.name)


def serve(settings: Settings, announce: Callable[[Server, Ports], None]) -> None:
    """Run a server to its end in this thread."""

    async def run() -> None:
        await Server(settings).run(announce)

    uvloop.run(run())


def _new_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    collectors: list[Any] = [ProcessCollector, PlatformCollector, GCCollector]
    for collector in collectors:
        collector(registry=registry)
    return registry
