"""Digits over HTTP, read-only: ``GET /v1/digits``, ``/v1/interpolation`` and ``/v1/status``, and the page that asks for them.

Behind them are the gRPC service's own methods, so gate, callers, limits, batcher and metrics are the same and an error has
the same text. Query parameters are the fields of the gRPC requests; ``format`` is ``json`` or ``png``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import grpc
from aiohttp import web

from serve.catalog import Catalog
from serve.errors import RequestError
from serve.metrics import Metrics, RpcMetrics
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.rpc import PUSHBACK_KEY, Call, Door
from serve.service import DigitService
from serve.version import release

SERVICE = "http"  # as the RPC metrics call it
TIMEOUT_S = 30.0
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}

RPC_SECONDS = "grpc_server_handling_seconds"
# What asks for digits, by whichever protocol; a stream's time is its caller's affair.
MEASURED_METHODS = {"Generate", "Interpolate", "ModelInfer", "/v1/digits", "/v1/interpolation"}

FORMATS = {"json": pb.IMAGE_FORMAT_PNG, "png": pb.IMAGE_FORMAT_PNG_GRID}
STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
# Nothing but what this server sends, and pictures that the page makes of it.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

# Parameter → how its text is read. Numbers in 64 bits are text in the answers: JavaScript has no such numbers.
WHOLE, REAL, TEXT = "a whole number", "a number", "text"
COMMON = {"model": TEXT, "version": WHOLE, "labels": TEXT, "truncation": REAL, "format": TEXT}
DIGITS = COMMON | {"count": WHOLE, "seed": WHOLE, "start": WHOLE}
INTERPOLATION = COMMON | {"seed": WHOLE, "start": WHOLE, "to_seed": WHOLE, "to_start": WHOLE, "steps": WHOLE}


class RefusedError(Exception):
    """A call that was turned down: its status, text and trailing metadata."""

    def __init__(self, code: grpc.StatusCode, text: str, trailing: tuple[tuple[str, str], ...]) -> None:
        super().__init__(text)
        self.code = code
        self.trailing = dict(trailing)


class HttpContext:
    """An HTTP request as ``Call`` and ``Callers`` look at a gRPC one."""

    def __init__(self, request: web.Request) -> None:
        self._request = request

    def peer(self) -> str:
        return f"ip:{self._request.remote}:0"

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [(key.lower(), value) for key, value in self._request.headers.items()]

    def time_remaining(self) -> float:
        return TIMEOUT_S

    async def abort(self, code: grpc.StatusCode, text: str, trailing: tuple[tuple[str, str], ...]) -> NoReturn:
        raise RefusedError(code, text, trailing)


class HttpApi:
    """The routes."""

    def __init__(self, service: DigitService, catalog: Catalog, door: Door, grpc_target: str) -> None:
        self._service = service
        self._catalog = catalog
        self._door = door
        self._grpc_target = grpc_target

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application."""
        api = {"/v1/digits": self._digits, "/v1/interpolation": self._interpolation, "/v1/status": self._status}
        return [web.get(path, self._guarded(path, handler)) for path, handler in api.items()] + [
            web.get(path, _file(PAGE / name, kind)) for path, (name, kind) in PAGE_FILES.items()
        ]

    def _guarded(
        self, path: str, handler: Callable[[web.Request, Call], Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        observed = RpcMetrics(self._door.metrics, "unary", SERVICE, path)

        async def handle(request: web.Request) -> web.Response:
            context: Any = HttpContext(request)
            try:
                async with Call(self._door, observed, context) as call:
                    call.enter("generate")
                    answer = await handler(request, call)
            except RefusedError as refused:
                return _refusal(refused)
            answer.headers.update(HEADERS)
            return answer

        return handle

    async def _digits(self, request: web.Request, call: Call) -> web.Response:
        given = read_query(request.query, DIGITS)
        image_format = given.pop("format")
        asked = _filled(pb.GenerateRequest(format=image_format), {"count": 1} | given)
        raw = await self._service.generate(asked, call)
        return _answer(pb.GenerateResponse.FromString(raw), image_format)

    async def _interpolation(self, request: web.Request, call: Call) -> web.Response:
        given = read_query(request.query, INTERPOLATION)
        image_format = given.pop("format")
        begin = _filled(pb.Address(), {"seed": given.pop("seed", 0), "index": given.pop("start", 0)})
        end = _filled(pb.Address(), {"seed": given.pop("to_seed", 0), "index": given.pop("to_start", 0)})
        asked = _filled(pb.InterpolateRequest(begin=begin, end=end, format=image_format), given)
        raw = await self._service.interpolate(asked, call)
        return _answer(pb.GenerateResponse.FromString(raw), image_format)

    async def _status(self, request: web.Request, call: Call) -> web.Response:
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
            for model in self._catalog.models()
        ]
        totals = _totals(self._door.metrics)
        about = {"release": release(), "grpc": self._grpc_target, "default_model": self._catalog.default_model}
        return web.json_response({**about, **totals, "models": models})


def read_query(query: Mapping[str, str], known: Mapping[str, str]) -> dict[str, Any]:
    """A query's parameters as the requests' fields have them. Raises RequestError naming the parameter."""
    values: dict[str, Any] = {"format": FORMATS["json"]}
    for name, text in query.items():
        if name not in known:
            raise RequestError(f"parameter {name[:64]!r} is unknown; there are {', '.join(known)}")
        try:
            if name == "labels":
                values[name] = [int(part) for part in text.split(",")] if text else []
            elif name == "format":
                values[name] = FORMATS[text]
            else:
                values[name] = {WHOLE: int, REAL: float, TEXT: str}[known[name]](text)
        except KeyError:
            raise RequestError(f"format must be one of {', '.join(FORMATS)}, got {text[:64]!r}") from None
        except ValueError:
            wanted = "digits joined by commas" if name == "labels" else known[name]
            raise RequestError(f"{name} must be {wanted}, got {text[:64]!r}") from None
    return values


def _filled(message: Any, fields: Mapping[str, Any]) -> Any:
    for name, value in fields.items():
        try:
            if isinstance(value, list):
                getattr(message, name).extend(value)
            else:
                setattr(message, name, value)
        except ValueError:  # protobuf's own, for a number that its field cannot hold
            raise RequestError(f"{name} is out of range: {value}") from None
    return message


def _answer(response: pb.GenerateResponse, image_format: pb.ImageFormat) -> web.Response:
    seed = str(response.seed) if response.HasField("seed") else None
    if image_format == pb.IMAGE_FORMAT_PNG_GRID:
        address = {"Digits-Model": f"{response.model}/{response.version}", "Digits-Start": str(response.start)}
        if seed is not None:
            address["Digits-Seed"] = seed
        if response.labels:
            address["Digits-Labels"] = ",".join(map(str, response.labels))
        return web.Response(body=response.images[0], content_type="image/png", headers=address)
    digits = [
        {
            "index": str(response.start + offset),
            "label": response.labels[offset] if response.labels else None,
            "png": base64.b64encode(png).decode(),
        }
        for offset, png in enumerate(response.images)
    ]
    about = {"model": response.model, "version": response.version, "seed": seed, "digits": digits}
    timing = {"queue_seconds": response.timing.queue_seconds, "compute_seconds": response.timing.compute_seconds}
    return web.json_response({**about, **timing})


def _refusal(refused: RefusedError) -> web.Response:
    headers = dict(HEADERS)
    if PUSHBACK_KEY in refused.trailing:
        headers["Retry-After"] = str(-(-int(refused.trailing[PUSHBACK_KEY]) // 1000))  # whole seconds, rounded up
    if refused.code is grpc.StatusCode.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    body = json.dumps({"error": str(refused)})
    return web.Response(status=STATUS.get(refused.code, 500), text=body, content_type="application/json", headers=headers)


def _totals(metrics: Metrics) -> dict[str, float]:
    """Counters since the start, from whose differences a reader has rates: images, and answered calls with their time."""
    images = sum(
        sample.value for family in metrics.images.collect() for sample in family.samples if sample.name.endswith("_total")
    )
    calls = seconds = 0.0
    for family in metrics.rpc_seconds.collect():
        for sample in family.samples:
            if sample.labels["grpc_method"] in MEASURED_METHODS:
                calls += sample.value if sample.name.endswith("_count") else 0
                seconds += sample.value if sample.name.endswith("_sum") else 0
    return {"images_total": images, "calls_total": calls, "seconds_total": seconds}


def _file(path: Path, kind: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    content = path.read_text()

    async def send(request: web.Request) -> web.Response:
        return web.Response(text=content, content_type=kind, headers=HEADERS)

    return send
