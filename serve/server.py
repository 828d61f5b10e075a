"""The server's life: start, run, stop. On SIGTERM: say NOT_SERVING, wait for clients to notice, refuse, finish, release.

Why asyncio and not grpcio's threads: a caller who waits costs a coroutine, not a thread, so a thousand in flight are
nothing special; and threads, the models' own among them, would all wait for the one interpreter lock. Throw-away
prototypes on 2 cores answered 4,850 single digits a second on asyncio and 1,870 with threads. uvloop's event loop is a
tenth faster than asyncio's own (``serve.bench`` tells what else was tried).
"""

from __future__ import annotations

import asyncio
import logging
import os
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

from serve.access import tls
from serve.access.callers import Callers
from serve.access.tokens import TokenFile
from serve.catalog import Catalog
from serve.errors import StartError
from serve.http_api import HttpApi
from serve.lifecycle import Lifecycle
from serve.metrics import Metrics
from serve.model import JOIN_S
from serve.model_control import SERVICE as MODEL_CONTROL
from serve.model_control import ModelControlService
from serve.open_inference import SERVICE as OPEN_INFERENCE
from serve.open_inference import OpenInferenceService
from serve.repository import Repository, parse_policies
from serve.rpc import Door, Gate
from serve.service import SERVICE, DigitService
from serve.settings import Settings, is_loopback
from serve.tracing import Tracing, set_up
from serve.version import release
from serve.web import make_app, start_http

log = logging.getLogger(__name__)

SUPERVISION_S = 1.0
MAX_REQUEST_BYTES = 4 << 20
CONNECTION_AGE_GRACE_S = 60
LAST_WORDS_S = 0.25
LIVENESS = "liveness"  # a health name that is SERVING as long as the process answers, draining or not
# What stopping may take beyond --drain-grace-s and --drain-deadline-s: hung runs, last words, spans not yet sent.
DRAIN_OVERHEAD_S = JOIN_S + LAST_WORDS_S + 4.0
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
        self._metrics.build.info({"version": release(), "python": platform.python_version(), "grpcio": version("grpcio")})
        self._metrics.expected_provider.labels(settings.provider).set(1)
        self._health = health.aio.HealthServicer()
        self._health_names: set[str] = set()
        self._stop = asyncio.Event()
        self._draining = False
        self._tracing: Tracing | None = None
        self._gate = Gate()
        self.catalog = Catalog(settings.default_model)
        repository = Repository(settings.models_dir, parse_policies(settings.versions))
        self._lifecycle = Lifecycle(repository, self.catalog, settings, self._metrics)

    async def run(self, announce: Callable[[Server, Ports], None]) -> None:
        """Serve until ``stop`` is called or SIGTERM or SIGINT arrives. Raises StartError before any port is bound."""
        credentials, tokens = self._credentials(), self._tokens()
        self._tracing = set_up(os.environ)
        await self._lifecycle.start()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        # Without tokens anyone who reaches the port is an administrator, so that must be somebody on this machine.
        limits = (self._settings.caller_images, self._settings.caller_requests_per_s)
        door = Door(self._metrics, self._gate, Callers(tokens, *limits, is_loopback(self._settings.host)), self._tracing)
        digits = DigitService(self.catalog, self._settings)
        grpc_server, grpc_port = self._bind_grpc(credentials, door, digits)
        app = make_app(self._registry if self._settings.metrics else None, self._not_ready)
        if self._settings.page:
            app.add_routes(HttpApi(digits, self.catalog, door, f"{self._settings.host}:{grpc_port}").routes())
        http_runner, http_port = await start_http(app, self._settings.http_host, self._settings.http_port)
        await grpc_server.start()
        await self._publish_health()
        background = [asyncio.create_task(self._supervise()), asyncio.create_task(self._self_checks())]
        if self._settings.model_control == "poll":
            background.append(asyncio.create_task(self._lifecycle.poll_forever()))
        announce(self, Ports(grpc_port, http_port))
        await self._stop.wait()
        await self._drain(grpc_server)
        for task in background:
            task.cancel()
        await http_runner.cleanup()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.shut_down)

    def stop(self) -> None:
        """Begin to drain."""
        self._stop.set()

    def _credentials(self) -> grpc.ServerCredentials | None:
        cert, key = self._settings.tls_cert, self._settings.tls_key
        if cert is None or key is None:
            return None
        return tls.credentials(tls.TlsFiles(cert, key, self._settings.tls_client_ca), self._note_reload("certificate"))

    def _tokens(self) -> TokenFile | None:
        path = self._settings.tokens_file
        return None if path is None else TokenFile(path, self._note_reload("tokens"))

    def _note_reload(self, what: str) -> Callable[[str], None]:
        return lambda result: self._metrics.access_reloads.labels(what, result).inc()

    def _bind_grpc(
        self, credentials: grpc.ServerCredentials | None, door: Door, digits: DigitService
    ) -> tuple[grpc.aio.Server, int]:
        settings = self._settings
        server = grpc.aio.server(
            interceptors=[self._tracing.interceptor] if self._tracing else None,
            options=[
                ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it in silence
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1000)),
                ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_S * 1000),
                ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        open_inference = OpenInferenceService(self.catalog, settings, lambda: self._not_ready() is None)
        tables = [digits.table(door), open_inference.table(door)]
        tables += ModelControlService(self._lifecycle).tables(door)
        server.add_generic_rpc_handlers(tuple(table.handler() for table in tables))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if settings.reflection:
            names = (SERVICE, MODEL_CONTROL, OPEN_INFERENCE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        host = f"[{settings.host}]" if ":" in settings.host.strip("[]") else settings.host
        address = f"{host}:{settings.grpc_port}"
        try:
            port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise StartError(f"--grpc-port {settings.grpc_port} on {settings.host} cannot be had; name another")
        return server, port

    async def _publish_health(self) -> None:
        """The process as a whole is healthy with all its models; the service can be used with any of them."""
        names = self.catalog.names()
        states = {f"{SERVICE}/{name}": self.catalog.ready(name) and not self._draining for name in names}
        states[""] = self._not_ready() is None
        states[LIVENESS] = True
        states[SERVICE] = not self._draining and any(self.catalog.ready(name) for name in names)
        serving = health_pb2.HealthCheckResponse
        for service, ready in states.items():
            await self._health.set(service, serving.SERVING if ready else serving.NOT_SERVING)
        for service in self._health_names - states.keys():
            await self._health.set(service, serving.SERVICE_UNKNOWN)
        self._health_names = set(states)

    def _not_ready(self) -> str | None:
        if self._draining:
            return "draining"
        names = self.catalog.names()
        if self.catalog.default_model not in names:
            return f"default model {self.catalog.default_model} is not served"
        unready = [name for name in names if not self.catalog.ready(name)]
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
        leftovers = await self._lifecycle.close(max(0.0, deadline - time.monotonic()))
        # What is still open then are answers on their way out, and health watchers, who never leave by themselves.
        await grpc_server.stop(LAST_WORDS_S)
        if leftovers:
            self._metrics.drained.inc(leftovers)
        log.info("stopped; %d requests were cancelled by the drain deadline", leftovers)


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
