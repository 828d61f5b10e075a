"""Digits over HTTP, read-only: ``GET /v1/digits``, ``/v1/interpolation`` and ``/v1/status``, and the page that uses them.

Query parameters are the fields of ``digits.v1``'s requests; ``format`` is ``json`` or ``png``. When a client disconnects before
the answer is ready, its request is cancelled. What names model, version and seed is the same for ever: browsers and proxies may
keep it, and one that asks whether its copy is still good is told so without a run of the model (RFC 9110, 13.1.2; RFC 8246).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from serve.api.admission import Admission, Call
from serve.api.encoding import as_png_grid, as_pngs
from serve.api.http_call import HEADERS, guarded
from serve.command_line import release
from serve.core.generate import Core
from serve.core.request import Addresses, Digits, DigitsRequest, Interpolation
from serve.errors import RequestError
from serve.latents import SEED_LIMIT
from serve.models.model import Model
from serve.models.reconcile import VersionStatus

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/openapi.json": ("openapi.json", "application/json"),
}

FORMATS = {"json": "png", "png": "png_grid"}  # as the query has it → the encoding
ROW_BYTES = 5 * 784  # what a digit takes up in memory until its answer is sent: rows, and pictures as text
KEPT_S = 365 * 86400  # for which the same answer may be kept
LABELS_IN_HEADER = 1024  # clients and proxies take some 4 to 8 KiB of headers
# Parameter → how its text is read. Numbers in 64 bits are text in the answers: JavaScript has no such numbers.
WHOLE, REAL, TEXT = "a whole number", "a number", "text"
# Python's own readers take more for a number than anybody means: 1_000, digits of other scripts, nan.
NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?", re.ASCII)
COMMON = {"model": TEXT, "version": WHOLE, "labels": TEXT, "truncation": REAL, "format": TEXT}
DIGITS = COMMON | {"count": WHOLE, "seed": WHOLE, "start": WHOLE}
INTERPOLATION = COMMON | {"seed": WHOLE, "start": WHOLE, "to_seed": WHOLE, "to_start": WHOLE, "steps": WHOLE}
ENDS = ("seed", "to_seed", "steps")  # what an interpolation needs
# What the parameters hold at most: as much as the fields of the same name in digits.proto.
ADDRESS_PARTS = ("seed", "start", "to_seed", "to_start")
LIMITS = {"count": 1 << 32, "steps": 1 << 32, "version": 1 << 63, **dict.fromkeys(ADDRESS_PARTS, SEED_LIMIT)}


class HttpApi:
    """The routes."""

    def __init__(
        self,
        core: Core,
        admission: Admission,
        grpc_target: str,
        status: Callable[[], Sequence[VersionStatus]],
        *,
        by_certificate: bool = False,
    ) -> None:
        """``by_certificate``: callers need one of their own, so that what one has been answered is not for others."""
        self._core = core
        self._kept_by = "private" if by_certificate or admission.accounts.by_token else "public"
        self._versions = status
        self._admission = admission
        self._grpc_target = grpc_target
        self._release = release()

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application."""
        api = {"/v1/digits": self._digits, "/v1/interpolation": self._interpolation, "/v1/status": self._status}
        return [web.get(path, guarded(self._admission, path, handler)) for path, handler in api.items()]

    async def _digits(self, request: web.Request, call: Call) -> web.Response:
        given = {"count": 1} | read_query(request.query, DIGITS)
        rows = Addresses(given.get("seed"), given.get("start", 0), given["count"], given.get("truncation", 0.0))
        return await self._answer(rows, given, call, request, pinned="seed" in given)

    async def _interpolation(self, request: web.Request, call: Call) -> web.Response:
        given = read_query(request.query, INTERPOLATION)
        for name in ENDS:
            if name not in given:
                raise RequestError(
                    f"{name} is missing; give {', '.join(ENDS)}, and with them start and to_start, or index 0 is meant",
                    name,
                )
        begin, end = ((given.get(f"{to}seed", 0), given.get(f"{to}start", 0)) for to in ("", "to_"))
        rows = Interpolation(begin, end, given.get("steps", 0), given.get("truncation", 0.0))
        return await self._answer(rows, given, call, request, pinned=True)

    async def _answer(
        self, rows: Addresses | Interpolation, given: Mapping[str, Any], call: Call, asked: web.Request, pinned: bool
    ) -> web.Response:
        """``pinned`` rows are the same for ever where model and version are named too."""
        request = DigitsRequest(
            rows=rows,
            model=given.get("model", ""),
            version=given.get("version", 0),
            labels=given.get("labels", ()),
            encoding=given["format"],
            deadline=call.deadline,
            row_bytes=ROW_BYTES,
        )
        call.asks(request)
        pinned = pinned and bool(request.model and request.version)
        if pinned and asked.if_none_match:
            tag = self._tag(request, self._core.find(request))
            if asked.headers["If-None-Match"].strip() == "*" or any(known.value == tag for known in asked.if_none_match):
                return web.Response(status=304, headers=self._kept(tag))
        digits = await self._core.generate(request, call.hold)
        started = time.perf_counter()
        as_picture = request.encoding == "png_grid"
        answer = await asyncio.to_thread(_picture if as_picture else _json, digits)  # given up when the client leaves before
        call.encoded(digits, time.perf_counter() - started)
        if pinned:
            answer.headers.update(self._kept(self._tag(request, digits.model)))
        return answer

    def _tag(self, request: DigitsRequest, model: Model) -> str:
        """What an answer is known again by: the model's file, and what was asked for."""
        what = f"{self._release} {model.bundle.digest} {request.rows} {list(request.labels)} {request.encoding}"
        return hashlib.blake2b(what.encode(), digest_size=16).hexdigest()

    def _kept(self, tag: str) -> dict[str, str]:
        """The headers of an answer that may be kept.

        The tag is a weak one: the pixels are the same within one grey level on every kind of processor, the timing is not.
        """
        return {"ETag": f'W/"{tag}"', "Cache-Control": f"{self._kept_by}, max-age={KEPT_S}, immutable"}

    async def _status(self, request: web.Request, call: Call) -> web.Response:
        catalog = self._core.catalog
        models = [
            {
                "name": model.manifest.name,
                "version": model.manifest.version,
                "labels": model.manifest.labels,
                "provider": model.provider,
                "ready": model.ready,
                "queued_images": model.batcher.queued_images,
                "running_images": model.batcher.running_images,
            }
            for model in catalog.models()
        ]
        about = {"release": release(), "grpc": self._grpc_target, "default_model": catalog.default_model}
        versions = [asdict(each) for each in self._versions()]
        return web.json_response({**about, **self._admission.metrics.totals(), "models": models, "versions": versions})


def page_routes() -> list[web.RouteDef]:
    """The page, which uses these routes, and their description."""
    return [web.get(path, _file(PAGE / name, kind)) for path, (name, kind) in PAGE_FILES.items()]


def read_query(query: Mapping[str, str], known: Mapping[str, str]) -> dict[str, Any]:
    """A query's parameters as the request has them. Raises RequestError naming the parameter."""
    values: dict[str, Any] = {}
    for name, text in query.items():
        if name not in known:
            raise RequestError(f"parameter {name[:64]!r} is unknown; there are {', '.join(known)}", name)
        if name in values:
            raise RequestError(f"{name} is given twice", name)
        try:
            numbers = text.split(",") if name == "labels" and text else [text] if known[name] in (WHOLE, REAL) else []
            if not all(NUMBER.fullmatch(number) for number in numbers):
                raise ValueError(text)  # as what int and float raise
            if name == "labels":
                values[name] = [int(part) for part in text.split(",")] if text else []
            elif name == "format":
                values[name] = FORMATS[text]
            else:
                values[name] = {WHOLE: int, REAL: float, TEXT: str}[known[name]](text)
        except KeyError:
            raise RequestError(f"format must be one of {', '.join(FORMATS)}, got {text[:64]!r}", name) from None
        except ValueError:
            wanted = "digits joined by commas" if name == "labels" else known[name]
            raise RequestError(f"{name} must be {wanted}, got {text[:64]!r}", name) from None
        if name in LIMITS and not 0 <= values[name] < LIMITS[name]:
            raise RequestError(f"{name} is out of range: {text[:64]}", name, LIMITS[name])
        if name == "labels" and any(not 0 <= label < 1 << 32 for label in values[name]):
            raise RequestError(f"labels is out of range: {text[:64]}", name)
    return {"format": FORMATS["json"]} | values


def _json(digits: Digits) -> web.Response:
    manifest = digits.model.manifest
    labels = [None] * digits.count if digits.labels is None else digits.labels.tolist()
    listed = [
        {"index": str(digits.start + offset), "label": label, "png": base64.b64encode(png).decode()}
        for offset, (label, png) in enumerate(zip(labels, as_pngs(digits), strict=True))
    ]
    seed = None if digits.seed is None else str(digits.seed)
    about = {"model": manifest.name, "version": manifest.version, "seed": seed, "digits": listed}
    timing = {"queue_seconds": digits.queue_seconds, "compute_seconds": digits.compute_seconds}
    return web.Response(body=msgspec.json.encode(about | timing), content_type="application/json")


def _picture(digits: Digits) -> web.Response:
    manifest = digits.model.manifest
    address = {"Digits-Model": f"{manifest.name}/{manifest.version}", "Digits-Start": str(digits.start)}
    if digits.seed is not None:
        address["Digits-Seed"] = str(digits.seed)
    if digits.labels is not None and digits.count <= LABELS_IN_HEADER:
        address["Digits-Labels"] = ",".join(map(str, digits.labels))
    return web.Response(body=as_png_grid(digits), content_type="image/png", headers=address)


def _file(path: Path, kind: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    content = path.read_text(encoding="utf-8")

    async def send(request: web.Request) -> web.Response:
        return web.Response(text=content, content_type=kind, headers=HEADERS)

    return send
