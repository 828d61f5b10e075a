"""``digits.v1.DigitGenerator``: converts messages into requests, and results into messages."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

import numpy as np

from serve.api.admission import Admission, Call
from serve.api.encoding import FIXED_64, Piece, as_bytes, as_png_grid, as_pngs, field_key, pack_field, packed_varints
from serve.api.rpc import DigitsMethod, RpcTable
from serve.batching.ticket import Priority
from serve.core.generate import Core
from serve.core.request import IMAGES, PIXELS, Addresses, Digits, DigitsRequest, Interpolation, Latents
from serve.errors import RequestError
from serve.models.model import Model
from serve.models.reconcile import VersionStatus
from serve.pb.digits.v1 import digits_pb2 as pb

SERVICE = "digits.v1.DigitGenerator"
IMAGES_KEY, LABELS_KEY = field_key(pb.GenerateResponse, "images"), field_key(pb.GenerateResponse, "labels")
FEW_LABELS = 64  # take protobuf no longer than numpy
# GenerateResponse.timing on the wire: its key and length, then two doubles with a key each.
TIMING = struct.Struct("<BBBdBd")
TIMING_KEY = field_key(pb.GenerateResponse, "timing")[0]
QUEUE_KEY, COMPUTE_KEY = (field.number << 3 | FIXED_64 for field in pb.Timing.DESCRIPTOR.fields)

PRIORITIES = {pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE, pb.PRIORITY_BULK: Priority.BULK}
ENCODINGS = {
    pb.IMAGE_FORMAT_UINT8: "uint8",
    pb.IMAGE_FORMAT_FLOAT32: "float32",
    pb.IMAGE_FORMAT_PNG: "png",
    pb.IMAGE_FORMAT_PNG_GRID: "png_grid",
}


# The fields of requests that are cheap to parse at any length.
BULK = {pb.GenerateRequest.DESCRIPTOR.fields_by_name["latents"].number: None}
# What a digit takes up in memory until its answer is sent: rows, the message, and gRPC's copy of it.
ROW_BYTES = {"uint8": 3 * 784, "float32": 3 * 4 * 784, "png": 4 * 784, "png_grid": 3 * 784}
MANY_LABELS = 1024


class DigitService:
    """The handlers of ``DigitGenerator``. They raise ServeError."""

    def __init__(self, core: Core, status: Callable[[], Sequence[VersionStatus]]) -> None:
        self._core = core
        self._status = status

    def table(self, admission: Admission, workers: ThreadPoolExecutor) -> RpcTable:
        """The methods, ready for a port."""
        table = RpcTable(SERVICE, admission, workers)
        table.digits("Generate", self._core, DigitsMethod(pb.GenerateRequest, generate, _encode, _takes_long, BULK))
        # Its rows are computed when it begins.
        interpolation = DigitsMethod(pb.InterpolateRequest, interpolate, _encode, _takes_long, {}, heavy=True)
        table.digits("Interpolate", self._core, interpolation)
        table.stream("GenerateStream", pb.GenerateStreamRequest, self.generate_stream)
        table.unary("ListModels", pb.ListModelsRequest, self.list_models)
        table.unary("GetModel", pb.GetModelRequest, self.get_model)
        table.unary("Status", pb.StatusRequest, self.status)
        return table

    async def generate_stream(self, request: pb.GenerateStreamRequest, call: Call) -> AsyncGenerator[bytes]:
        parsed = _parsed(request, _addresses(request), Priority.BULK, call)
        call.asks(parsed)
        async with aclosing(self._core.stream(parsed, request.chunk, call.hold)) as answers:
            async for digits in answers:
                started = time.perf_counter()
                encode = partial(_encode, request, digits)
                message = await asyncio.to_thread(encode) if _takes_long(request, digits) else encode()
                call.encoded(digits, time.perf_counter() - started)
                yield message

    async def list_models(self, request: pb.ListModelsRequest, call: Call) -> bytes:
        catalog = self._core.catalog
        models = [self._summary(model) for model in catalog.models()]
        return pb.ListModelsResponse(models=models, default_model=catalog.default_model).SerializeToString()

    async def get_model(self, request: pb.GetModelRequest, call: Call) -> bytes:
        model = self._core.catalog.find(request.model, request.version)
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
                max_count=self._core.max_count,
                max_count_float32=self._core.max_count_float32,
                max_batch_size=model.batcher.limits.max_batch_size,
                max_queue_images=model.batcher.limits.max_queue_images,
            ),
            training_json=json.dumps(manifest.training),
            parity_json=model.bundle.parity_json,
            precision=manifest.precision,
            tolerance=pb.Tolerance(
                images=manifest.tolerance.images,
                pixel_levels=manifest.tolerance.pixel_levels,
                pixel_identical_share=manifest.tolerance.pixel_identical_share,
            ),
            labels=manifest.labels,
            quality_json=model.bundle.quality_json,
            batch_invariant=model.batch_invariant,
        ).SerializeToString()

    async def status(self, request: pb.StatusRequest, call: Call) -> bytes:
        response = pb.StatusResponse()
        for each in self._status():
            if request.model in ("", each.model):
                response.versions.add(**asdict(each) | {"state": pb.VersionState.Value(f"VERSION_STATE_{each.state}")})
        return response.SerializeToString()

    def _summary(self, model: Model) -> pb.ModelSummary:
        name, version = model.manifest.name, model.manifest.version
        route = self._core.catalog.route(name)
        return pb.ModelSummary(
            name=name,
            version=version,
            ready=model.ready,
            default_version=version == route.default,
            traffic_share=route.share(version),
        )


def generate(request: pb.GenerateRequest, call: Call) -> DigitsRequest:
    """Raises RequestError naming the field that is wrong."""
    rows: Addresses | Latents
    if request.latents:
        if request.HasField("seed") or request.start or request.truncation:
            raise RequestError(
                "seed, start and truncation cannot go with latents: a digit has an address or a latent vector", "latents"
            )
        rows = _latents(request)
    else:
        rows = _addresses(request)
    return _parsed(request, rows, Priority.INTERACTIVE, call)


def _latents(request: pb.GenerateRequest) -> Latents:
    """The caller's own rows, in the shape that the caller says. Raises RequestError naming the field that is wrong."""
    size = len(request.latents)
    if size % 4:
        raise RequestError(f"latents has {size} bytes, which is no multiple of 4 (float32 values)", "latents")
    values = np.frombuffer(request.latents, "<f4")
    if not request.latent_size:
        return Latents(values, request.count)
    if len(values) % request.latent_size:
        text = f"latents has {size} bytes, which is no multiple of latent_size, {request.latent_size} float32 values"
        raise RequestError(text, "latents", request.latent_size)
    return Latents(values.reshape(-1, request.latent_size), request.count)


def interpolate(request: pb.InterpolateRequest, call: Call) -> DigitsRequest:
    """Raises RequestError naming the field that is wrong."""
    for name in ("begin", "end"):
        if not request.HasField(name):
            raise RequestError(f"{name} is missing; give the seed and index of both ends", name)
    begin, end = ((address.seed, address.index) for address in (request.begin, request.end))
    rows = Interpolation(begin, end, request.steps, request.truncation)
    return _parsed(request, rows, Priority.INTERACTIVE, call)


def _addresses(request: pb.GenerateRequest | pb.GenerateStreamRequest) -> Addresses:
    seed = request.seed if request.HasField("seed") else None
    return Addresses(seed, request.start, request.count, request.truncation)


def _parsed(
    request: pb.GenerateRequest | pb.GenerateStreamRequest | pb.InterpolateRequest,
    rows: Addresses | Latents | Interpolation,
    default_priority: Priority,
    call: Call,
) -> DigitsRequest:
    """The fields that all three requests share. Raises RequestError naming the one that is unknown."""
    image_format = request.format or pb.IMAGE_FORMAT_UINT8
    if image_format not in ENCODINGS:
        known = ", ".join(pb.ImageFormat.Name(number) for number in ENCODINGS)
        raise RequestError(f"format {image_format} is unknown; there are {known}", "format")
    priority = PRIORITIES.get(request.priority) if request.priority else default_priority
    if priority is None:
        raise RequestError(
            f"priority {request.priority} is unknown; there are PRIORITY_INTERACTIVE and PRIORITY_BULK", "priority"
        )
    return DigitsRequest(
        rows=rows,
        model=request.model,
        version=request.version,
        labels=request.labels,
        outputs=IMAGES if image_format == pb.IMAGE_FORMAT_FLOAT32 else PIXELS,
        encoding=ENCODINGS[image_format],
        priority=priority,
        deadline=call.deadline,
        row_bytes=ROW_BYTES[ENCODINGS[image_format]],
    )


def _takes_long(request: Any, digits: Digits) -> bool:
    """Whether encoding takes long enough to hold up other callers."""
    return request.format in (pb.IMAGE_FORMAT_PNG, pb.IMAGE_FORMAT_PNG_GRID) or digits.count > MANY_LABELS


def _encode(request: Any, digits: Digits) -> bytes:
    image_format = request.format or pb.IMAGE_FORMAT_UINT8
    entries: list[list[Piece]]
    if image_format == pb.IMAGE_FORMAT_PNG_GRID:
        entries = [[as_png_grid(digits)]]
    elif image_format == pb.IMAGE_FORMAT_PNG:
        entries = [[png] for png in as_pngs(digits)]
    else:
        entries = [[as_bytes(rows) for rows in digits.images or digits.pixels]]
    manifest = digits.model.manifest
    few, many = [], b""
    if digits.labels is not None and digits.count > FEW_LABELS:
        many = pack_field(b"", LABELS_KEY, [[packed_varints(digits.labels)]])
    elif digits.labels is not None:
        few = digits.labels.tolist()
    own = pb.GenerateResponse(seed=digits.seed, start=digits.start, count=digits.count, labels=few)
    made_by = manifest.name, manifest.version, digits.model.bundle.digest
    shared = _same_for_all(made_by, (manifest.height, manifest.width), image_format)
    timing = TIMING.pack(TIMING_KEY, TIMING.size - 2, QUEUE_KEY, digits.queue_seconds, COMPUTE_KEY, digits.compute_seconds)
    return pack_field(shared + own.SerializeToString() + many + timing, IMAGES_KEY, entries)


@lru_cache(64)
def _same_for_all(made_by: tuple[str, int, str], size: tuple[int, int], image_format: pb.ImageFormat) -> bytes:
    """The fields that every answer of a model has in common. Making them anew would cost as much as all the others."""
    (model, version, digest), (height, width) = made_by, size
    head = pb.GenerateResponse(model=model, version=version, digest=digest, height=height, width=width, format=image_format)
    return head.SerializeToString()
