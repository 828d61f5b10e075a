"""A call on grpcio's core: reads requests, sends answers and the status (``serve.api.rpc.Wire``)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import import_module
from typing import Any

import grpc

from serve.api.rpc import Metadata
from serve.batching.ticket import Send
from serve.ports.load_report import METADATA_KEY, LoadReports

core: Any = import_module("grpc._cython.cygrpc")

NO_DEADLINE = 1e12  # seconds since 1970 that the core gives to a call without one, or more
FLAGS = 0
FAULTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)  # the server's own, for which clients turn to another
NUMBERS = {code: code.value[0] for code in grpc.StatusCode}  # an enumeration's own look-up takes half a microsecond


class GrpcCall:
    """``requests`` and ``send`` need the event loop; what else there is may be called in any thread."""

    __slots__ = (
        "_begun", "_call", "_details", "_left", "_load_reports", "_loop", "_over", "_sent", "_watched", "_watching", "begun_at",
        "counted_for", "ended", "has_left", "metadata", "method", "received", "sent_bytes",
    )  # fmt: skip

    def __init__(
        self,
        event: Any,
        loop: asyncio.AbstractEventLoop,
        over: Callable[[GrpcCall], None],
        load_reports: LoadReports | None = None,
    ) -> None:
        """``event`` is the core's that tells of the call; ``over`` is called when its status has been sent or cannot be."""
        self.method: str = event.call_details.method.decode(errors="replace")
        self.metadata: Metadata = event.invocation_metadata
        self.begun_at = time.monotonic()
        self.received = False  # whether its request is there
        self.has_left = False
        self.ended = False  # whether it has been given its status
        self.sent_bytes = 0
        self.counted_for = ""  # the address that it is counted for
        self._call = event.call
        self._details = event.call_details
        self._loop = loop
        self._over = over
        self._load_reports = load_reports
        self._begun = False  # initial metadata have been sent
        self._sent: Callable[[], None] | None = None
        self._left: Callable[[], object] | None = None
        self._watched = False  # whether the core tells when the caller leaves; guarded by the lock
        self._watching = threading.Lock()

    def peer(self) -> str:
        """The caller's address, as ``ipv4:127.0.0.1:5000``."""
        peer: bytes = self._call.peer()
        return peer.decode(errors="replace")

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None without one."""
        deadline: float = self._details.deadline
        return None if deadline > NO_DEADLINE else max(0.0, deadline - time.time())

    def authority(self) -> str:
        """The server's name and port as the caller has them."""
        host: bytes = self._details.host
        return host.decode(errors="replace")

    def when_over(self, sent: Callable[[], None]) -> None:
        """Have ``sent`` called once when the status has been sent or cannot be."""
        self._sent = sent

    def when_left(self, left: Callable[[], object]) -> None:
        """Have ``left`` called if the caller leaves before the answer, or has left already."""
        self._left = left
        if self.has_left:
            left()

    def leave(self) -> None:
        """The caller has left, or the server gives the call up."""
        self.has_left = True
        if self._left is not None:
            self._left()

    def cancel(self) -> None:
        """End the call from the server's side, whatever has not been sent."""
        self._call.cancel(grpc.StatusCode.CANCELLED.value[0], "given up")

    def watch(self) -> None:
        """Have the core tell when the caller leaves; until this is called nobody is told."""
        if self._to_be_watched():
            self._call.start_server_batch((core.ReceiveCloseOnServerOperation(FLAGS),), self._closed)

    def receive(self, received: Callable[[Any], None]) -> None:
        """Have the core's event of the one request given to ``received``, in the thread of the core's events."""
        self._call.start_server_batch((core.ReceiveMessageOperation(FLAGS),), received)

    async def requests(self) -> AsyncIterator[bytes]:
        """The requests of a stream, until the caller sends no more."""
        while True:
            (ended,) = await self._done((core.ReceiveMessageOperation(FLAGS),))
            if (message := ended.message()) is None:
                return
            yield message

    async def send(self, message: bytes) -> None:
        """Send one answer of a stream; waits while the caller is behind. Raises CancelledError when it has left."""
        self.sent_bytes += len(message)
        await self._done(self._sending(core.SendMessageOperation(message, FLAGS)))

    def ending(self, code: grpc.StatusCode, text: str = "", trailing: Metadata = (), message: bytes | None = None) -> Send:
        """What sends the only answer, if there is one, and the status."""
        self.ended = True
        if self._load_reports is not None and (code is grpc.StatusCode.OK or code in FAULTS):
            trailing = (*trailing, (METADATA_KEY, self._load_reports.answered(failed=code in FAULTS)))
        status = core.SendStatusFromServerOperation(trailing, NUMBERS[code], text, FLAGS)
        operations = [status]
        if message is not None:
            self.sent_bytes += len(message)
            operations.insert(0, core.SendMessageOperation(message, FLAGS))
        if self._to_be_watched():
            operations.append(core.ReceiveCloseOnServerOperation(FLAGS))  # the core wants every call to ask for it once
        sending = self._sending(*operations)
        return lambda: self._call.start_server_batch(sending, self._ended)

    def _to_be_watched(self) -> bool:
        """True once: the core takes no second operation of that kind, and refuses all that come with it."""
        with self._watching:
            watched, self._watched = self._watched, True
            return not watched

    def _sending(self, *operations: Any) -> Sequence[Any]:
        """The operations, after the initial metadata if they are the call's first."""
        if self._begun:
            return operations
        self._begun = True
        return (core.SendInitialMetadataOperation(None, FLAGS), *operations)

    # In the thread of the core's events.

    def _closed(self, event: Any) -> None:
        """The caller has its status, or has left."""
        if event.batch_operations[0].cancelled():
            self.leave()

    def _ended(self, event: Any) -> None:
        """The status has been sent, or there is nobody to send it to."""
        self._left = None
        sent, self._sent = self._sent, None
        if sent is not None:
            sent()
        self._over(self)

    async def _done(self, operations: Sequence[Any]) -> Sequence[Any]:
        """Have the operations done; returns them with their results. Raises CancelledError when they could not be."""
        waiter: asyncio.Future[Sequence[Any] | None] = self._loop.create_future()

        def settle(event: Any) -> None:
            if not waiter.done():
                waiter.set_result(event.batch_operations if event.success else None)

        self._call.start_server_batch(operations, lambda event: self._loop.call_soon_threadsafe(settle, event))
        if (done := await waiter) is None:
            raise asyncio.CancelledError("the caller has left")
        return done
