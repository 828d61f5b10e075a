"""Wraps every HTTP handler that answers for a model: admission, timing, errors in JSON. Knows no API."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from functools import cache, partial
from typing import TypeAlias

import grpc
from aiohttp import web

from serve.access.identity import Caller, Scope
from serve.api.admission import Admission, Call
from serve.api.status import Refusal
from serve.errors import ExpiredError
from serve.observability.call_metrics import HttpMetrics
from serve.observability.logs import REQUEST_ID_KEY
from serve.observability.tracing import Described, server_of, trace_context

TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 60.0  # for a client to take its answer: until then it is held here
CONTENT_ENCODINGS = ("identity", "gzip", "deflate")  # of a request's body
# Nothing but what this server sends, and pictures that the page makes of it.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Handler: TypeAlias = Callable[[web.Request, Call], Awaitable[web.Response]]
Guarded: TypeAlias = Callable[[web.Request], Awaitable[web.Response]]


def guarded(admission: Admission, route: str, handler: Handler, scope: Scope = "generate") -> Guarded:
    """A handler for aiohttp. ``route`` is the call's in the metrics; ``scope`` is what a caller needs."""
    observed = cache(lambda method: HttpMetrics(admission.metrics, method, route))  # of the methods that aiohttp lets come here

    async def handle(request: web.Request) -> web.Response:
        traced = admission.tracing is not None
        describe = partial(_described, request, route) if traced else None
        call = Call(admission, observed(request.method), _caller(request, traced=traced), time.monotonic() + TIMEOUT_S, describe)
        call.enter_log()
        try:
            try:
                call.admit(scope)
                answer = await _in_time(handler(request, call))
                call.answered(answer.status)
            except asyncio.CancelledError:
                call.left()
                raise
            except Exception as error:
                answer = refused(call.failed(error))
            for header, value in HEADERS.items():
                answer.headers.setdefault(header, value)
            # Sent from here, so that a drain waits until it is.
            await _send(answer, request)
            return answer
        finally:
            call.sent()

    return handle


async def _send(answer: web.Response, request: web.Request) -> None:
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await answer.prepare(request)
            await answer.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError from None


async def _in_time(answer: Awaitable[web.Response]) -> web.Response:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await answer
    except TimeoutError:
        raise ExpiredError(f"there was no answer within {TIMEOUT_S:g} s") from None


def _caller(request: web.Request, *, traced: bool) -> Caller:
    headers = request.headers
    authorization = headers.getall("Authorization", [])
    trace = trace_context((key.lower(), value) for key, value in headers.items()) if traced else {}
    return Caller(lambda: request.remote or "", authorization, headers.get(REQUEST_ID_KEY, ""), trace)


def _described(request: web.Request, route: str) -> Described:
    about = {
        "http.request.method": request.method,
        "http.route": route,
        "url.scheme": request.scheme,
        "url.path": request.path,
        "url.query": request.query_string,
        "network.protocol.version": f"{request.version.major}.{request.version.minor}",
        "client.address": request.remote,
        "user_agent.original": request.headers.get("User-Agent"),
    }
    return Described(f"{request.method} {route}", {**about, **server_of(request.host)}, of_http=True)


def error_answer(status: int, text: str, **headers: str) -> web.Response:
    """An error as JSON, in the common form."""
    return web.Response(status=status, text=json.dumps({"error": text}), content_type="application/json", headers=headers)


def refused(refusal: Refusal) -> web.Response:
    """A refusal as JSON, with what programs are told."""
    text = json.dumps(refusal.fields())
    answer = web.Response(status=refusal.http_status, text=text, content_type="application/json")
    if refusal.retry_after_s is not None:
        answer.headers["Retry-After"] = str(math.ceil(refusal.retry_after_s))
    if refusal.code is grpc.StatusCode.UNAUTHENTICATED:
        answer.headers["WWW-Authenticate"] = "Bearer"
    return answer
