"""The HTTP port: /metrics, /healthz and /readyz; whose requests are answered: under which names, and from which pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest

from serve.api.http_call import CONTENT_ENCODINGS, error_answer
from serve.errors import StartError
from serve.observability.logs import mute
from serve.ports.http_connections import ANSWER_HEADERS, Connections, Site, connection_limit, usable_host
from serve.settings import LOOPBACK_NAMES

Reason = Callable[[], str | None]
ReasonOf = Callable[[str | None], str | None]

HEAD_TIMEOUT_S = 10.0  # for a request's line and headers, from the connection's start or the answer before
OPEN_TO_EVERY_NAME = re.compile(r"/metrics|/healthz|/readyz(/[^/]+)?")  # asked by address, by those who watch
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]/@]+))(?::[0-9]{0,5})?", re.ASCII)
GZIP = re.compile(r"\b(?:x-)?gzip\s*(?:;\s*q=([0-9.]*))?", re.ASCII)


async def start_http(
    app: web.Application, host: str, port: int, cleanup_s: float, names: Collection[str] | None
) -> tuple[web.AppRunner, int]:
    """Listen; returns the runner, to be cleaned up, and the port. Raises StartError when the port cannot be had.

    ``names`` are those in the Host header that are answered to, in lower case; None: all. A handler whose client has gone is
    cancelled. Cleaning up takes at most twice ``cleanup_s``, which is for clients that do not read what they asked for.
    """
    connections = Connections(connection_limit(), HEAD_TIMEOUT_S, OPEN_TO_EVERY_NAME.fullmatch)
    app.middlewares.extend((connections.note_requests, _refusing(names)))
    app.on_response_prepare.append(_finish_headers)
    mute("aiohttp.server", "an HTTP connection was ended by an error in what the caller sent, or in its transport")
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=cleanup_s)
    await runner.setup()
    try:
        await Site(runner, usable_host(host), port, connections).start()
    except OSError as error:
        await runner.cleanup()
        raise http_port_taken(host, port, error) from None
    return runner, int(runner.addresses[0][1])


def http_port_taken(host: str, port: int, error: OSError) -> StartError:
    """What to raise when the port cannot be had."""
    return StartError(f"--http-port {port} on {host} cannot be had ({error.strerror}); name another")


def host_name(host: str) -> str:
    """The name in a Host header, in lower case and without its port; empty where it is none."""
    found = HOST.fullmatch(host.lower())
    return (found[1] or found[2]) if found else ""


def _refusing(names: Collection[str] | None) -> Any:
    """Refuses what no client of this server sends, unless it is a probe."""

    @web.middleware
    async def check(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        if not OPEN_TO_EVERY_NAME.fullmatch(request.path):
            name = host_name(request.headers.get("Host", ""))
            # A page elsewhere could otherwise read digits by having its own name lead here.
            if names is not None and name not in names:
                return error_answer(421, f"this server does not answer to the name {name[:100]!r}; --http-names adds one")
            if _of_another_site(request, names or ()):
                return error_answer(403, "requests from another site's pages are not answered")
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in CONTENT_ENCODINGS:
            text = f"Content-Encoding must be one of {', '.join(CONTENT_ENCODINGS)}, got {encoding[:20]!r}"
            return error_answer(415, text, **{"Accept-Encoding": ", ".join(CONTENT_ENCODINGS)})
        answer: web.StreamResponse = await handler(request)
        return answer

    return check


def _of_another_site(request: web.Request, names: Collection[str]) -> bool:
    """Whether a browser says that another site's page sends this: to write something, or to show it as its own.

    Links from elsewhere are followed. What is no browser says nothing of the kind.
    """
    headers = request.headers
    if request.method in ("GET", "HEAD"):
        return headers.get("Sec-Fetch-Mode", "navigate") != "navigate" and _crosses(headers.get("Sec-Fetch-Site", ""))
    origin = headers.get("Origin")
    if origin is None:
        return _crosses(headers.get("Sec-Fetch-Site", ""))
    where = origin.lower().partition("://")[2]
    # Behind a proxy the two can differ: then the page's name is one of --http-names.
    by_proxy = host_name(where) in names and host_name(where) not in LOOPBACK_NAMES
    return not by_proxy and where != headers.get("Host", "").lower()


def _crosses(site: str) -> bool:
    return site in ("cross-site", "same-site")


async def _finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.pop("Server", None)
    response.headers.update(ANSWER_HEADERS)


def takes_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding header lets an answer be compressed (RFC 9110, 12.5.3)."""
    found = GZIP.search(accepted.lower())
    return found is not None and (found[1] is None or found[1].strip("0.") != "")


def _exposition(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The metrics, and their content type: of the formats that the reader takes."""
    try:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type.encode("ascii").decode()
    except (TypeError, ValueError):  # of a version that is none, which is echoed
        return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def make_app(
    registry: CollectorRegistry | None, not_alive: Reason, not_ready: ReasonOf, max_body_bytes: int = 1 << 20
) -> web.Application:
    """The application. The two say why the server is not alive, or a model (None: any) not ready; None when it is.

    No ``registry``, no /metrics.
    """

    async def metrics(request: web.Request) -> web.Response:
        if registry is None:
            return error_answer(404, "metrics are turned off: --metrics true")
        body, content_type = _exposition(registry, request.headers.get("Accept", ""))
        answer = web.Response(body=body, headers={"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"})
        if takes_gzip(request.headers.get("Accept-Encoding", "")):
            answer.enable_compression(web.ContentCoding.gzip)
        return answer

    def probe(reason: str | None, good: str) -> web.Response:
        return web.Response(text=good + "\n") if reason is None else web.Response(status=503, text=reason + "\n")

    async def alive(request: web.Request) -> web.Response:
        return probe(not_alive(), "alive")

    async def ready(request: web.Request) -> web.Response:
        return probe(not_ready(request.match_info.get("model")), "ready")

    app = web.Application(client_max_size=max_body_bytes)
    app.add_routes([web.get("/metrics", metrics)])
    app.add_routes([web.get("/healthz", alive), web.get("/readyz", ready), web.get("/readyz/{model}", ready)])
    return app
