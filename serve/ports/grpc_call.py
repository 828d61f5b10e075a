"""A call on grpcio's core: reads requests, sends answers and the status."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from serve.ports.handling import Call, Handling, Metadata
from serve.waiting import deferred

NO_DEADLINE = 1e12  # seconds since 1970 that the core gives to a call without one, or more
FLAGS = 0


class GrpcioCall(Call):
    """``requests`` and ``send`` need the event loop; what else there is may be called in any thread."""

    __slots__ = ("_begun", "_call", "_core", "_deadline", "_handling", "_watched", "_watching")

    def __init__(self, core: Any, event: Any, handling: Handling) -> None:
        """``event`` is the core's that tells of the call; ``handling`` is told when its caller has left."""
        super().__init__(event.call_details.method.decode(errors="replace"), event.invocation_metadata)
        self._core = core
        self._handling = handling
        self._call = event.call
        self._deadline = event.call_details.deadline
        self._begun = False  # initial metadata have been sent
        self._watched = False  # whether the core tells when the caller leaves; guarded by the lock
        self._watching = threading.Lock()

    def peer(self) -> str:
        peer: bytes = self._call.peer()
        return peer.decode()

    def time_remaining(self) -> float | None:
        return None if self._deadline > NO_DEADLINE else max(0.0, self._deadline - time.time())

    def watch(self) -> None:
        """Have the core tell when the caller leaves; until it is called nobody is told."""
        if self._to_be_watched():
            self._call.start_server_batch((self._core.ReceiveCloseOnServerOperation(FLAGS),), self._closed)

    def receive(self, received: Callable[[bytes | None], None]) -> None:
        """Have the one request given to ``received``, in the thread of the core's events; None if there is none."""
        operations = (self._core.ReceiveMessageOperation(FLAGS),)
        self._call.start_server_batch(operations, lambda event: received(event.batch_operations[0].message()))

    async def requests(self) -> AsyncIterator[bytes]:
        while True:
            (ended,) = await self._done((self._core.ReceiveMessageOperation(FLAGS),))
            if (message := ended.message()) is None:
                return
            yield message

    async def send(self, message: bytes) -> None:
        await self._done(self._sending(self._core.SendMessageOperation(message, FLAGS)))

    def end(self, code: grpc.StatusCode, text: str = "", trailing: Metadata = (), message: bytes | None = None) -> None:
        core = self._core
        status = core.SendStatusFromServerOperation(trailing or self.trailing, code.value[0], text, FLAGS)
        operations = [status] if message is None else [core.SendMessageOperation(message, FLAGS), status]
        if self._to_be_watched():
            operations.append(core.ReceiveCloseOnServerOperation(FLAGS))  # the core wants every call to ask for it once
        deferred.call(self._call.start_server_batch, self._sending(*operations), _nothing)

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
        return (self._core.SendInitialMetadataOperation(None, FLAGS), *operations)

    def _closed(self, event: Any) -> None:
        """In the thread of the core's events: the caller has its status, or has left."""
        if event.batch_operations[0].cancelled():
            self._handling.leave(self)

    async def _done(self, operations: Sequence[Any]) -> Sequence[Any]:
        """Have the operations done; returns them with their results."""
        waiter: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()

        def done(event: Any) -> None:
            if not waiter.done():
                waiter.set_result(event.batch_operations)

        self._call.start_server_batch(operations, lambda event: self._handling.later(done, event))
        return await waiter


def _nothing(event: Any) -> None:
    """What is sent last is nobody's business."""
