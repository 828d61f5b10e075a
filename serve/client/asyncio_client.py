"""The client for asyncio: ``DigitClient``'s calls, to be awaited.

async with AsyncDigitClient("localhost:50051") as client:
    digits = await client.generate(count=25, seed=7)
    async for part in client.stream(1_000_000, seed=7):
        ...
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from serve.client.calls import Calls
from serve.client.channel import CONNECT_S, PLAIN, Access
from serve.client.client import DEFAULT_TIMEOUT_S, pause_after
from serve.client.diagnosis import failure_of, why_unreachable
from serve.client.digits import Digits
from serve.client.errors import DigitError, timeout
from serve.client.streaming import Progress
from serve.client.target import DEFAULT_TARGET
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc


class AsyncDigitClient(
    Calls[
        Awaitable[Digits],
        AsyncIterator[Digits],
        Awaitable[NDArray[np.float32]],
        Awaitable[pb.ListModelsResponse],
        Awaitable[pb.GetModelResponse],
    ]
):
    """``DigitClient`` for asyncio, with the same arguments. It belongs to the event loop in which it was made."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        access: Access = PLAIN,
        *,
        wait_for_server: bool = True,
    ) -> None:
        """As ``DigitClient``."""
        self._target, self._access, self._timeout_s = target, access, timeout(timeout_s)
        self._options: dict[str, Any] = {"metadata": access.metadata, "wait_for_ready": wait_for_server}
        self._channel = access.open_asyncio_channel(target)
        self._stub = pb_grpc.DigitGeneratorStub(self._channel)
        self._connected = not wait_for_server
        self._closed = False

    async def close(self) -> None:
        self._closed = True
        await self._channel.close()

    async def __aenter__(self) -> AsyncDigitClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _ask(self, method: str, request: Any, read: Callable[[Any], Any]) -> Any:
        """As in ``DigitClient``."""
        deadline = time.monotonic() + self._timeout_s
        await self._connect()
        attempt = 0
        while True:
            attempt += 1
            try:
                return read(await getattr(self._stub, method)(request, timeout=deadline - time.monotonic(), **self._options))
            except asyncio.CancelledError:
                self._check_open()
                raise
            except grpc.RpcError as error:
                pause_s = None if self._closed else pause_after(error, attempt)
                if pause_s is None or time.monotonic() + pause_s > deadline:
                    raise await self._failure(error) from None
                await asyncio.sleep(pause_s)

    async def _stream(self, progress: Progress) -> AsyncIterator[Digits]:
        while (request := progress.rest) is not None:
            await self._connect()
            call = self._stub.GenerateStream(request, **self._options)
            try:
                while (response := await asyncio.wait_for(call.read(), self._timeout_s)) is not grpc.aio.EOF:
                    yield progress.take(response)
            except asyncio.CancelledError:
                self._check_open()
                raise
            except TimeoutError as error:
                raise await self._failure(error) from None
            except grpc.RpcError as error:
                await asyncio.sleep(progress.pause_after(await self._failure(error), self._timeout_s))
            finally:
                call.cancel()

    async def _connect(self) -> None:
        """As in ``DigitClient``."""
        self._check_open()
        if self._connected:
            return
        try:
            await asyncio.wait_for(self._channel.channel_ready(), min(CONNECT_S, self._timeout_s))
            self._connected = True
        except TimeoutError:
            if reason := await asyncio.to_thread(why_unreachable, self._target, self._access):
                raise DigitError(grpc.StatusCode.UNAVAILABLE, reason) from None

    def _check_open(self) -> None:
        """gRPC cancels the calls of a channel that is closed, and their tasks are not cancelled by anybody."""
        task = asyncio.current_task()
        if self._closed and not (task and task.cancelling()):
            raise DigitError(grpc.StatusCode.CANCELLED, "the client is closed") from None

    async def _failure(self, error: grpc.RpcError | TimeoutError) -> DigitError:
        return await asyncio.to_thread(failure_of, error, self._target, self._access, self._timeout_s)
