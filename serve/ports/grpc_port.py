"""The gRPC port on grpcio's core, without ``grpc.aio``: one thread receives the core's events and begins calls.

``grpc.aio`` spends more than twice as much on a call (docs/decisions/0013-completion-queue.md). grpcio's own blocking server
uses the same classes of ``cygrpc``, but grpcio guarantees nothing about them: hence the bound on its version, and
``serve.ports.check.check_calls``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import grpc

from serve.access.tls import Certificates
from serve.api.rpc import Method, refused
from serve.api.status import refusal
from serve.background import until
from serve.errors import CallerLeftError, DrainingError, ExpiredError, RequestError, StartError, UnsupportedError
from serve.observability.logs import mute
from serve.ports.grpc_call import GrpcCall, core
from serve.ports.load_report import LoadReports
from serve.ports.open_calls import OpenCalls
from serve.settings import UNIX, Settings

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 4 << 20
STOPPING = "the server is stopping; ask another replica"
# A client may ping every ten seconds, the least that Go's allows; this server pings too, and ends connections of dead peers.
LEAST_PING_MS, KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 5_000, 60_000, 20_000
CONNECTION_AGE_GRACE_S = 60
STREAMS_OF_A_CONNECTION = 1024
# So many calls can come before the thread asks for more; what comes meanwhile waits in the core.
ASKED_FOR = 64
MOST_EVENTS = 3 * ASKED_FOR  # that a call with its request waits for: an answered call has three
# Being told that a caller has left is one more event of the core's, a tenth of a small call: only what takes longer asks for it.
WATCHED_AFTER_S = 0.05
REQUEST_TIMEOUT_S = 10.0  # from a call's beginning until its request is there
END_S = 1.0  # for the core to end what has been cancelled


class GrpcPort:
    """A bound port. Raises StartError when it cannot be had."""

    def __init__(
        self,
        settings: Settings,
        methods: Mapping[str, Method],
        certificates: Certificates | None = None,
        load_reports: LoadReports | None = None,
    ) -> None:
        """``methods`` by path, ``/service/method``."""
        self._methods = methods
        self._load_reports = load_reports
        self._watchdog_s = settings.watchdog_s
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._receive, name="grpc-receive", daemon=True)
        self._lock = threading.Lock()
        self.open = OpenCalls()
        self._tasks: dict[GrpcCall, asyncio.Task[None]] = {}
        self._received: list[tuple[GrpcCall, Method, bytes]] = []  # calls with their requests, to be begun
        self._asked = 0  # calls that may come
        self._busy_since: float | None = None  # time.monotonic(); while the thread does something with an event
        self._watched: float | None = None  # that time as the watchdog saw it last, and for how long it has
        self._watched_s = 0.0
        self._to_be_watched = False  # whether a call of ``_watch`` is due
        self._stopping = False
        self._shut_down = False  # guarded by the lock: no call may be asked for afterwards
        options = [
            ("grpc.so_reuseport", 0),  # a second process on the port must fail
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.max_concurrent_streams", STREAMS_OF_A_CONNECTION),
            ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PING_MS),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", LEAST_PING_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ]
        if settings.max_connection_age_s:
            options += [
                ("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1000)),
                ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_S * 1000),
            ]
        # The core logs a traceback, with its value, for each metadatum that is not UTF-8.
        mute("grpc._cython.cygrpc", "metadata of a call that are not UTF-8 have been ignored")
        where = address(settings.host, settings.grpc_port).encode()
        # grpcio's own server takes its credentials apart in the same way.
        credentials = (certificates.credentials()._credentials,) if certificates else ()  # type: ignore[attr-defined]
        try:
            self._queue = core.CompletionQueue()
            self._server = core.Server(options, False)
            self._server.register_completion_queue(self._queue)
            self.port: int = self._server.add_http2_port(where, *credentials)
        except (AttributeError, TypeError) as error:
            raise StartError(f"grpcio {grpc.__version__} has another core ({error}); install grpcio >=1.85.1,<1.86") from None
        if self.port == 0:
            raise port_taken(settings)

    async def start(self) -> None:
        """Answer calls from now on."""
        self._loop = asyncio.get_running_loop()
        self._server.start()
        for _ in range(ASKED_FOR):
            self._ask()
        self._thread.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, wait until every answer is sent, and cut off what is not after ``grace_s``."""
        deadline = time.monotonic() + grace_s
        self._stopping = True
        # Once it is shut down the core cancels what still comes; until there is nothing left to wait for, it can be refused.
        await until(lambda: not self.open, deadline)
        ended = threading.Event()
        with self._lock:
            self._shut_down = True
            self._server.shutdown(self._queue, lambda _: ended.set())
        # Connections end by themselves once they have sent what they hold, but for those of peers that do not answer.
        await until(ended.is_set, deadline if self.open.sending else min(deadline, time.monotonic() + END_S))
        for task in list(self._tasks.values()):
            task.cancel()
        self._server.cancel_all_calls()
        await until(lambda: ended.is_set() and not self.open and not self._tasks, time.monotonic() + END_S)
        if not ended.is_set() or self.open:
            log.error("%d gRPC calls could not be ended", len(self.open))
            return
        self._server.destroy()
        self._queue.shutdown()
        await until(lambda: not self._thread.is_alive(), time.monotonic() + END_S)

    def not_alive(self) -> str | None:
        """Why no call is received any more; None when calls are."""
        if self._shut_down:
            return None
        if not self._thread.is_alive():
            return "the thread that receives gRPC calls has ended"
        if self._watched_s > self._watchdog_s:
            return f"the thread that receives gRPC calls has hung for more than {self._watchdog_s:g} s"
        return None if self._asked else "the gRPC port accepts no calls any more"

    def watch(self, seen_s: float) -> None:
        """Look whether the thread hangs, and end the calls whose request does not come. On the event loop, every second or so.

        ``seen_s``: the time since the last call, as far as the process was running.
        """
        busy_since = self._busy_since
        self._watched_s = 0.0 if busy_since is None or busy_since != self._watched else self._watched_s + seen_s
        self._watched = busy_since
        now = time.monotonic()
        for call in self.open.all():
            if not call.received and now - call.begun_at > REQUEST_TIMEOUT_S:
                call.received = True
                self._end(call, ExpiredError(f"no request has come within {REQUEST_TIMEOUT_S:g} s"))

    # In the thread of the core's events.

    def _receive(self) -> None:
        """Give each of the core's events to whom it belongs; a thread of its own until the port is closed.

        Calls are begun together, once no more come, but after some events at the latest: a caller who resets one call after the
        other makes events without end.
        """
        events = 0  # since the first of those that wait was received
        while True:
            self._busy_since = None
            event = self._queue.poll(0.0 if self._received else None)
            self._busy_since = time.monotonic()
            if event.completion_type == core.CompletionType.queue_shutdown:
                return
            try:
                if event.tag is not None:
                    event.tag(event)
            except Exception:
                log.exception("an event of grpcio's core could not be handled")
            if self._received:
                events += 1
                if event.tag is None or events >= MOST_EVENTS:
                    received, self._received, events = self._received, [], 0
                    for call, method, request in received:
                        self._begin(call, method, request)
                    del received, call, method, request
            del event  # what it holds of an ended call must not outlive the next wait

    def _ask(self) -> None:
        """Ask the core for one more call."""
        with self._lock:
            if not self._shut_down:
                self._server.request_call(self._queue, self._queue, self._called)
                self._asked += 1

    def _called(self, event: Any) -> None:
        """A call has come, or the server is shut down."""
        self._asked -= 1
        self._ask()  # before anything else, which may raise: a port that asks for no calls is deaf
        if not event.success:
            return
        call = None
        try:
            call = GrpcCall(event, self._loop, self.open.remove, self._load_reports)
            self._accept(call)
        except Exception:
            log.exception("a call could not be accepted")
            event.call.cancel(grpc.StatusCode.INTERNAL.value[0], "the call could not be accepted")
            if call is not None:
                self.open.remove(call)

    def _accept(self, call: GrpcCall) -> None:
        method = self._methods.get(call.method)
        too_many = self.open.add(call)
        if self._stopping:
            self._end(call, DrainingError(STOPPING))
        elif too_many is not None:
            self._end(call, too_many)
        elif method is None:
            self._end(call, UnsupportedError(f"there is no method {call.method[:200]}"))
        elif method.streams_requests:
            call.received = True
            self._begin(call, method, None)
        else:
            call.receive(partial(self._has_request, call, method))

    def _has_request(self, call: GrpcCall, method: Method, event: Any) -> None:
        """The request of a call with one request has come, or there is none."""
        request: bytes | None = event.batch_operations[0].message()
        if call.received:  # it has been ended: the request came too late
            return
        call.received = True
        if request is None:
            self._end(call, RequestError("the call has no request", ""))
        else:
            self._received.append((call, method, request))

    def _begin(self, call: GrpcCall, method: Method, request: bytes | None) -> None:
        try:
            if method.begin is not None:
                assert request is not None
                method.begin(call, request)
            else:
                self._loop.call_soon_threadsafe(self._begin_task, call, method, request)
        except Exception as error:
            self._end(call, error)
        if not self._to_be_watched:
            self._to_be_watched = True
            self._loop.call_soon_threadsafe(self._loop.call_later, WATCHED_AFTER_S, self._watch)

    def _end(self, call: GrpcCall, error: Exception) -> None:
        """Give a call the status of an error unless it has one: without, its caller would wait for ever."""
        try:
            answer = refusal(error)
            if not call.ended:
                refused(call, answer)()
        except Exception:
            log.exception("a call could not be given its status")

    # On the event loop.

    def _begin_task(self, call: GrpcCall, method: Method, request: bytes | None) -> None:
        assert method.task is not None
        if call.has_left:
            self._end(call, CallerLeftError("the caller has left"))
            return
        task = self._tasks[call] = self._loop.create_task(self._answer(call, method.task(call, request)))
        call.when_left(lambda: self._loop.call_soon_threadsafe(task.cancel))

    async def _answer(self, call: GrpcCall, answer: Any) -> None:
        """Run a method's task to its end."""
        try:
            await answer
        except asyncio.CancelledError:
            self._end(call, CallerLeftError("the caller has left, or the server has stopped"))
            raise
        except Exception as error:
            self._end(call, error)
        finally:
            del self._tasks[call]

    def _watch(self) -> None:
        """Notice from here on when the callers of what is open leave."""
        self._to_be_watched = False
        for call in self.open.all():
            call.watch()


def address(host: str, port: int) -> str:
    """``host:port``, as gRPC reads it: ``[::1]:50051`` for an IPv6 address, and a Unix socket's path without a port."""
    if host.startswith(UNIX):
        return host
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def port_taken(settings: Settings) -> StartError:
    """What to raise when the port cannot be had."""
    return StartError(f"--grpc-port {settings.grpc_port} on {settings.host} cannot be had; name another")
