"""Answers a request: finds the model, checks the request, reserves memory, runs, returns. Knows no protocol and no port."""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from serve.background import settle
from serve.batching.ticket import Send, Ticket
from serve.core.request import Addresses, Digits, DigitsRequest, Holder, Interpolation, Latents
from serve.errors import RequestError, ServeError
from serve.latents import INDEX_LIMIT, LEAST_TRUNCATION, Span, draw_span, in_turn, slerp
from serve.models.catalog import Catalog
from serve.models.model import Model, ordered

DEFAULT_CHUNK = 256
DRAWN_BITS = 53  # of a random seed: the most that a number in JavaScript, and so in JSON, is sure to keep
CHUNKS_AHEAD = 2  # of a stream, under way while one is being sent
LABEL_BYTES = 16  # of a stream's label, as it came and as a number
MOST_LATENT = 1e4  # drawn ones are within 7; of what overflows inside the model, in half precision beyond 65,504, images are nan
MOST_STREAM_LABELS = 60_000  # as many as MNIST's training set has

Completed = Callable[[Digits | Exception], Send | None]
ErrorT = TypeVar("ErrorT", bound=BaseException)


class Core:
    """Answers requests with the models of a catalog. Raises ServeError for what cannot be answered."""

    def __init__(self, catalog: Catalog, max_count: int, max_count_float32: int) -> None:
        """``max_count`` bounds the images of one answer, ``max_count_float32`` those of an answer of float32 images."""
        self.catalog = catalog
        self.max_count = max_count
        self.max_count_float32 = max_count_float32

    def most(self, request: DigitsRequest) -> int:
        """The most images in one answer to such a request."""
        return self.max_count_float32 if "images" in request.outputs else self.max_count

    def begin(self, request: DigitsRequest, holder: Holder, completed: Completed) -> Callable[[], None]:
        """Begin to answer a request; returns what gives it up.

        ``completed`` is called once, with the digits or what went wrong, from the thread of the instance that ran the last of
        them; it returns what sends the answer, or None. If this raises, it is not called.
        """
        model, rows, count = self._enter(request)
        try:
            labels = self._checked(request, model, count)
            holder.take(count, count * request.row_bytes)
            ticket = Ticket(_span(rows, model, labels), request.outputs, request.priority, request.deadline)

            def complete(ticket: Ticket) -> Send | None:
                model.in_use.leave()
                if ticket.error is not None:
                    return completed(_named(ticket.error, model))
                return completed(_digits(model, ticket, request))

            ticket.completion = complete
            model.submit(ticket)
        except BaseException as error:
            model.in_use.leave()
            _named(error, model)
            raise
        return partial(model.batcher.cancel, ticket)

    def find(self, request: DigitsRequest) -> Model:
        """The model that would answer a request, which is checked as by ``begin``: nothing is held or queued."""
        model, _, count = self._enter(request)
        try:
            self._checked(request, model, count)
        finally:
            model.in_use.leave()
        return model

    async def generate(self, request: DigitsRequest, holder: Holder) -> Digits:
        """As ``begin``, awaited on the event loop; given up when the waiter is cancelled."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Digits] = loop.create_future()

        def completed(result: Digits | Exception) -> None:
            loop.call_soon_threadsafe(settle, ended, result)

        give_up = self.begin(request, holder, completed)
        try:
            return await ended
        except asyncio.CancelledError:
            give_up()
            raise

    async def stream(self, request: DigitsRequest, chunk: int, holder: Holder) -> AsyncGenerator[Digits]:
        """Answer a request for any number of addresses, ``chunk`` rows at a time (0: as many as is usual), in order.

        The digit at index i has ``labels[i % n]``. A few chunks are under way at once; they wait for room in a full queue.
        """
        most = self.most(request)
        chunk = chunk or min(DEFAULT_CHUNK, most)
        if chunk > most:
            raise RequestError(f"chunk must be from 1 to {most} for {request.encoding}, got {chunk}", "chunk", most)
        if len(request.labels) > MOST_STREAM_LABELS:
            raise RequestError(
                f"labels must have at most {MOST_STREAM_LABELS} entries in a stream, got {len(request.labels)}",
                "labels",
                MOST_STREAM_LABELS,
            )
        ahead = 1 + CHUNKS_AHEAD
        if holder.images_limit:
            ahead = min(ahead, holder.images_limit // chunk or 1)
        under_way: deque[asyncio.Task[Ticket]] = deque()
        model, rows, count = self._enter(request)
        try:
            if count < 1:
                raise RequestError("count must be 1 or more, got 0", "count", 1)
            labels = _checked_labels(request.labels, model)
            held = min(count, ahead * chunk)
            holder.take(held, held * request.row_bytes + LABEL_BYTES * len(request.labels))
            whole = _span(rows, model, None)
            given = 0
            while given < count or under_way:
                while given < count and len(under_way) < ahead:
                    part = whole.part(given, min(chunk, count - given))
                    given += part.count
                    if labels is not None:
                        part = replace(part, labels=in_turn(labels, part.start, part.count))
                    ticket = Ticket(part, request.outputs, request.priority, request.deadline, waits_for_room=True)
                    under_way.append(asyncio.ensure_future(model.run(ticket)))
                yield _digits(model, await under_way.popleft(), request)
        except ServeError as error:
            _named(error, model)
            raise
        finally:
            for task in under_way:
                task.cancel()
            model.in_use.leave()

    def _enter(self, request: DigitsRequest) -> tuple[Model, Addresses | Latents | Interpolation, int]:
        """The model that answers, in use from here on, the rows with their seed, and how many there are."""
        try:
            return self._entered(request)
        except RequestError as error:
            error.about(request.model or self.catalog.default_model, request.version)
            raise

    def _entered(self, request: DigitsRequest) -> tuple[Model, Addresses | Latents | Interpolation, int]:
        rows = request.rows
        if isinstance(rows, Addresses):
            seed, count = rows.seed, rows.count
            if seed is None:
                seed = secrets.randbits(DRAWN_BITS)
                rows = Addresses(seed, rows.start, count, rows.truncation)
            _check_range(rows.start, count, rows.truncation)
        elif isinstance(rows, Interpolation):
            seed, count = rows.begin[0], rows.steps
            if not 2 <= count <= self.most(request):
                most = self.most(request)
                raise RequestError(f"steps must be from 2 to {most} for {request.encoding}, got {count}", "steps", most)
            for _, index in (rows.begin, rows.end):
                _check_range(index, 1, rows.truncation)
        else:
            seed, count = None, 0
        while True:
            model = self.catalog.find(request.model, request.version, lambda: _digest_seed(rows) if seed is None else seed)
            if model.in_use.enter():
                break  # else it has been retired just now: another answers, or it is not served any more
        if isinstance(rows, Latents):
            try:
                count = _latents_count(rows, model)
            except RequestError:
                model.in_use.leave()
                raise
        return model, rows, count

    def _checked(self, request: DigitsRequest, model: Model, count: int) -> NDArray[np.int64] | None:
        """The labels of a request for ``count`` digits, None if it gives none. Raises RequestError."""
        most = self.most(request)
        if not 1 <= count <= most:
            raise RequestError(f"count must be from 1 to {most} for {request.encoding}, got {count}", "count", most)
        return _checked_labels(request.labels, model, count)


def _named(error: ErrorT, model: Model) -> ErrorT:
    """The error, with the model that was asked."""
    if isinstance(error, ServeError):
        error.about(model.manifest.name, model.manifest.version)
    return error


def _check_range(start: int, count: int, truncation: float) -> None:
    """Raises RequestError for rows that reach beyond a stream's end or are truncated to nothing."""
    if start >= INDEX_LIMIT or start + count > INDEX_LIMIT:
        raise RequestError(f"start + count must be at most 2^63, got {start} + {count}", "start", INDEX_LIMIT)
    if truncation and not LEAST_TRUNCATION <= truncation < math.inf:
        least = LEAST_TRUNCATION
        raise RequestError(f"truncation must be {least:g} or more, or 0 for none, got {truncation:g}", "truncation", least)


def _latents_count(rows: Latents, model: Model) -> int:
    """How many rows the caller's own latents are. Raises RequestError for a shape that the model does not take."""
    values, size = rows.values, model.manifest.latent_size
    if values.ndim == 1 and len(values) % size:
        text = f"latents has {values.nbytes} bytes, which is no multiple of {size * 4} ({size} float32 values a row)"
        raise RequestError(text, "latents", size * 4)
    if values.ndim > 1 and values.shape[1:] != (size,):
        raise RequestError(f"latents must have shape [n, {size}], got {list(values.shape)}", "latents", size)
    count = values.size // size
    if rows.count not in (0, count):
        raise RequestError(f"count is {rows.count}, but latents holds {count} rows; leave count at 0", "count", count)
    return count


def _span(rows: Addresses | Latents | Interpolation, model: Model, labels: NDArray[np.int64] | None) -> Span:
    """The rows in the batcher's terms, with a request's labels if it has any. Raises RequestError."""
    if isinstance(rows, Addresses):
        assert rows.seed is not None
        return Span(rows.seed, rows.start, rows.count, labels=labels, truncation=rows.truncation)
    if isinstance(rows, Interpolation):
        return _between(rows, model, labels)
    values = rows.values.reshape(-1, model.manifest.latent_size)
    sane = np.abs(values) <= MOST_LATENT  # nan is not
    if not sane.all():
        row, value = np.argwhere(~sane)[0]
        text = f"latents must be from {-MOST_LATENT:g} to {MOST_LATENT:g}, but row {row} value {value} is {values[row, value]:g}"
        raise RequestError(text, "latents", MOST_LATENT)
    if labels is None and model.manifest.labels:
        raise RequestError("labels are needed with latents: give one label for all digits, or one for each", "labels")
    return Span(0, 0, len(values), values.astype(np.float32, copy=False), labels)


def _between(rows: Interpolation, model: Model, labels: NDArray[np.int64] | None) -> Span:
    """The rows on the arc, each with the label of the nearer end unless there are ``labels``."""
    shape, steps = (model.manifest.latent_size, model.manifest.labels), rows.steps
    ends = [Span(seed, index, 1, truncation=rows.truncation) for seed, index in (rows.begin, rows.end)]
    ((row,), first), ((last_row,), last) = (draw_span(end, *shape) for end in ends)
    if labels is None and first is not None and last is not None:
        labels = np.repeat(np.concatenate((first, last)), (steps - steps // 2, steps // 2))
    return Span(0, 0, steps, slerp(row, last_row, steps), labels)


def _digest_seed(rows: Addresses | Latents | Interpolation) -> int:
    """What stands for the seed of explicit latents where traffic is split by seed: the same latents, the same version."""
    assert isinstance(rows, Latents)
    return int.from_bytes(hashlib.blake2b(rows.values.tobytes(), digest_size=8).digest(), "little")


def _checked_labels(labels: Sequence[int] | NDArray[np.int64], model: Model, count: int = 0) -> NDArray[np.int64] | None:
    """A request's labels as int64, None if it gives none; with a ``count``, one for each of so many rows.

    Raises RequestError for what the model cannot be asked for.
    """
    given = len(labels)
    if not given:
        return None
    manifest = model.manifest
    name = f"model {manifest.name}/{manifest.version}"
    if not manifest.labels:
        raise RequestError(
            f"{name} is unconditional and takes no labels: leave labels out, or name a conditional model", "labels"
        )
    if count and given not in (1, count):
        raise RequestError(f"labels has {given} entries for {count} digits; give one for all, or one for each", "labels", count)
    numbers = np.asarray(labels)
    if odd := numbers[(numbers < 0) | (numbers >= manifest.labels)].tolist():
        raise RequestError(
            f"labels must be from 0 to {manifest.labels - 1} for {name}, got {odd[0]}", "labels", manifest.labels - 1
        )
    return np.broadcast_to(numbers.astype(np.int64), count or given)


def _digits(model: Model, ticket: Ticket, request: DigitsRequest) -> Digits:
    span, outputs = ticket.span, request.outputs
    labels = None
    if model.manifest.labels:
        pieces = ordered(ticket, "labels")
        labels = cast("NDArray[np.int64]", pieces[0] if len(pieces) == 1 else np.concatenate(pieces))
    return Digits(
        model=model,
        rows=request.rows,
        encoding=request.encoding,
        seed=span.seed if span.explicit is None else None,
        start=span.start,
        count=span.count,
        pixels=cast("list[NDArray[np.uint8]]", ordered(ticket, "pixels")) if "pixels" in outputs else (),
        # The model's own range is [0, 1] up to rounding: -1e-7 has been seen.
        images=[np.clip(rows, 0, 1, dtype=np.float32) for rows in ordered(ticket, "images")] if "images" in outputs else (),
        labels=labels,
        queued_at=ticket.queued_at,
        queue_seconds=ticket.queue_seconds,
        wait_seconds=ticket.wait_seconds,
        compute_seconds=ticket.compute_seconds,
    )
