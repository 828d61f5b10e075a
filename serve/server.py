"""The server: start, run, stop. On SIGTERM: report NOT_SERVING, wait for clients to notice, refuse new calls, finish, release."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import uvloop
from aiohttp import web

from serve.access import tls
from serve.access.budget import Budget
from serve.access.identity import Accounts
from serve.access.tokens import TokenFile
from serve.api.admission import Admission
from serve.api.digits_v1 import DigitService
from serve.api.http import HttpApi, page_routes
from serve.api.open_inference import OpenInferenceService
from serve.api.open_inference_http import MAX_BODY_BYTES, OpenInferenceHttp
from serve.api.rpc import Method
from serve.background import finished, for_each, in_daemon_thread, repeat
from serve.command_line import release
from serve.core.generate import Core
from serve.engine.resources import give_memory_back, memory_bytes, usable_cores
from serve.errors import StartError
from serve.models.catalog import Catalog
from serve.models.model import JOIN_S, Model
from serve.models.reconcile import Reconciler
from serve.models.repository import Repository
from serve.models.serving_file import FILE_NAME, watched_serving_file
from serve.observability.metrics import Metrics, new_registry
from serve.observability.tracing import Tracing, set_up
from serve.ports.check import check_calls, check_ports
from serve.ports.grpc_port import GrpcPort, address
from serve.ports.health import HEALTH, Health
from serve.ports.http_port import HttpPorts, make_app
from serve.ports.load_report import Load, LoadReports
from serve.ports.reflection import reflection_methods
from serve.settings import Settings

log = logging.getLogger(__name__)

MUCH_BYTES, OPEN_CALL_BYTES = 32 << 20, 24 << 10
YOUNG_OBJECTS = 10_000  # made and not yet freed, between two garbage collections of the youngest
ENDED_AT_ONCE, ENDED_LATE = 130, 1  # exit statuses
FLUSH_GRACE_S = 0.25  # for answers to be written when the drain's deadline has passed
HTTP_CLEANUP_S = 1.0  # twice: for connections whose clients do not read
# What stopping may take beyond --drain-grace-s and --drain-deadline-s: hung runs, open connections, spans not yet sent.
SPANS_S = 3.0
DRAIN_OVERHEAD_S = JOIN_S + FLUSH_GRACE_S + 2 * HTTP_CLEANUP_S + SPANS_S


@dataclass(frozen=True)
class Ports:
    """Where the server listens."""

    grpc: int
    http: int
    https: int | None  # of the HTTP API, where it has a port of its own


class Server:
    """Everything one process serves. ``run`` takes it from start to stop. Raises SettingsError for an unusable file."""

    def __init__(self, settings: Settings, when_stopping: Callable[[float], object] = lambda seconds: None) -> None:
        """``when_stopping`` is called once, with the time that stopping may take."""
        self._settings = settings
        self._registry = new_registry()
        self._metrics = Metrics(self._registry)
        self._metrics.build.info({"version": release(), "python": platform.python_version(), "grpcio": version("grpcio")})
        self._metrics.expected_provider.labels(settings.provider).set(1)
        self._stopping = asyncio.Event()
        self._when_stopping = when_stopping
        self._has_signal = False
        self.broken: str | None = None  # why the process ends by itself
        self._watch_interval_s = min(1.0, settings.watchdog_s / 4)
        self._watched_at = time.monotonic()
        self._most_held = 0  # bytes, since memory was given back last
        self._workers = ThreadPoolExecutor(usable_cores(), "worker")
        self._admission: Admission
        self._tracing: Tracing | None = None
        self._background: list[asyncio.Task[None]] = []
        self._grpc: GrpcPort
        self._http: HttpPorts
        self.catalog = Catalog(settings.default_model)
        self._health = Health(self.catalog)
        self._reconciler = Reconciler(
            Repository(settings.models_dir, single=settings.single_model),
            watched_serving_file(settings.serving_file or settings.models_dir / FILE_NAME),
            self.catalog,
            settings,
            self._metrics,
        )

    async def run(self, announce: Callable[[Server, Ports], None]) -> None:
        """Serve until ``stop`` is called or SIGTERM or SIGINT arrives.

        Raises StartError before any port is bound, and when what cannot be mended in this process has failed.
        """
        starting, stopping = asyncio.create_task(self._start()), asyncio.create_task(self._stopping.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not (await asyncio.wait((starting,), timeout=JOIN_S))[0]:  # asked to stop, and a load goes on
            log.error("stopped while models were loaded")
            return
        announce(self, starting.result())
        await stopping
        await self._stop()
        if self.broken:
            raise StartError(f"{self.broken}; start the server again")

    def stop(self) -> None:
        """Begin to drain."""
        self._stopping.set()

    def _signalled(self) -> None:
        """The first signal drains, the second ends the process at once; that it drains by itself is no signal."""
        if self._has_signal:
            os._exit(ENDED_AT_ONCE)
        self._has_signal = True
        self.stop()

    async def _start(self) -> Ports:
        settings = self._settings
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):  # also while models are loaded: then it stops after that
            loop.add_signal_handler(number, self._signalled)
        loop.add_signal_handler(signal.SIGHUP, log.info, "SIGHUP is ignored: files are read anew when they change")
        certificates, tokens = self._certificates(), self._tokens()
        self._held = check_ports(settings)  # models take their time
        self._tracing = set_up(os.environ)
        await self._reconciler.start()
        accounts = Accounts(tokens, settings.caller_images, settings.caller_requests_per_s)
        budget = Budget(settings.max_inflight_mib << 20 or memory_bytes() // 4)
        self._admission = admission = Admission(self._metrics, accounts, budget, self._tracing)
        core = Core(self.catalog, settings.max_count, settings.max_count_float32)
        methods = self._methods(core, admission)
        self._health.publish()
        await check_calls(self._health.methods())
        self._grpc = GrpcPort(settings, methods, certificates, LoadReports(self._load) if settings.load_reports else None)
        registry = self._registry if settings.metrics else None
        app = make_app(registry, self._health.not_alive, self._health.not_ready, MAX_BODY_BYTES)
        self._http = HttpPorts(settings, certificates, HTTP_CLEANUP_S)
        await self._http.start(app, self._routes(core, admission), MAX_BODY_BYTES)
        await self._grpc.start()
        self._health.process_not_alive = lambda: self.broken or self._grpc.not_alive()
        self._health.publish()
        self._start_background()
        return Ports(self._grpc.port, self._http.port, self._http.https_port)

    def _methods(self, core: Core, admission: Admission) -> dict[str, Method]:
        """Every method of the gRPC port, by path."""
        status = self._reconciler.status
        tables = [
            DigitService(core, status).table(admission, self._workers),
            OpenInferenceService(core, self._health.not_complete, self._metrics, status).table(admission, self._workers),
        ]
        methods = {path: method for table in tables for path, method in table.methods.items()} | self._health.methods()
        if self._settings.reflection:
            methods |= reflection_methods({*(table.service for table in tables), HEALTH})
        return methods

    def _routes(self, core: Core, admission: Admission) -> list[web.RouteDef]:
        """Every route of the HTTP API and its page."""
        settings = self._settings
        if not settings.http_api:
            return []
        target = address(settings.host, self._grpc.port)
        routes = OpenInferenceHttp(core, admission, self._health.not_complete).routes()
        by_certificate = settings.tls_client_ca is not None
        routes += HttpApi(core, admission, target, self._reconciler.status, by_certificate=by_certificate).routes()
        return routes + page_routes() if settings.page else routes

    def _load(self) -> Load:
        batchers = [model.batcher for model in self.catalog.models()]
        return Load(
            sum(batcher.busy_s for batcher in batchers),
            max((batcher.limits.instances for batcher in batchers), default=1),
            max((batcher.queued_images / batcher.limits.max_queue_images for batcher in batchers), default=0.0),
        )

    def _start_background(self) -> None:
        settings = self._settings
        tasks: dict[str, tuple[float, Callable[[], Awaitable[None]]]] = {
            "watchdog": (self._watch_interval_s, self._watch),
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
        self._when_stopping(settings.drain_grace_s + settings.drain_deadline_s + DRAIN_OVERHEAD_S)
        self._health.draining = True
        self._health.publish()
        await asyncio.sleep(settings.drain_grace_s)
        deadline = time.monotonic() + settings.drain_deadline_s
        await self._admission.close(settings.drain_deadline_s)
        leftovers = await self._reconciler.close(max(0.0, deadline - time.monotonic()))
        for task in self._background:
            task.cancel()
        self._health.end_watches()
        await self._grpc.stop(max(FLUSH_GRACE_S, deadline - time.monotonic()))
        await self._http.stop()
        self._workers.shutdown(wait=False, cancel_futures=True)
        log.info("stopped; %d requests were cancelled by the drain deadline", leftovers)
        if self._tracing is not None:
            with contextlib.suppress(TimeoutError):  # a collector that is silent or gone
                await finished(in_daemon_thread("tracing", self._tracing.shut_down), SPANS_S, "sending spans")

    async def _watch(self) -> None:
        """Look for what hangs. Time that passed while this process was stopped, as a whole, does not count."""
        now = time.monotonic()
        seen_s, self._watched_at = min(now - self._watched_at, 2 * self._watch_interval_s), now
        self._grpc.watch(seen_s)
        self._give_memory_back()
        for model in self.catalog.models():
            model.batcher.watch(seen_s)
            if model.batcher.broken and not self.broken:
                self.broken = model.batcher.broken
                self.stop()
        self._health.publish()

    def _give_memory_back(self) -> None:
        """After much was held, what glibc keeps of it would be taken for a leak, and count against the container's limit."""
        held = self._admission.budget.held_bytes + len(self._grpc.open) * OPEN_CALL_BYTES
        self._most_held = max(self._most_held, held)
        if self._most_held > MUCH_BYTES and held < self._most_held // 4:
            self._most_held = held
            self._workers.submit(give_memory_back)

    async def _self_check(self) -> None:
        await for_each(self.catalog.models(), Model.self_check)
        self._health.publish()

    def _certificates(self) -> tls.Certificates | None:
        cert, key = self._settings.tls_cert, self._settings.tls_key
        if cert is None or key is None:
            return None
        certificates = tls.Certificates(cert, key, self._settings.tls_client_ca, self._note_reload("certificate"))
        certificates.watch()
        return certificates

    def _tokens(self) -> TokenFile | None:
        if self._settings.tokens_file is None:
            return None
        tokens = TokenFile(self._settings.tokens_file, self._note_reload("tokens"))
        tokens.watch()
        return tokens

    def _note_reload(self, what: str) -> Callable[[str], None]:
        self._metrics.access_reloads.labels(what, "failed")  # born at 0, as above all a first failure is to be seen
        return lambda result: self._metrics.access_reloads.labels(what, result).inc()


def _end_process_after(seconds: float) -> None:
    """End the process then, whatever hangs, unless it has ended by itself."""

    def end() -> None:
        log.critical("stopping has taken more than %g s; the process ends now", seconds)
        os._exit(ENDED_LATE)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def serve(settings: Settings, announce: Callable[[Server, Ports], None]) -> None:
    """Run a server to its end in this thread."""

    async def run() -> None:
        await Server(settings, _end_process_after).run(announce)

    # What is imported stays: the garbage collector need not walk through it again and again (5 to 8 % of a request's time).
    # Models come later and are not frozen.
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
    uvloop.run(run())
