"""The server: start, run, stop. On SIGTERM: report NOT_SERVING, wait for clients to notice, refuse new calls, finish, release."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import platform
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import uvloop
from aiohttp import web
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, disable_created_metrics

from serve.access import tls
from serve.access.identity import Accounts
from serve.access.tokens import TokenFile
from serve.api.admission import Admission, InFlight
from serve.api.digits_v1 import DigitService
from serve.api.http import HttpApi, page_routes
from serve.api.model_control import ModelControlService
from serve.api.open_inference import OpenInferenceService
from serve.api.open_inference_http import MAX_BODY_BYTES, OpenInferenceHttp
from serve.background import for_each, repeat
from serve.core.generate import Core
from serve.errors import StartError
from serve.models.administration import Administration
from serve.models.catalog import Catalog
from serve.models.model import JOIN_S, Model
from serve.models.reconcile import Reconciler
from serve.models.repository import Repository
from serve.models.serving_file import FILE_NAME, ServingFile
from serve.observability.metrics import Metrics
from serve.observability.tracing import Tracing, set_up
from serve.ports.check import check_ports
from serve.ports.front import Services, address
from serve.ports.grpc_port import GrpcPort
from serve.ports.health import Health
from serve.ports.http_port import LOOPBACK_NAMES, make_app, start_http
from serve.ports.load_report import Load, LoadReports
from serve.settings import Settings, is_loopback, release

log = logging.getLogger(__name__)

SUPERVISION_S = 1.0
YOUNG_OBJECTS = 10_000  # made and not yet freed, between two garbage collections of the youngest
ENDED_AT_ONCE = 130  # the exit status
FLUSH_GRACE_S = 0.25  # for answers to be written when the drain's deadline has passed
HTTP_CLEANUP_S = 1.0  # twice: for connections whose clients do not read
# What stopping may take beyond --drain-grace-s and --drain-deadline-s: hung runs, open connections, spans not yet sent.
DRAIN_OVERHEAD_S = JOIN_S + FLUSH_GRACE_S + 2 * HTTP_CLEANUP_S + 3.0


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    grpc: int
    http: int


class Server:
    """Everything one process serves. ``run`` takes it from start to stop. Raises SettingsError for an unusable file."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry = _new_registry()
        self._metrics = Metrics(self._registry)
        self._metrics.build.info({"version": release(), "python": platform.python_version(), "grpcio": version("grpcio")})
        self._metrics.expected_provider.labels(settings.provider).set(1)
        self._stopping = asyncio.Event()
        self.device_lost: str | None = None  # why the process ends by itself
        self._in_flight = InFlight()
        self._tracing: Tracing | None = None
        self._background: list[asyncio.Task[None]] = []
        self._grpc: GrpcPort
        self._http: web.AppRunner
        self.catalog = Catalog(settings.default_model)
        self._health = Health(self.catalog)
        self._reconciler = Reconciler(
            Repository(settings.models_dir, single=settings.single_model),
            ServingFile(settings.serving_file or settings.models_dir / FILE_NAME),
            self.catalog,
            settings,
            self._metrics,
        )

    async def run(self, announce: Callable[[Server, Ports], None]) -> None:
        """Serve until ``stop`` is called or SIGTERM or SIGINT arrives.

        Raises StartError before any port is bound, and when the device has failed and a new process is needed.
        """
        announce(self, await self._start())
        await self._stopping.wait()
        await self._stop()
        if self.device_lost:
            raise StartError(f"{self.device_lost}; start the server again")

    def stop(self) -> None:
        """Begin to drain."""
        self._stopping.set()

    def _signalled(self) -> None:
        """The first signal drains, the second ends the process at once."""
        if self._stopping.is_set():
            os._exit(ENDED_AT_ONCE)
        self.stop()

    async def _start(self) -> Ports:
        settings = self._settings
        for number in (signal.SIGTERM, signal.SIGINT):  # also while models are loaded: then it stops after that
            asyncio.get_running_loop().add_signal_handler(number, self._signalled)
        certificates, tokens = self._certificates(), self._tokens()
        self._held = check_ports(settings)  # models take their time
        self._tracing = set_up(os.environ)
        await self._reconciler.start()
        # Without tokens anyone who reaches the port is an administrator, so that must be somebody on this machine.
        limits = (settings.caller_images, settings.caller_requests_per_s)
        accounts = Accounts(tokens, *limits, is_loopback(settings.host))
        reports = LoadReports(self._load) if settings.load_reports else None
        admission = Admission(self._metrics, self._in_flight, accounts, self._tracing, reports)
        core = Core(self.catalog, settings.max_count, settings.max_count_float32)
        tables = [
            DigitService(core).table(admission),
            OpenInferenceService(core, lambda: self._health.not_complete() is None, self._metrics).table(admission),
            *ModelControlService(Administration(self._reconciler)).tables(admission),
        ]
        services = Services(tables, self._health.servicer, settings.reflection, self._tracing)
        self._grpc = GrpcPort(settings, services, certificates)
        registry = self._registry if settings.metrics else None
        app = make_app(registry, self._health.not_alive, self._health.not_ready, MAX_BODY_BYTES)
        if settings.http_api:
            app.add_routes(OpenInferenceHttp(core, admission, self._health.not_complete).routes())
            app.add_routes(HttpApi(core, admission, address(settings, self._grpc.port)).routes())
        if settings.page:
            app.add_routes(page_routes())
        self._http, http_port = await start_http(
            app, settings.http_host, settings.http_port, HTTP_CLEANUP_S, _http_names(settings)
        )
        await self._grpc.start()
        await self._health.publish()
        self._start_background()
        return Ports(self._grpc.port, http_port)

    def _load(self) -> Load:
        batchers = [model.batcher for model in self.catalog.models()]
        return Load(
            sum(batcher.busy_s for batcher in batchers),
            max((batcher.limits.slots for batcher in batchers), default=1),
            max((batcher.queued_images / batcher.limits.max_queue_images for batcher in batchers), default=0.0),
        )

    def _start_background(self) -> None:
        settings = self._settings
        tasks: dict[str, tuple[float, Callable[[], Awaitable[None]]]] = {
            "watchdog": (SUPERVISION_S, self._check_stalled),
            "health": (SUPERVISION_S, self._health.publish),
            "reconcile": (settings.poll_interval_s, self._reconciler.poll),
        }
        if settings.self_check_interval_s:
            tasks["self-check"] = (settings.self_check_interval_s, self._self_check)
        for name, (interval_s, action) in tasks.items():
            task: Coroutine[Any, Any, None] = repeat(name, interval_s, action, self._metrics.background_failures)
            self._background.append(asyncio.create_task(task, name=name))

    async def _stop(self) -> None:
        settings = self._settings
        log.info("stopping: not serving any more, %g s until new requests are refused", settings.drain_grace_s)
        self._health.draining = True
        await self._health.publish()
        await asyncio.sleep(settings.drain_grace_s)
        deadline = time.monotonic() + settings.drain_deadline_s
        await self._in_flight.close(settings.drain_deadline_s)
        leftovers = await self._reconciler.close(max(0.0, deadline - time.monotonic()))
        for task in self._background:
            task.cancel()
        # Waits until every answer is written, and cuts off what is not by the deadline.
        writing = asyncio.create_task(self._grpc.stop(max(FLUSH_GRACE_S, deadline - time.monotonic())))
        self._health.servicer.end_watches()
        await writing
        await self._http.cleanup()
        if leftovers:
            self._metrics.drained.inc(leftovers)
        log.info("stopped; %d requests were cancelled by the drain deadline", leftovers)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.shut_down)

    async def _check_stalled(self) -> None:
        for model in self.catalog.models():
            model.batcher.check_stalled()
            if model.batcher.device_lost and not self.device_lost:
                self.device_lost = model.batcher.device_lost
                self.stop()

    async def _self_check(self) -> None:
        await for_each(self.catalog.models(), Model.self_check)
        await self._health.publish()

    def _certificates(self) -> tls.Certificates | None:
        cert, key = self._settings.tls_cert, self._settings.tls_key
        if cert is None or key is None:
            return None
        return tls.Certificates(tls.TlsFiles(cert, key, self._settings.tls_client_ca), self._note_reload("certificate"))

    def _tokens(self) -> TokenFile | None:
        path = self._settings.tokens_file
        return None if path is None else TokenFile(path, self._note_reload("tokens"))

    def _note_reload(self, what: str) -> Callable[[str], None]:
        self._metrics.access_reloads.labels(what, "failed")  # born at 0, as above all a first failure is to be seen
        return lambda result: self._metrics.access_reloads.labels(what, result).inc()


def serve(settings: Settings, announce: Callable[[Server, Ports], None]) -> None:
    """Run a server to its end in this thread."""

    async def run() -> None:
        await Server(settings).run(announce)

    # What is imported stays: the garbage collector need not walk through it again and again (5 to 8 % of a request's time).
    # Models come later and are not frozen.
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
    uvloop.run(run())


def _http_names(settings: Settings) -> set[str] | None:
    """The names that the HTTP port answers to; None for all. On loopback nobody but this machine has any business there."""
    named = {name.strip().lower() for name in settings.http_names.split(",") if name.strip()}
    if not named and not is_loopback(settings.http_host):
        return None
    return {*named, *LOOPBACK_NAMES, settings.http_host.strip("[]").lower()}


def _new_registry() -> CollectorRegistry:
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    collectors: list[Any] = [ProcessCollector, PlatformCollector, GCCollector]
    for collector in collectors:
        collector(registry=registry)
    return registry
