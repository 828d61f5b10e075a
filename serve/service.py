"""``digits.v1.DigitGenerator``: checks requests, maps them to spans of latents, and encodes what comes back."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from serve.catalog import Catalog
from serve.encode import as_bytes, pack_field, to_grid, to_png
from serve.errors import RequestError
from serve.fair_queue import Priority, Ticket
from serve.latents import INDEX_LIMIT, Span, draw_span, in_turn, slerp
from serve.model import Model, joined_rows, ordered_labels, ordered_rows
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.rpc import Call, Door, RpcTable
from serve.settings import Settings

SERVICE = "digits.v1.DigitGenerator"
IMAGES_FIELD = pb.GenerateResponse.DESCRIPTOR.fields_by_name["images"].number
DEFAULT_CHUNK = 256
LEAST_TRUNCATION = 0.01  # below it all digits are the same, and the tail's grid is too coarse to tell
CHUNKS_AHEAD = 2  # of a stream, under way while one is being sent

PRIORITIES = {pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE, pb.PRIORITY_BULK: Priority.BULK}
FORMAT_NAMES = {
    pb.IMAGE_FORMAT_UINT8: "uint8",
    pb.IMAGE_FORMAT_FLOAT32: "float32",
    pb.IMAGE_FORMAT_PNG: "png",
    pb.IMAGE_FORMAT_PNG_GRID: "png_grid",
}


class DigitService:
    """The RPCs."""

    def __init__(self, catalog: Catalog, settings: Settings) -> None:
        self._catalog = catalog
        self._settings = settings

    def table(self, door: Door) -> RpcTable:
        """The methods, ready for a server."""
        table = RpcTable(SERVICE, door)
        table.unary("Generate", pb.GenerateRequest, self.generate)
        table.stream("GenerateStream", pb.GenerateStreamRequest, self.generate_stream)
        table.unary("Interpolate", pb.InterpolateRequest, self.interpolate)
        table.unary("ListModels", pb.ListModelsRequest, self.list_models)
        table.unary("GetModel", pb.GetModelRequest, self.get_model)
        return table

    async def generate(self, request: pb.GenerateRequest, call: Call) -> bytes:
        image_format = _format(request.format)
        most, named = self._max_for(image_format), FORMAT_NAMES[image_format]
        if request.latents:
            if request.HasField("seed") or request.start or request.truncation:
                raise RequestError("seed, start and truncation cannot go with latents: a digit has an address or a latent vector")
            model = self._catalog.find(request.model, request.version, lambda: digest_seed(request.latents))
            span = _explicit_span(request, model)
        else:
            if request.count == 0:
                raise RequestError(f"count must be from 1 to {most}, got 0")
            seed = request.seed if request.HasField("seed") else None
            span = tape_span(seed, request.start, request.count, checked_truncation(request.truncation))
            model = self._catalog.find(request.model, request.version, lambda: span.seed)
        if span.count > most:
            raise RequestError(f"count must be from 1 to {most} for {named}, got {span.count}; GenerateStream takes any number")
        span = labelled(span, request.labels, model)
        priority = _priority(request.priority, Priority.INTERACTIVE)
        return await self._answer(model, span, image_format, priority, call)

    async def interpolate(self, request: pb.InterpolateRequest, call: Call) -> bytes:
        image_format = _format(request.format)
        most = self._max_for(image_format)
        if not 2 <= request.steps <= most:
            raise RequestError(f"steps must be from 2 to {most} for {FORMAT_NAMES[image_format]}, got {request.steps}")
        for name in ("begin", "end"):
            if not request.HasField(name):
                raise RequestError(f"{name} is missing; give the seed and index of both ends")
        truncation = checked_truncation(request.truncation)
        ends = [tape_span(end.seed, end.index, 1, truncation) for end in (request.begin, request.end)]
        model = self._catalog.find(request.model, request.version, lambda: ends[0].seed)
        span = labelled(arc_span(ends[0], ends[1], request.steps, model), request.labels, model)
        return await self._answer(model, span, image_format, _priority(request.priority, Priority.INTERACTIVE), call)

    async def generate_stream(self, request: pb.GenerateStreamRequest, call: Call) -> AsyncIterator[bytes]:
        image_format = _format(request.format)
        most = self._max_for(image_format)
        chunk = request.chunk or min(DEFAULT_CHUNK, most)
        if chunk > most:
            raise RequestError(f"chunk must be from 1 to {most} for {FORMAT_NAMES[image_format]}, got {chunk}")
        if request.count == 0:
            raise RequestError("count must be 1 or more, got 0")
        seed = request.seed if request.HasField("seed") else None
        whole = tape_span(seed, request.start, request.count, checked_truncation(request.truncation))
        priority = _priority(request.priority, Priority.BULK)
        model = self._catalog.find(request.model, request.version, lambda: whole.seed)
        labels = checked_labels(request.labels, model)
        chunks = min(1 + CHUNKS_AHEAD, call.caller.images_limit // chunk or 1) if call.caller.images_limit else 1 + CHUNKS_AHEAD
        wants_float, deadline = image_format == pb.IMAGE_FORMAT_FLOAT32, call.deadline
        under_way: deque[asyncio.Task[Ticket]] = deque()
        with model.in_use(), call.hold(min(whole.count, chunks * chunk)):
            try:
                given = 0
                while given < whole.count or under_way:
                    while given < whole.count and len(under_way) < chunks:
                        part = whole.part(given, min(chunk, whole.count - given))
                        given += part.count
                        if labels is not None:
                            part = replace(part, labels=in_turn(labels, part.start, part.count))
                        under_way.append(asyncio.ensure_future(model.generate(part, wants_float, priority, deadline)))
                    ticket = await under_way.popleft()
                    yield await _encode(model, ticket, image_format, call)
            finally:
                for task in under_way:
                    task.cancel()

    async def list_models(self, request: pb.ListModelsRequest, call: Call) -> bytes:
        models = [self._summary(model) for model in self._catalog.models()]
        return pb.ListModelsResponse(models=models, default_model=self._catalog.default_model).SerializeToString()

    async def get_model(self, request: pb.GetModelRequest, call: Call) -> bytes:
        model = self._catalog.find(request.model, request.version)
        manifest = model.manifest
        return pb.GetModelResponse(
            summary=self._summary(model),
            architecture=manifest.architecture,
            latent_size=manifest.latent_size,
            latent_distribution=manifest.latent_distribution,
            height=manifest.height,
            width=manifest.width,
            provider=model.provider,
            digest=model.bundle.digest,
            limits=pb.Limits(
                max_count=self._settings.max_count,
                max_count_float32=self._settings.max_count_float32,
                max_batch_size=model.batcher.limits.max_batch_size,
                max_queue_images=model.batcher.limits.max_queue_images,
            ),
            training_json=json.dumps(dict(manifest.training)),
            parity_json=model.bundle.parity_json,
            precision=manifest.precision,
            labels=manifest.labels,
            quality_json=model.bundle.quality_json,
        ).SerializeToString()

    def _summary(self, model: Model) -> pb.ModelSummary:
        name, version = model.manifest.name, model.manifest.version
        route = self._catalog.route(name)
        return pb.ModelSummary(
            name=name,
            version=version,
            ready=model.ready,
            default_version=version == route.default,
            traffic_share=route.share(version),
        )

    async def _answer(self, model: Model, span: Span, image_format: pb.ImageFormat, priority: Priority, call: Call) -> bytes:
        with model.in_use(), call.hold(span.count):
            ticket = await model.generate(span, image_format == pb.IMAGE_FORMAT_FLOAT32, priority, call.deadline)
            return await _encode(model, ticket, image_format, call)

    def _max_for(self, image_format: pb.ImageFormat) -> int:
        return self._settings.max_count_float32 if image_format == pb.IMAGE_FORMAT_FLOAT32 else self._settings.max_count


def _explicit_span(request: pb.GenerateRequest, model: Model) -> Span:
    row_bytes = model.manifest.latent_size * 4
    count, rest = divmod(len(request.latents), row_bytes)
    if rest:
        raise RequestError(
            f"latents has {len(request.latents)} bytes, which is no multiple of {row_bytes} "
            f"({model.manifest.latent_size} float32 values a row)"
        )
    if request.count not in (0, count):
        raise RequestError(f"count is {request.count}, but latents holds {count} rows; leave count at 0")
    return Span(0, 0, count, finite_rows(np.frombuffer(request.latents, "<f4").reshape(count, -1)))


def digest_seed(latents: bytes) -> int:
    """What stands for the seed of explicit latents where traffic is split by seed: the same latents, the same version."""
    return int.from_bytes(hashlib.blake2b(latents, digest_size=8).digest(), "little")


def finite_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Explicit latents (n, z) in native byte order. Raises RequestError for a value that is not finite."""
    finite = np.isfinite(rows)
    if not finite.all():
        row, value = np.argwhere(~finite)[0]
        raise RequestError(f"latents must be finite, but row {row} value {value} is {rows[row, value]}")
    return rows.astype(np.float32, copy=False)


def tape_span(seed: int | None, start: int, count: int, truncation: float = 0.0) -> Span:
    """Rows of a tape; a seed that is None is drawn. Raises RequestError when they reach beyond its end."""
    if start >= INDEX_LIMIT or start + count > INDEX_LIMIT:
        raise RequestError(f"start + count must be at most 2^63, got {start} + {count}")
    return Span(secrets.randbits(64) if seed is None else seed, start, count, truncation=truncation)


def arc_span(begin: Span, end: Span, steps: int, model: Model) -> Span:
    """``steps`` rows from the first row of ``begin`` to that of ``end``, each with the label of the nearer."""
    shape = (model.manifest.latent_size, model.manifest.labels)
    (row,), first = draw_span(begin, *shape)
    (last_row,), last = draw_span(end, *shape)
    labels = None
    if first is not None and last is not None:
        labels = np.repeat(np.concatenate((first, last)), (steps - steps // 2, steps // 2))
    return Span(0, 0, steps, slerp(row, last_row, steps), labels)


def checked_truncation(value: float) -> float:
    """Raises RequestError for a truncation that leaves nothing or is no number."""
    if value and not LEAST_TRUNCATION <= value < math.inf:
        raise RequestError(f"truncation must be {LEAST_TRUNCATION} or more, or 0 for none, got {value:g}")
    return value


def checked_labels(labels: Sequence[int], model: Model) -> NDArray[np.int64] | None:
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


def labelled(span: Span, labels: Sequence[int], model: Model) -> Span:
    """The span with a request's labels, one for all or one for each of its rows. Raises RequestError."""
    chosen = checked_labels(labels, model)
    if chosen is None:
        if span.explicit is not None and span.labels is None and model.manifest.labels:
            raise RequestError("labels are needed with latents: only an address has labels of its own")
        return span
    if len(chosen) not in (1, span.count):
        raise RequestError(f"labels has {len(chosen)} entries for {span.count} digits; give one for all, or one for each")
    return replace(span, labels=np.broadcast_to(chosen, span.count))


def _format(value: pb.ImageFormat) -> pb.ImageFormat:
    if value == pb.IMAGE_FORMAT_UNSPECIFIED:
        return pb.IMAGE_FORMAT_UINT8
    if value not in FORMAT_NAMES:
        known = ", ".join(pb.ImageFormat.Name(number) for number in FORMAT_NAMES)
        raise RequestError(f"format {value} is unknown; there are {known}")
    return value


def _priority(value: pb.Priority, default: Priority) -> Priority:
    if value == pb.PRIORITY_UNSPECIFIED:
        return default
    if value not in PRIORITIES:
        raise RequestError(f"priority {value} is unknown; there are PRIORITY_INTERACTIVE and PRIORITY_BULK")
    return PRIORITIES[value]


async def _encode(model: Model, ticket: Ticket, image_format: pb.ImageFormat, call: Call) -> bytes:
    started = time.perf_counter()
    if image_format in (pb.IMAGE_FORMAT_PNG, pb.IMAGE_FORMAT_PNG_GRID):
        # Compressing takes long enough to hold up other callers: not on the event loop.
        entries = await asyncio.to_thread(_pictures, ticket, image_format)
    else:
        entries = [[as_bytes(rows) for rows in ordered_rows(ticket)]]
    span = ticket.span
    head = pb.GenerateResponse(
        model=model.manifest.name,
        version=model.manifest.version,
        start=span.start,
        count=span.count,
        height=model.manifest.height,
        width=model.manifest.width,
        format=image_format,
        timing=pb.Timing(queue_seconds=ticket.queue_seconds, compute_seconds=ticket.compute_seconds),
    )
    if span.explicit is None:
        head.seed = span.seed
    labels = ordered_labels(ticket)
    if labels is not None:
        head.labels.extend(labels.tolist())
    response = pack_field(head.SerializeToString(), IMAGES_FIELD, entries)
    model.metrics.images(FORMAT_NAMES[image_format]).inc(span.count)
    seconds = time.perf_counter() - started
    model.metrics.encode(seconds)
    call.encoded(ticket, seconds)
    return response


def _pictures(ticket: Ticket, image_format: pb.ImageFormat) -> list[list[memoryview | bytes]]:
    pixels = joined_rows(ticket)
    if image_format == pb.IMAGE_FORMAT_PNG_GRID:
        return [[to_png(to_grid(pixels))]]
    return [[to_png(digit)] for digit in pixels]
