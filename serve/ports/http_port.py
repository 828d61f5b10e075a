"""The HTTP ports: /metrics, /healthz and /readyz in plaintext, and the HTTP API, over TLS on a port of its own where there is a
certificate.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest

from serve.access.tls import Certificates
from serve.api.http_call import error_answer
from serve.errors import StartError
from serve.observability.logs import mute
from serve.ports.http_connections import ANSWER_HEADERS, Connections, Site, connection_limit, usable_host
from serve.ports.http_origins import OPEN_TO_EVERY_NAME, Origins, refusing
from serve.ports.http_tls import TlsSite
from serve.settings import Settings

Reason = Callable[[], str | None]
ReasonOf = Callable[[str | None], str | None]

HEAD_TIMEOUT_S = 10.0  # for a request's line and headers, from the connection's start or the answer before
GZIP = re.compile(r"\b(?:x-)?gzip\s*(?:;\s*q=([0-9.]*))?", re.ASCII)
ON_THE_OTHER_PORT = r"/{path:(v[12](/.*)?|openapi\.json)?}"


class HttpPorts:
    """The HTTP port, and the HTTPS port where there is a certificate for the API."""

    def __init__(self, settings: Settings, certificates: Certificates | None, cleanup_s: float) -> None:
        """Stopping takes at most twice ``cleanup_s``, which is for clients that do not read what they asked for."""
        self._settings = settings
        self._certificates = certificates if settings.https else None
        self._cleanup_s = cleanup_s
        self._runners: list[web.AppRunner] = []
        self.port = 0
        self.https_port: int | None = None

    async def start(self, app: web.Application, routes: Collection[web.RouteDef], max_body_bytes: int) -> None:
        """Listen: ``app`` answers probes, ``routes`` the HTTP API. Raises StartError when a port cannot be had."""
        settings = self._settings
        mute("aiohttp.server", "an HTTP connection was ended by an error in what the caller sent, or in its transport")
        try:
            if self._certificates is None:
                app.add_routes(routes)
            else:
                api = web.Application(client_max_size=max_body_bytes)
                api.add_routes(routes)
                self.https_port = await self._listen(api, "--https-port", settings.https_port, self._certificates)
                app.add_routes([web.route("*", ON_THE_OTHER_PORT, _on_port(self.https_port))])
            self.port = await self._listen(app, "--http-port", settings.http_port)
        except StartError:
            await self.stop()
            raise

    async def stop(self) -> None:
        await asyncio.gather(*(runner.cleanup() for runner in self._runners))

    async def _listen(self, app: web.Application, flag: str, port: int, certificates: Certificates | None = None) -> int:
        """A handler whose client has gone is cancelled."""
        settings, host = self._settings, self._settings.http_host
        limit = connection_limit(1 if self._certificates is None else 2)
        connections = Connections(limit, HEAD_TIMEOUT_S, OPEN_TO_EVERY_NAME.fullmatch)
        origins = Origins(settings.allowed_http_origins)

        async def finish_headers(request: web.Request, response: web.StreamResponse) -> None:
            response.headers.pop("Server", None)
            response.headers.update(ANSWER_HEADERS)
            origins.add_headers(request, response)

        app.middlewares.extend((connections.note_requests, refusing(settings.answered_http_names, origins)))
        app.on_response_prepare.append(finish_headers)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=self._cleanup_s)
        self._runners.append(runner)
        await runner.setup()
        listens = usable_host(host)
        site = (
            Site(runner, listens, port, connections)
            if certificates is None
            else TlsSite(runner, listens, port, connections, certificates.context)
        )
        try:
            await site.start()
        except OSError as error:
            raise http_port_taken(flag, host, port, error) from None
        return int(runner.addresses[0][1])


def _on_port(port: int) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def refuse(request: web.Request) -> web.Response:
        return error_answer(404, f"the HTTP API is served over TLS, on port {port} (--https-port)")

    return refuse


def http_port_taken(flag: str, host: str, port: int, error: OSError) -> StartError:
    """What to raise when the port cannot be had."""
    return StartError(f"{flag} {port} on {host} cannot be had ({error.strerror}); name another")


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
