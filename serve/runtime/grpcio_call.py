"""One call by grpcio's core: its request in, its answers and status out, and what its handler may ask of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn, Protocol

import grpc

from serve.runtime.front import CallAbortedError, Metadata

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


class GrpcioCall:
    """A call, and as much of grpcio's ``ServicerContext`` as this server's handlers, health and reflection ask for.

    Made in the thread of the core's events; ``receive`` and ``end`` may be called there too, all else on the event loop.
    """

    __slots__ = ("_begun", "_call", "_core", "_deadline", "_front", "_metadata", "_trailing", "left", "method", "write_with")

    def __init__(self, core: Any, event: Any, front: Front) -> None:
        """``event`` is the core's that tells of the call."""
        self._core = core
        self._front = front
        self._call = event.call
        self._metadata = event.invocation_metadata
        self._deadline = event.call_details.deadline
        self._trailing: Metadata = ()
        self._begun = False  # initial metadata have been sent
        self.left = False  # the caller has
        self.method: str = event.call_details.method.decode(errors="replace")
        self.write_with: Callable[[Any], bytes] = bytes
        self._call.start_server_batch((core.ReceiveCloseOnServerOperation(FLAGS),), self._closed)

    def invocation_metadata(self) -> Metadata:
        metadata: Metadata = self._metadata
        return metadata

    def peer(self) -> str:
        peer: bytes = self._call.peer()
        return peer.decode()

    def time_remaining(self) -> float | None:
        """In seconds; None without a deadline."""
        return None if self._deadline > NO_DEADLINE else max(0.0, self._deadline - time.time())

    def set_trailing_metadata(self, trailing: Metadata) -> None:
        self._trailing = trailing

    async def abort(self, code: grpc.StatusCode, text: str = "", trailing: Metadata = ()) -> NoReturn:
        raise CallAbortedError(code, text, trailing or self._trailing)

    async def write(self, response: Any) -> None:
        """Send one answer of a stream; returns when the core has room for the next."""
        core = self._core
        operations = [core.SendMessageOperation(self.write_with(response), FLAGS)]
        if not self._begun:
            self._begun = True
            operations.insert(0, core.SendInitialMetadataOperation(None, FLAGS))
        await self._done(operations)

    async def requests(self, read: Callable[[bytes], Any]) -> AsyncIterator[Any]:
        """The requests of a stream, until the caller sends no more."""
        while True:
            operation = self._core.ReceiveMessageOperation(FLAGS)
            (ended,) = await self._done((operation,))
            if (message := ended.message()) is None:
                return
            yield read(message)

    def receive(self, received: Callable[[bytes | None], None]) -> None:
        """Have the one request given to ``received``, in the thread of the core's events; None if there is none."""
        self._call.start_server_batch(
            (self._core.ReceiveMessageOperation(FLAGS),), lambda event: received(event.batch_operations[0].message())
        )

    def end(self, code: grpc.StatusCode, text: str = "", trailing: Metadata = (), message: bytes | None = None) -> None:
        """Send the only answer, if there is one, and the status."""
        core = self._core
        operations = [core.SendStatusFromServerOperation(trailing or self._trailing, code.value[0], text, FLAGS)]
        if message is not None:
            operations.insert(0, core.SendMessageOperation(message, FLAGS))
        if not self._begun:
            operations.insert(0, core.SendInitialMetadataOperation(None, FLAGS))
        self._call.start_server_batch(operations, _nothing)

    def _closed(self, event: Any) -> None:
        """In the thread of the core's events: the caller has its status, or has left."""
        if event.batch_operations[0].cancelled():
            self.left = True
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
