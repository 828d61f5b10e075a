"""A small typed client: returns numpy arrays, bounds every call in time, and retries through gRPC's own service config.

    with DigitClient("localhost:50051") as client:
        digits = client.generate(count=25, seed=7)
        digits.pixels  # uint8 (25, 28, 28)
        sevens = client.generate(count=5, seed=7, labels=7)

``python -m serve.client`` is its command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextvars import copy_context
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from serve.client.calls import Calls
from serve.client.channel import CONNECT_S, PLAIN, Access
from serve.client.diagnosis import failure_of, why_unreachable
from serve.client.digits import Digits
from serve.client.errors import DigitError, retry_after_s, timeout
from serve.client.streaming import Progress
from serve.client.target import DEFAULT_TARGET
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc

DEFAULT_TIMEOUT_S = 30.0
DROPPED_BACKOFF_S = 0.5
ATTEMPTS = 5  # of a call that an overloaded server refuses


class DigitClient(Calls[Digits, Iterator[Digits], NDArray[np.float32], pb.ListModelsResponse, pb.GetModelResponse]):
    """A connection to one or more replicas. Calls raise ``DigitError``; threads may share a client."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        access: Access = PLAIN,
        *,
        wait_for_server: bool = True,
    ) -> None:
        """``timeout_s`` bounds each call, and in a stream the time between two chunks.

        A server that cannot be reached is waited for: 5 s before the first call, later within the call's time, so that its
        restart fails no call. Without ``wait_for_server`` a call fails within seconds. Raises DigitError for a ``target`` that is
        none, and when a file that ``access`` names cannot be read.
        """
        self._target, self._access, self._timeout_s = target, access, timeout(timeout_s)
        self._options: dict[str, Any] = {"metadata": access.metadata, "wait_for_ready": wait_for_server}
        self._channel = access.open_channel(target)
        self._stub = pb_grpc.DigitGeneratorStub(self._channel)
        self._connected = not wait_for_server  # then a call tells by itself, and at once
        self._closed = False

    def close(self) -> None:
        self._closed = True
        self._channel.close()

    def __enter__(self) -> DigitClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ask(self, method: str, request: Any, read: Callable[[Any], Any]) -> Any:
        """One call, tried again within its deadline where that may help."""
        deadline = time.monotonic() + self._timeout_s
        self._connect()
        attempt = 0
        while True:
            attempt += 1
            try:
                return read(getattr(self._stub, method)(request, timeout=deadline - time.monotonic(), **self._options))
            except grpc.RpcError as error:
                pause_s = None if self._closed else pause_after(error, attempt)
                if pause_s is None or time.monotonic() + pause_s > deadline:
                    raise self._failure(error) from None
                time.sleep(pause_s)

    def _stream(self, progress: Progress) -> Iterator[Digits]:
        while (request := progress.rest) is not None:
            self._connect()
            try:
                for response in _bounded(self._stub.GenerateStream(request, **self._options), self._timeout_s):
                    yield progress.take(response)
            except TimeoutError as error:
                raise self._failure(error) from None
            except grpc.RpcError as error:
                time.sleep(progress.pause_after(self._failure(error), self._timeout_s))

    def _connect(self) -> None:
        """Before the first call: wait for a connection for so long only as it may still come about."""
        if self._closed:
            raise DigitError(grpc.StatusCode.CANCELLED, "the client is closed")
        if self._connected:
            return
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(min(CONNECT_S, self._timeout_s))
            self._connected = True
        except grpc.FutureTimeoutError:
            ready.cancel()
            if reason := why_unreachable(self._target, self._access):
                raise DigitError(grpc.StatusCode.UNAVAILABLE, reason) from None

    def _failure(self, error: grpc.RpcError | TimeoutError) -> DigitError:
        return failure_of(error, self._target, self._access, self._timeout_s)


def pause_after(error: Any, attempt: int) -> float | None:
    """Seconds after which a call that failed is worth another attempt; None when it is not."""
    if error.code() is grpc.StatusCode.CANCELLED:
        # Unseen. gRPC's own retries end after five; a server that others flood with calls drops some at random for longer.
        return DROPPED_BACKOFF_S
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and attempt < ATTEMPTS:
        return retry_after_s(error)
    return None


def _bounded(call: Any, bound_s: float) -> Iterator[Any]:
    """A stream's answers. Raises TimeoutError when one takes longer than ``bound_s``: gRPC bounds whole calls only.

    They are read in a thread, one when it is asked for. Where calls are traced (opentelemetry-instrumentation-grpc) this one is a
    generator, which nobody else can cancel: then the thread may wait on until the channel is closed.
    """
    asked: SimpleQueue[bool] = SimpleQueue()
    read: SimpleQueue[Any] = SimpleQueue()

    def reader() -> None:
        while asked.get():
            try:
                read.put(next(call, None))
            except Exception as error:
                read.put(error)
        if not hasattr(call, "cancel"):
            call.close()

    Thread(target=copy_context().run, args=(reader,), daemon=True).start()
    try:
        while True:
            asked.put(True)
            try:
                answer = read.get(timeout=bound_s)
            except Empty:
                raise TimeoutError from None
            if isinstance(answer, Exception):
                raise answer
            if answer is None:
                return
            yield answer
    finally:
        asked.put(False)
        if hasattr(call, "cancel"):
            call.cancel()
