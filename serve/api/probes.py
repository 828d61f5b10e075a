"""/metrics, /healthz and /readyz on the HTTP port; ``serve.api.http`` adds the page. Everything on it only reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

Reason = Callable[[], str | None]


def make_app(registry: CollectorRegistry | None, not_alive: Reason, not_ready: Reason) -> web.Application:
    """The application. The two say why the server is not alive, or not ready; None when it is. No ``registry``, no /metrics."""

    async def metrics(request: web.Request) -> web.Response:
        if registry is None:
            return web.Response(status=404, text="metrics are turned off: --metrics true\n")
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        answer = web.Response(body=encode(registry), headers={"Content-Type": content_type})
        answer.enable_compression()  # where the reader takes it
        return answer

    def probe(reason_of: Reason, good: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            reason = reason_of()
            return web.Response(text=good + "\n") if reason is None else web.Response(status=503, text=reason + "\n")

        return answer

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics)])
    app.add_routes([web.get("/healthz", probe(not_alive, "alive")), web.get("/readyz", probe(not_ready, "ready"))])
    return app
