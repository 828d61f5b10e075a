"""The calls of both clients: builds requests, which a transport's methods send."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Generic, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serve.client.digits import Digits, Request, from_response
from serve.client.errors import mistake, real, unusable, whole
from serve.client.streaming import Progress
from serve.latents import INDEX_LIMIT, LEAST_TRUNCATION, Span, draw_span
from serve.pb.digits.v1 import digits_pb2 as pb

Labels = SupportsIndex | Iterable[SupportsIndex]  # one digit for all, or one for each; empty: the addresses' own
Address = tuple[SupportsIndex, SupportsIndex]  # seed and index

MOST_LATENT_SIZE, MOST_CLASSES = 4096, 1000  # of a bundle's manifest
MOST_REQUEST_BYTES = 4 << 20  # that a server takes

DigitsT = TypeVar("DigitsT")
StreamT = TypeVar("StreamT")
LatentsT = TypeVar("LatentsT")
ModelsT = TypeVar("ModelsT")
ModelT = TypeVar("ModelT")


class Calls(ABC, Generic[DigitsT, StreamT, LatentsT, ModelsT, ModelT]):
    """What can be asked of a server. The types say what comes back: a ``Digits``, or something to await that gives one."""

    def generate(
        self,
        count: SupportsIndex | None = None,
        *,
        seed: SupportsIndex | None = None,
        start: SupportsIndex = 0,
        latents: ArrayLike | None = None,
        labels: Labels = (),
        truncation: float = 0.0,
        model: str = "",
        version: SupportsIndex = 0,
        as_float: bool = False,
        bulk: bool = False,
    ) -> DigitsT:
        """Digits ``start`` … of ``seed`` (drawn by the server when None), or those of explicit ``latents`` (n, z).

        ``count``: how many; without, one, or as many as there are ``latents``. ``labels``: the digit wanted, or one for each;
        without, the addresses' own. ``truncation``: no latent value beyond it. Raises DigitError, and TypeError for what is
        no whole number where one is needed.
        """
        if latents is not None and count is not None:
            raise mistake("count cannot go with latents: there are as many digits as latents")
        request = pb.GenerateRequest(
            count=0 if latents is not None else 1 if count is None else whole("count", count, 32),
            seed=None if seed is None else whole("seed", seed, 64),
            start=whole("start", start, 64),
            format=pb.IMAGE_FORMAT_FLOAT32 if as_float else pb.IMAGE_FORMAT_UINT8,
            priority=pb.PRIORITY_BULK if bulk else pb.PRIORITY_UNSPECIFIED,
            **_common(model, version, labels, truncation),
        )
        wanted = request.count
        if latents is not None:
            rows = _rows(latents)
            wanted = len(rows)
            request.latents, request.latent_size = rows.tobytes(), rows.shape[1]
            if request.ByteSize() > MOST_REQUEST_BYTES:
                raise mistake(
                    f"latents have {rows.nbytes} bytes, over the {MOST_REQUEST_BYTES} of a request; ask for some at a time"
                )
        digits: DigitsT = self._ask("Generate", request, partial(_all_digits, request, wanted))
        return digits

    def interpolate(
        self,
        begin: Address,
        end: Address,
        steps: SupportsIndex,
        *,
        labels: Labels = (),
        truncation: float = 0.0,
        model: str = "",
        version: SupportsIndex = 0,
    ) -> DigitsT:
        """``steps`` digits on the arc from one address, (seed, index), to another; the rest as in ``generate``."""
        request = pb.InterpolateRequest(
            begin=_address("begin", begin),
            end=_address("end", end),
            steps=whole("steps", steps, 32),
            **_common(model, version, labels, truncation),
        )
        digits: DigitsT = self._ask("Interpolate", request, partial(_all_digits, request, request.steps))
        return digits

    def latents(
        self,
        seed: SupportsIndex,
        start: SupportsIndex = 0,
        count: SupportsIndex = 1,
        *,
        truncation: float = 0.0,
        model: str = "",
        version: SupportsIndex = 0,
    ) -> LatentsT:
        """The latent vectors float32 (count, z) of addresses, for arithmetic: what ``generate(latents=…)`` takes. Made here."""
        numbers = whole("seed", seed, 64), whole("start", start, 63), whole("count", count, 32)
        if sum(numbers[1:]) > INDEX_LIMIT:
            raise mistake(f"start + count must be at most 2^63, got {numbers[1]} + {numbers[2]}")
        value = checked_truncation(truncation)

        def draw(about: pb.GetModelResponse) -> NDArray[np.float32]:
            return draw_span(Span(*numbers, truncation=value), _checked(about).latent_size, about.labels)[0]

        rows: LatentsT = self._ask("GetModel", _model_request(model, version), draw)
        return rows

    def stream(
        self,
        count: SupportsIndex,
        *,
        seed: SupportsIndex | None = None,
        start: SupportsIndex = 0,
        labels: Labels = (),
        truncation: float = 0.0,
        model: str = "",
        version: SupportsIndex = 0,
        chunk: SupportsIndex = 0,
    ) -> StreamT:
        """Any number of digits, chunk by chunk in order. The digit at index i is ``labels[i % n]``; the rest as in ``generate``.

        The client's timeout bounds the time between two chunks. If the server goes away half-way, or ends the connection
        because of its age, the stream goes on with the next address, at another replica if there is one: gRPC itself
        cannot retry a stream that has begun.
        """
        request = pb.GenerateStreamRequest(
            count=whole("count", count, 64),
            seed=None if seed is None else whole("seed", seed, 64),
            start=whole("start", start, 64),
            chunk=whole("chunk", chunk, 32),
            **_common(model, version, labels, truncation),
        )
        chunks: StreamT = self._stream(Progress(request))
        return chunks

    def list_models(self) -> ModelsT:
        """The models that are served (``ListModelsResponse``)."""
        models: ModelsT = self._ask("ListModels", pb.ListModelsRequest(), _as_it_is)
        return models

    def get_model(self, model: str = "", version: SupportsIndex = 0) -> ModelT:
        """One model (``GetModelResponse``): what made it, its limits, where it runs."""
        about: ModelT = self._ask("GetModel", _model_request(model, version), _checked)
        return about

    @abstractmethod
    def _ask(self, method: str, request: Any, read: Callable[[Any], Any]) -> Any:
        """Call a method, and give what ``read`` makes of its answer."""

    @abstractmethod
    def _stream(self, progress: Progress) -> Any:
        """Give a stream's digits chunk by chunk."""


def _as_it_is(response: Any) -> Any:
    return response


def _all_digits(request: Request, wanted: int, response: pb.GenerateResponse) -> Digits:
    digits = from_response(response, request, wanted)
    if len(digits) < wanted:
        raise unusable(f"it has {len(digits)} digits, and {wanted} were asked for")
    return digits


def _checked(about: pb.GetModelResponse) -> pb.GetModelResponse:
    """A model that can be one: latents are drawn by these numbers. Raises DigitError."""
    if not 0 < about.latent_size <= MOST_LATENT_SIZE or about.labels > MOST_CLASSES:
        raise unusable(f"no model has {about.latent_size} latent values and {about.labels} labels")
    return about


def checked_truncation(truncation: float) -> float:
    """A request's truncation. Raises TypeError or DigitError."""
    value = real("truncation", truncation)
    if value and not LEAST_TRUNCATION <= value < math.inf:
        raise mistake(f"truncation must be {LEAST_TRUNCATION:g} or more, or 0 for none, got {value:g}")
    return value


def as_numbers(labels: Labels) -> list[int]:
    """One label for all, or one for each, as a list. Raises TypeError or DigitError."""
    given: Any = labels
    one = (
        not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0
    )  # an array without an axis says that it can be iterated
    return [whole("labels", label, 32) for label in ([given] if one else given)]


def _common(model: str, version: SupportsIndex, labels: Labels, truncation: float) -> dict[str, Any]:
    """The fields that all requests for digits share."""
    return {**_named(model, version), "labels": as_numbers(labels), "truncation": checked_truncation(truncation)}


def _named(model: str, version: SupportsIndex) -> dict[str, Any]:
    if not isinstance(model, str):
        raise TypeError(f"model must be a name, got {model!r:.64}")
    try:
        model.encode()
    except UnicodeEncodeError:
        raise mistake(f"model must be text, got {model!a:.64}") from None
    return {"model": model, "version": whole("version", version, 63)}


def _model_request(model: str, version: SupportsIndex) -> pb.GetModelRequest:
    return pb.GetModelRequest(**_named(model, version))


def _address(name: str, address: Address) -> pb.Address:
    try:
        seed, index = address
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an address, (seed, index), got {address!r:.64}") from None
    return pb.Address(seed=whole(f"{name}'s seed", seed, 64), index=whole(f"{name}'s index", index, 64))


def _rows(latents: ArrayLike) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # a float too large is infinite, which the server refuses by its place
            rows = np.ascontiguousarray(latents, "<f4")
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch's
        raise TypeError(f"latents must be numbers of shape (n, z): {error!s:.200}") from None
    if rows.ndim != 2 or not rows.size:
        raise mistake(f"latents must have shape (n, z), got {rows.shape}")
    return rows
