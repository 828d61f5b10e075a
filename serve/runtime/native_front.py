"""The gRPC port on pygrpc-native: HTTP/2 and gRPC in Rust, outside the interpreter lock. The extra ``native``.

A thread of its own receives calls in batches; the same method tables as with grpcio answer them. Health and
reflection are handled by a grpcio server behind it, on a Unix socket. ``Settings`` refuses what it cannot do; docs/serving.md has
the differences from grpcio, docs/decisions/0009-fronts.md the reasons.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import grpc

from serve.config.settings import Settings
from serve.errors import StartError
from serve.runtime.front import KEEPALIVE_MS, Services, address, port_taken
from serve.runtime.handling import MAX_REQUEST_BYTES, STOPPING, Call, Handler, Handling, Metadata
from serve.waiting import deferred, until

log = logging.getLogger(__name__)

CALLS_AT_ONCE = 64
FIRST_WAIT_S, MOST_WAIT_S = 0.001, 0.5  # between two tries to send to a caller who has not read enough yet
RESERVED = "grpc-"  # metadata of gRPC's own, which pygrpc-native sends none of: not even grpc-retry-pushback-ms
DETAILS = tuple[Metadata, str, float | None]  # metadata, peer, seconds that remain


class NativeCall(Call):
    """One call by pygrpc-native."""

    __slots__ = ("_front", "_id", "_native", "_peer", "_remaining_s", "_streams")

    def __init__(self, native: Any, front: Any, call_id: int, method: str, details: DETAILS, *, streams: bool) -> None:
        """``native`` is the package, ``front`` its port; ``streams``: the answers are a stream."""
        metadata, self._peer, self._remaining_s = details
        super().__init__(method, metadata)
        self._native, self._front, self._id, self._streams = native, front, call_id, streams

    def peer(self) -> str:
        return self._peer

    def time_remaining(self) -> float | None:
        return self._remaining_s  # when the call came in

    def requests(self) -> NoReturn:
        raise NotImplementedError("streams of requests go to the grpcio server behind")

    async def send(self, message: bytes) -> None:
        """Raises CancelledError when the caller has left."""
        wait_s = FIRST_WAIT_S
        # Not ``stream_send``: a few callers who do not read would hold every thread that others wait for.
        while (sent := self._front.stream_try_send(self._id, message)) == self._native.STREAM_FULL:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MOST_WAIT_S)
        if sent == self._native.STREAM_CLOSED:
            raise asyncio.CancelledError

    def end(self, code: grpc.StatusCode, text: str = "", trailing: Metadata = (), message: bytes | None = None) -> None:
        if code is not grpc.StatusCode.OK:
            sent = [(key, value) for key, value in trailing if not key.startswith(RESERVED)]
            self._front.fail(self._id, code.value[0], text, trailing_metadata=sent)
        elif self._streams:
            self._front.stream_end(self._id)
        else:
            deferred.call(self._front.respond, self._id, message)


class NativeFront:
    """A bound port. Raises StartError when it cannot be had, or what it needs is missing."""

    def __init__(self, settings: Settings, services: Services) -> None:
        try:
            import pygrpc_native as native  # noqa: PLC0415  # an extra
        except ImportError:
            raise StartError("--front native needs the package pygrpc-native: install the extra native") from None
        if services.tracing is not None:
            raise StartError("--front native sends no spans: unset OTEL_EXPORTER_OTLP_ENDPOINT, or use --front grpcio")
        self._native: Any = native
        self._services = services
        self._methods: list[tuple[str, Handler]] = []
        self._handling = Handling(services.stepped)
        self._stopping = False
        self._beside: grpc.aio.Server
        try:
            # ``metrics`` tell when an answer has been written: stopping waits for that.
            self._front: Any = native.NativeGrpcFront(
                address(settings, settings.grpc_port), [], call_details=True, delay_stream_headers=True, metrics=True,
                keepalive_time_ms=KEEPALIVE_MS,
            )  # fmt: skip
        except OSError:
            raise port_taken(settings) from None
        self.port = int(self._front.bound_port)
        self._folder = tempfile.TemporaryDirectory(prefix="digits-serve-")

    async def start(self) -> None:
        self._handling.start()
        self._beside = grpc.aio.server()
        self._services.add_health_and_reflection(self._beside)
        for table in self._services.tables:  # what pygrpc-native's lower layer has no way for
            streams = {name: handler for name, handler in table.methods.items() if handler.request_streaming}
            self._beside.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(table.service, streams),))
        socket = f"{self._folder.name}/grpc"
        self._beside.add_insecure_port(f"unix:{socket}")
        await self._beside.start()
        self._front.set_fallback(socket)
        self._methods = [
            (f"/{table.service}/{name}", handler)
            for table in self._services.tables
            for name, handler in table.methods.items()
            if not handler.request_streaming
        ]
        self._front.add_methods([(method, handler.response_streaming) for method, handler in self._methods])
        self._front.start()
        threading.Thread(target=self._receive, name="grpc-receive", daemon=True).start()

    async def stop(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        self._stopping = True
        await self._beside.stop(grace_s)
        await self._handling.wait(deadline)
        self._handling.cancel_all()
        await until(lambda: not self._unwritten() and not _unsent_bytes(self.port), deadline)
        await asyncio.to_thread(self._front.close)
        self._folder.cleanup()

    def _unwritten(self) -> int:
        """Calls whose answers the kernel does not have yet."""
        methods = self._front.metrics()["methods"].values()
        return sum(each["started"] - sum(ended["count"] for ended in each["status"].values()) for each in methods)

    def _receive(self) -> None:
        """Begin calls as they come; in a thread of its own until the port is closed."""
        while (events := self._front.recv_batch_details(CALLS_AT_ONCE)) is not None:
            for kind, call_id, method, request, _, details in events:
                try:
                    if kind == self._native.EVENT_CALL:
                        self._begin(call_id, self._methods[method], request, details)
                    else:
                        self._handling.leave(call_id)
                except Exception:
                    log.exception("an event of pygrpc-native's could not be handled")

    def _begin(self, call_id: int, named: tuple[str, Handler], request: bytes, details: DETAILS) -> None:
        method, handler = named
        call = NativeCall(self._native, self._front, call_id, method, details, streams=handler.response_streaming)
        if self._stopping:
            call.end(grpc.StatusCode.UNAVAILABLE, STOPPING)
        elif len(request) > MAX_REQUEST_BYTES:
            text = f"the request has {len(request)} bytes, over the limit of {MAX_REQUEST_BYTES}"
            call.end(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        else:
            self._handling.begin(call_id, call, handler, request)


def _unsent_bytes(port: int) -> int:
    """What the kernel has not sent yet on a port's connections: closing them would throw it away. 0 elsewhere than on Linux."""
    unsent = 0
    for table in (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6")):
        with suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                _, local, _, _, queues, *_ = line.split()
                if int(local.rpartition(":")[2], 16) == port:
                    unsent += int(queues.partition(":")[0], 16)
    return unsent
