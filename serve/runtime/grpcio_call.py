"""One call by grpcio's core: what its operations are for a request, an answer, a status."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import grpc

from serve.runtime.handling import Call, Metadata

NO_DEADLINE = 1e12  # seconds since 1970 that the core gives to a call without one, or more
FLAGS = 0


class Front(Protocol):
    """The port that the call came by."""

    def later(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call the function on the event loop; from any thread."""
        ...

    def leave(self, call: GrpcioCall) -> None:
        """The caller has left; on the event loop."""
        ...


class GrpcioCall(Call):
    """Made in the thread of the core's events; ``receive`` and ``end`` may be called there too, all else on the event loop."""

    __slots__ = ("_begun", "_call", "_core", "_deadline", "_front", "_watched")

    def __init__(self, core: Any, event: Any, front: Front) -> None:
        """``event`` is the core's that tells of the call."""
        super().__init__(event.call_details.method.decode(errors="replace"), event.invocation_metadata)
        self._core = core
        self._front = front
        self._call = event.call
        self._deadline = event.call_details.deadline
        self._begun = False  # initial metadata have been sent
        self._watched = False  # whether the core tells when the caller leaves

    def peer(self) -> str:
        peer: bytes = self._call.peer()
        return peer.decode()

    def time_remaining(self) -> float | None:
        return None if self._deadline > NO_DEADLINE else max(0.0, self._deadline - time.time())

    def watch(self) -> None:
        """Have the core tell when the caller leaves; until it is called nobody is told. On the event loop."""
        if not self._watched:
            self._watched = True
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
        if not self._watched:
            operations.append(core.ReceiveCloseOnServerOperation(FLAGS))  # the core wants every call to ask for it once
        self._call.start_server_batch(self._sending(*operations), _nothing)

    def _sending(self, *operations: Any) -> Sequence[Any]:
        """The operations, after the initial metadata if they are the call's first."""
        if self._begun:
            return operations
        self._begun = True
        return (self._core.SendInitialMetadataOperation(None, FLAGS), *operations)

    def _closed(self, event: Any) -> None:
        """In the thread of the core's events: the caller has its status, or has left."""
        if event.batch_operations[0].cancelled():
            self._front.later(self._front.leave, self)

    async def _done(self, operations: Sequence[Any]) -> Sequence[Any]:
        """Have the operations done; returns them with their results."""
        waiter: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()

        def done(event: Any) -> None:
            if not waiter.done():
                waiter.set_result(event.batch_operations)

        self._call.start_server_batch(operations, lambda event: self._front.later(done, event))
        return await waiter


def _nothing(event: Any) -> None:
    """What is sent last is nobody's business."""
