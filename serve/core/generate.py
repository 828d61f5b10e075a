"""Answers a request: find the model, check, count against the caller's limit, run, return. Knows no transport."""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from serve.access.identity import Account
from serve.batching.ticket import Ticket
from serve.core.request import Addresses, Digits, DigitsRequest, Latents
from serve.errors import RequestError
from serve.latents import INDEX_LIMIT, Span, draw_span, in_turn, slerp
from serve.models.catalog import Catalog
from serve.models.model import Model, ordered

DEFAULT_CHUNK = 256
LEAST_TRUNCATION = 0.01  # below it all digits are the same, and the tail's grid is too coarse to tell
CHUNKS_AHEAD = 2  # of a stream, under way while one is being sent


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

    async def generate(self, request: DigitsRequest, account: Account) -> Digits:
        """Answer a request at once."""
        model, span = self._begin(request)
        try:
            most = self.most(request)
            if not 1 <= span.count <= most:
                raise RequestError(f"count must be from 1 to {most} for {request.encoding}, got {span.count}")
            span = _labelled(span, request.labels, model)
            with account.hold(span.count):
                ticket = await model.run(span, request.outputs, request.priority, request.deadline)
            return _digits(model, ticket, request)
        finally:
            model.in_use.leave()

    async def stream(self, request: DigitsRequest, chunk: int, account: Account) -> AsyncIterator[Digits]:
        """Answer a request for any number of addresses, ``chunk`` rows at a time (0: as many as is usual), in order.

        The digit at index i has ``labels[i % n]``. A few chunks are under way at once; they wait for room in a full queue.
        """
        most = self.most(request)
        chunk = chunk or min(DEFAULT_CHUNK, most)
        if chunk > most:
            raise RequestError(f"chunk must be from 1 to {most} for {request.encoding}, got {chunk}")
        ahead = 1 + CHUNKS_AHEAD
        if account.images_limit:
            ahead = min(ahead, account.images_limit // chunk or 1)
        under_way: deque[asyncio.Task[Ticket]] = deque()
        model, whole = self._begin(request)
        try:
            if whole.count < 1:
                raise RequestError("count must be 1 or more, got 0")
            labels = _checked_labels(request.labels, model)
            with account.hold(min(whole.count, ahead * chunk)):
                given = 0
                while given < whole.count or under_way:
                    while given < whole.count and len(under_way) < ahead:
                        part = whole.part(given, min(chunk, whole.count - given))
                        given += part.count
                        if labels is not None:
                            part = msgspec.structs.replace(part, labels=in_turn(labels, part.start, part.count))
                        run = model.run(part, request.outputs, request.priority, request.deadline, waits_for_room=True)
                        under_way.append(asyncio.ensure_future(run))
                    ticket = await under_way.popleft()
                    yield _digits(model, ticket, request)
        finally:
            for task in under_way:
                task.cancel()
            model.in_use.leave()

    def _begin(self, request: DigitsRequest) -> tuple[Model, Span]:
        """The model that answers, in use from here on, and the rows in its terms."""
        while True:
            model, span = self._resolve(request)
            if model.in_use.enter():
                return model, span
            # It has been retired just now: another answers, or it is not served any more.

    def _resolve(self, request: DigitsRequest) -> tuple[Model, Span]:
        rows, find = request.rows, self.catalog.find
        if isinstance(rows, Addresses):
            span = _addressed(rows.seed, rows.start, rows.count, rows.truncation)
            return find(request.model, request.version, lambda: span.seed), span
        if isinstance(rows, Latents):
            model = find(request.model, request.version, lambda: _digest_seed(rows.values))
            return model, _explicit(rows, model)
        if not 2 <= rows.steps <= self.most(request):
            raise RequestError(f"steps must be from 2 to {self.most(request)} for {request.encoding}, got {rows.steps}")
        begin, end = (_addressed(seed, index, 1, rows.truncation) for seed, index in (rows.begin, rows.end))
        model = find(request.model, request.version, lambda: begin.seed)
        return model, _between(begin, end, rows.steps, model)


def _addressed(seed: int | None, start: int, count: int, truncation: float) -> Span:
    """Rows of a seed's stream. Raises RequestError when they reach beyond its end or are truncated to nothing."""
    if start >= INDEX_LIMIT or start + count > INDEX_LIMIT:
        raise RequestError(f"start + count must be at most 2^63, got {start} + {count}")
    if truncation and not LEAST_TRUNCATION <= truncation < math.inf:
        raise RequestError(f"truncation must be {LEAST_TRUNCATION} or more, or 0 for none, got {truncation:g}")
    return Span(secrets.randbits(64) if seed is None else seed, start, count, truncation=truncation)


def _explicit(rows: Latents, model: Model) -> Span:
    """The caller's own rows. Raises RequestError for a shape that the model does not take, or values that are not finite."""
    values, size = rows.values, model.manifest.latent_size
    if values.ndim == 1:
        count, rest = divmod(len(values), size)
        if rest:
            raise RequestError(
                f"latents has {values.nbytes} bytes, which is no multiple of {size * 4} ({size} float32 values a row)"
            )
        if rows.count not in (0, count):
            raise RequestError(f"count is {rows.count}, but latents holds {count} rows; leave count at 0")
        values = values.reshape(count, size)
    if values.ndim != 2 or values.shape[1] != size:
        raise RequestError(f"latents must have shape [n, {size}], got {list(values.shape)}")
    finite = np.isfinite(values)
    if not finite.all():
        row, value = np.argwhere(~finite)[0]
        raise RequestError(f"latents must be finite, but row {row} value {value} is {values[row, value]}")
    return Span(0, 0, len(values), values.astype(np.float32, copy=False))


def _between(begin: Span, end: Span, steps: int, model: Model) -> Span:
    """``steps`` rows from the first row of ``begin`` to that of ``end``, each with the label of the nearer."""
    shape = (model.manifest.latent_size, model.manifest.labels)
    (row,), first = draw_span(begin, *shape)
    (last_row,), last = draw_span(end, *shape)
    labels = None
    if first is not None and last is not None:
        labels = np.repeat(np.concatenate((first, last)), (steps - steps // 2, steps // 2))
    return Span(0, 0, steps, slerp(row, last_row, steps), labels)


def _digest_seed(latents: NDArray[np.float32]) -> int:
    """What stands for the seed of explicit latents where traffic is split by seed: the same latents, the same version."""
    return int.from_bytes(hashlib.blake2b(latents.tobytes(), digest_size=8).digest(), "little")


def _checked_labels(labels: Sequence[int] | NDArray[np.int64], model: Model) -> NDArray[np.int64] | None:
    """A request's labels as int64, None if it gives none. Raises RequestError for what the model cannot be asked for."""
    if not len(labels):
        return None
    manifest = model.manifest
    name = f"model {manifest.name}/{manifest.version}"
    if not manifest.labels:
        raise RequestError(f"{name} is unconditional and takes no labels; ask a conditional model, as GetModel tells")
    numbers = np.asarray(labels)
    if odd := numbers[(numbers < 0) | (numbers >= manifest.labels)].tolist():
        raise RequestError(f"labels must be from 0 to {manifest.labels - 1} for {name}, got {odd[0]}")
    return numbers.astype(np.int64)


def _labelled(span: Span, labels: Sequence[int] | NDArray[np.int64], model: Model) -> Span:
    """The span with a request's labels, one for all or one for each of its rows. Raises RequestError."""
    chosen = _checked_labels(labels, model)
    if chosen is None:
        if span.explicit is not None and span.labels is None and model.manifest.labels:
            raise RequestError("labels are needed with latents: only an address has labels of its own")
        return span
    if len(chosen) not in (1, span.count):
        raise RequestError(f"labels has {len(chosen)} entries for {span.count} digits; give one for all, or one for each")
    return msgspec.structs.replace(span, labels=np.broadcast_to(chosen, span.count))


def _digits(model: Model, ticket: Ticket, request: DigitsRequest) -> Digits:
    span, outputs = ticket.span, request.outputs
    labels = None
    if model.manifest.labels:
        pieces = ordered(ticket, "labels")
        labels = cast("NDArray[np.int64]", pieces[0] if len(pieces) == 1 else np.concatenate(pieces))
    return Digits(
        model=model,
        encoding=request.encoding,
        seed=span.seed if span.explicit is None else None,
        start=span.start,
        count=span.count,
        pixels=cast("list[NDArray[np.uint8]]", ordered(ticket, "pixels")) if "pixels" in outputs else (),
        images=cast("list[NDArray[np.float32]]", ordered(ticket, "images")) if "images" in outputs else (),
        labels=labels,
        queued_at=ticket.queued_at,
        queue_seconds=ticket.queue_seconds,
        compute_seconds=ticket.compute_seconds,
    )
