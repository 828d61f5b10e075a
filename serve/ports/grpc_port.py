"""The gRPC port on grpcio's core, without ``grpc.aio``: one thread receives the core's events and begins calls.

``grpc.aio`` spends more than twice as much on a call (docs/decisions/0013-completion-queue.md). grpcio's own blocking server
uses the same classes of ``cygrpc``, but grpcio guarantees nothing about them: hence ``_core``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import grpc

from serve.access.tls import Certificates
from serve.errors import StartError
from serve.ports.front import KEEPALIVE_MS, Services, address, port_taken
from serve.ports.grpc_call import GrpcioCall
from serve.ports.handling import MAX_REQUEST_BYTES, STOPPING, CallDetails, Handler, Handling, Metadata
from serve.settings import Settings
from serve.waiting import deferred

log = logging.getLogger(__name__)

CONNECTION_AGE_GRACE_S = 60
# So many calls can come before the thread asks for more; what comes meanwhile waits in the core.
ASKED_FOR = 64
# Being told that a caller has left is one more event of the core's, a tenth of a small call: only what takes longer asks for it.
WATCHED_AFTER_S = 0.05
NEEDED = (
    "CompletionQueue", "CompletionType", "ReceiveCloseOnServerOperation", "ReceiveMessageOperation",
    "SendInitialMetadataOperation", "SendMessageOperation", "SendStatusFromServerOperation", "Server",
)  # fmt: skip


class GrpcPort:
    """A bound port. Raises StartError when it cannot be had."""

    def __init__(self, settings: Settings, services: Services, certificates: Certificates | None) -> None:
        self._core = _core()
        self._handling = Handling(services.stepped, services.tracing.interceptor if services.tracing else None)
        self._handlers = Handlers()
        services.add_to(self._handlers)
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._receive, name="grpc-receive", daemon=True)
        self._lock = threading.Lock()
        self._received: list[tuple[GrpcioCall, Handler, bytes | None]] = []  # with their requests, to be begun
        self._to_be_watched = False  # whether a call of ``_watch`` is due
        self._stopping = False
        self._shut_down = False  # guarded by the lock: no call may be asked for afterwards
        options = [
            ("grpc.so_reuseport", 0),  # a second process on the port must fail
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        if settings.max_connection_age_s:
            options += [
                ("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1000)),
                ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE_S * 1000),
            ]
        self._queue = self._core.CompletionQueue()
        self._server = self._core.Server(options, False)
        self._server.register_completion_queue(self._queue)
        where = address(settings, settings.grpc_port).encode()
        # grpcio's own server takes its credentials apart in the same way.
        credentials = (certificates.credentials()._credentials,) if certificates else ()  # type: ignore[attr-defined]
        self.port: int = self._server.add_http2_port(where, *credentials)
        if self.port == 0:
            raise port_taken(settings)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._handling.start()
        self._server.start()
        for _ in range(ASKED_FOR):
            self._server.request_call(self._queue, self._queue, self._called)
        self._thread.start()

    async def stop(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        self._stopping = True
        # Once it is shut down the core cancels what still comes; until there is nothing left to wait for, it can be refused.
        await self._handling.wait(deadline)
        ended = self._loop.create_future()
        with self._lock:
            self._shut_down = True
            self._server.shutdown(self._queue, lambda _: self._handling.later(ended.set_result, None))
        if not (await asyncio.wait((ended,), timeout=max(0.0, deadline - time.monotonic())))[0]:
            self._server.cancel_all_calls()
            await ended
        await self._handling.wait()
        self._server.destroy()
        self._queue.shutdown()
        await asyncio.to_thread(self._thread.join)

    # In the thread of the core's events.

    def _receive(self) -> None:
        """Give each of the core's events to whom it belongs; a thread of its own until the port is closed.

        Calls are begun together, once no more come.
        """
        while True:
            event = self._queue.poll(0.0 if self._received else None)
            if event.completion_type == self._core.CompletionType.queue_shutdown:
                return
            try:
                if event.tag is not None:
                    event.tag(event)
                if event.tag is None or len(self._received) >= ASKED_FOR:
                    self._begin_received()
            except Exception:
                log.exception("an event of gRPC's could not be handled")
            del event  # what it holds of an ended call must not outlive the next wait

    def _begin_received(self) -> None:
        received, self._received = self._received, []
        with deferred:
            for call, handler, message in received:
                self._begin(call, handler, message)

    def _called(self, event: Any) -> None:
        """A call has come, or the server is shut down."""
        if not event.success:
            return
        call = GrpcioCall(self._core, event, self._handling)
        with self._lock:
            if not self._shut_down:
                self._server.request_call(self._queue, self._queue, self._called)
        if self._stopping:
            call.end(grpc.StatusCode.UNAVAILABLE, STOPPING)
            return
        handler = self._handlers.find(call.method, event.invocation_metadata)
        if handler is None:
            call.end(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {call.method[:200]}")
        elif handler.request_streaming:
            self._begin(call, handler, None)
        else:
            call.receive(lambda message: self._received.append((call, handler, message)))

    def _begin(self, call: GrpcioCall, handler: Handler, message: bytes | None) -> None:
        if message is None and not handler.request_streaming:
            call.end(grpc.StatusCode.INVALID_ARGUMENT, "the call has no request")
            return
        self._handling.begin(call, call, handler, message)
        if not self._to_be_watched:
            self._to_be_watched = True
            self._handling.later(self._loop.call_later, WATCHED_AFTER_S, self._watch)

    # On the event loop.

    def _watch(self) -> None:
        """Notice from here on when the callers of what is at work leave."""
        self._to_be_watched = False
        for call in self._handling.at_work:
            call.watch()


class Handlers:
    """The methods that are served, added as to a server of grpcio's."""

    def __init__(self) -> None:
        self._services: list[grpc.GenericRpcHandler] = []
        self._found: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._services += handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Leave them out: the generic handlers cover them."""

    def find(self, method: str, metadata: Metadata) -> Handler | None:
        """What answers a method; None when nothing does."""
        if method not in self._found:
            for service in self._services:
                if handler := service.service(CallDetails(method, metadata)):
                    self._found[method] = handler
        return self._found.get(method)


def _core() -> Any:
    """grpcio's core as Python sees it. Raises StartError when this grpcio has another one."""
    try:
        core = import_module("grpc._cython.cygrpc")
    except ImportError:
        missing = "grpc._cython.cygrpc"
    else:
        missing = ", ".join(name for name in NEEDED if not hasattr(core, name))
    if missing:
        raise StartError(f"grpcio {grpc.__version__} has no {missing}; install grpcio 1.85")
    return core
