"""A call as the gRPC port hands it to a method, without a port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from serve.api.rpc import Metadata

TIMEOUT_S = 60.0


class FakeWire:
    """Keeps what it is answered. ``streamed`` requests are those of a stream; ``most`` answers of a stream are taken."""

    def __init__(self, token: str = "", streamed: tuple[bytes, ...] = (b"",), most: int = 1 << 30) -> None:
        self.metadata: Metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.code: grpc.StatusCode | None = None
        self.text = ""
        self.answers: list[bytes] = []
        self.over = threading.Event()
        self._streamed = streamed
        self._most = most
        self._sent: Callable[[], None] = _nothing

    def peer(self) -> str:
        return "ipv4:192.0.2.1:1234"

    def authority(self) -> str:
        return "digits.test:50051"

    def time_remaining(self) -> None:
        return None

    def when_over(self, sent: Callable[[], None]) -> None:
        self._sent = sent

    def when_left(self, left: Callable[[], object]) -> None:
        pass

    def ending(self, code: grpc.StatusCode, text: str = "", trailing: object = (), message: bytes | None = None) -> Any:
        def send() -> None:
            assert self.code is None, "a call was ended twice"
            self.code, self.text = code, text
            self.answers += [] if message is None else [message]
            sent, self._sent = self._sent, _nothing  # it holds the call, which holds this
            sent()
            self.over.set()

        return send

    async def send(self, message: bytes) -> None:
        self.answers.append(message)
        if len(self.answers) >= self._most:
            raise asyncio.CancelledError  # its reader has left

    async def requests(self) -> AsyncIterator[bytes]:
        for request in self._streamed:
            yield request

    def ended(self) -> grpc.StatusCode:
        """Wait for the status."""
        assert self.over.wait(TIMEOUT_S), "a call hangs"
        assert self.code is not None
        return self.code


class SlowWire(FakeWire):
    """A caller who takes its answer late: until ``taken`` is called it lies with the core."""

    taken: Callable[[], None]

    def when_over(self, sent: Callable[[], None]) -> None:
        self.taken = sent


def _nothing() -> None:
    pass
