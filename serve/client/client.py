"""A small typed client: returns numpy arrays, sets a deadline on every call, and retries through gRPC's own service config.

    with DigitClient("localhost:50051") as client:
        digits = client.generate(count=25, seed=7)
        digits.pixels  # uint8 (25, 28, 28)
        sevens = client.generate(count=5, seed=7, labels=7)

``python -m serve.client`` is its command line.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from serve.client.channel import DEFAULT_TARGET, PLAIN, Access
from serve.latents import Span, draw_span
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc

DEFAULT_TIMEOUT_S = 30.0
STREAM_ATTEMPTS = 5
STREAM_BACKOFF_S = 0.2
DROPPED_BACKOFF_S = 0.5
Labels = int | Sequence[int]  # one digit for all, or one for each; empty: the addresses' own
STREAM_RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass(frozen=True)
class Digits:
    """Digits and their address. ``pixels`` is uint8 (n, 28, 28), or float32 in [0, 1] when that was asked for."""

    pixels: NDArray[Any]
    model: str
    version: int
    seed: int | None
    start: int
    labels: NDArray[np.int64]  # (n,), empty for a model that cannot be asked for a digit
    queue_seconds: float
    compute_seconds: float


class DigitClient:
    """A connection to one or more replicas. Calls raise ``grpc.RpcError`` with the server's one-line text."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        access: Access = PLAIN,
        *,
        wait_for_server: bool = True,
    ) -> None:
        """Without ``wait_for_server`` a call fails with UNAVAILABLE at once, and why, when nobody can be reached.

        Raises SettingsError when a file that ``access`` names cannot be read.
        """
        self._channel = access.open_channel(target)
        self._stub = pb_grpc.DigitGeneratorStub(self._channel)
        self._timeout_s = timeout_s
        self._options: dict[str, Any] = {"metadata": access.metadata, "wait_for_ready": wait_for_server}

    def generate(
        self,
        count: int = 1,
        *,
        seed: int | None = None,
        start: int = 0,
        latents: NDArray[np.float32] | None = None,
        labels: Labels = (),
        truncation: float = 0.0,
        model: str = "",
        version: int = 0,
        as_float: bool = False,
        bulk: bool = False,
    ) -> Digits:
        """Digits ``start`` … of ``seed`` (drawn by the server when None), or those of explicit ``latents`` (n, z).

        ``labels``: the digit wanted, or one for each; without, the addresses' own. ``truncation``: no latent value beyond it.
        """
        request = pb.GenerateRequest(
            model=model,
            version=version,
            count=0 if latents is not None else count,
            seed=seed,
            start=start,
            labels=_as_list(labels),
            truncation=truncation,
            latents=b"" if latents is None else np.ascontiguousarray(latents, "<f4").tobytes(),
            format=pb.IMAGE_FORMAT_FLOAT32 if as_float else pb.IMAGE_FORMAT_UINT8,
            priority=pb.PRIORITY_BULK if bulk else pb.PRIORITY_UNSPECIFIED,
        )
        return _digits(self._ask(self._stub.Generate, request))

    def interpolate(
        self,
        begin: tuple[int, int],
        end: tuple[int, int],
        steps: int,
        *,
        labels: Labels = (),
        truncation: float = 0.0,
        model: str = "",
        version: int = 0,
    ) -> Digits:
        """``steps`` digits on the arc from one address, (seed, index), to another; ``labels`` as in ``generate``."""
        request = pb.InterpolateRequest(
            model=model,
            version=version,
            begin=pb.Address(seed=begin[0], index=begin[1]),
            end=pb.Address(seed=end[0], index=end[1]),
            steps=steps,
            labels=_as_list(labels),
            truncation=truncation,
        )
        return _digits(self._ask(self._stub.Interpolate, request))

    def latents(
        self, seed: int, start: int = 0, count: int = 1, *, truncation: float = 0.0, model: str = "", version: int = 0
    ) -> NDArray[np.float32]:
        """The latent vectors (count, z) of addresses, for arithmetic: what ``generate(latents=…)`` takes. Made here."""
        about = self.get_model(model, version)
        return draw_span(Span(seed, start, count, truncation=truncation), about.latent_size, about.labels)[0]

    def stream(
        self,
        count: int,
        *,
        seed: int | None = None,
        start: int = 0,
        labels: Labels = (),
        truncation: float = 0.0,
        model: str = "",
        version: int = 0,
        chunk: int = 0,
    ) -> Iterator[Digits]:
        """Any number of digits, chunk by chunk in order, without a deadline. The digit at index i is ``labels[i % n]``.

        If the server goes away half-way, the stream goes on at another replica with the next address: gRPC itself
        cannot retry a stream that has begun. After ``STREAM_ATTEMPTS`` failures without a chunk between, it raises.
        """
        given = failures = 0
        while given < count:
            request = pb.GenerateStreamRequest(
                model=model,
                version=version,
                count=count - given,
                seed=seed,
                start=start + given,
                chunk=chunk,
                labels=_as_list(labels),
                truncation=truncation,
            )
            try:
                for response in self._stub.GenerateStream(request, metadata=self._options["metadata"]):
                    digits = _digits(response)
                    seed, model, version = digits.seed, digits.model, digits.version
                    given += len(digits.pixels)
                    failures = 0
                    yield digits
            except grpc.RpcError as error:
                failures += 1
                if error.code() not in STREAM_RETRYABLE or failures >= STREAM_ATTEMPTS:
                    raise
                time.sleep(STREAM_BACKOFF_S * failures)

    def list_models(self) -> pb.ListModelsResponse:
        response: pb.ListModelsResponse = self._ask(self._stub.ListModels, pb.ListModelsRequest())
        return response

    def get_model(self, model: str = "", version: int = 0) -> pb.GetModelResponse:
        request = pb.GetModelRequest(model=model, version=version)
        response: pb.GetModelResponse = self._ask(self._stub.GetModel, request)
        return response

    def _ask(self, method: Any, request: Any) -> Any:
        """One call, tried again within its deadline when the server has dropped it unseen.

        gRPC's own retries end after five attempts; a server that is flooded with calls by others drops some at random for longer.
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                return method(request, timeout=deadline - time.monotonic(), **self._options)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.CANCELLED or time.monotonic() + DROPPED_BACKOFF_S > deadline:
                    raise
                time.sleep(DROPPED_BACKOFF_S)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> DigitClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _as_list(labels: Labels) -> Sequence[int]:
    return [labels] if isinstance(labels, int) else [int(label) for label in labels]


def _digits(response: pb.GenerateResponse) -> Digits:
    kind = "<f4" if response.format == pb.IMAGE_FORMAT_FLOAT32 else np.uint8
    pixels = np.frombuffer(response.images[0], kind).reshape(response.count, response.height, response.width)
    return Digits(
        pixels=pixels,
        model=response.model,
        version=response.version,
        seed=response.seed if response.HasField("seed") else None,
        start=response.start,
        labels=np.array(response.labels, np.int64),
        queue_seconds=response.timing.queue_seconds,
        compute_seconds=response.timing.compute_seconds,
    )
