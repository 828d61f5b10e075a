"""The HTTP port: /metrics, /healthz, /readyz; ``serve.api.http`` adds the page. Everything on it only reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from serve.errors import StartError

Reason = Callable[[], str | None]


def make_app(registry: CollectorRegistry | None, not_alive: Reason, not_ready: Reason) -> web.Application:
    """The application. The two say why the server is not alive, or not ready; None when it is. No ``registry``, no /metrics."""

    async def metrics(request: web.Request) -> web.Response:
        if registry is None:
            return web.Response(status=404, text="metrics are turned off: --metrics true\n")
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    def probe(reason_of: Reason, good: str) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            reason = reason_of()
            return web.Response(text=good + "\n") if reason is None else web.Response(status=503, text=reason + "\n")

        return answer

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics)])
    app.add_routes([web.get("/healthz", probe(not_alive, "alive")), web.get("/readyz", probe(not_ready, "ready"))])
    return app


async def start_http(app: web.Application, host: str, port: int, cleanup_s: float) -> tuple[web.AppRunner, int]:
    """Listen; returns the runner, to be cleaned up, and the port. Raises StartError when the port cannot be had.

    A handler whose client has gone is cancelled. Cleaning up takes at most twice ``cleanup_s``, which is for clients that
    do not read what they asked for.
    """
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=cleanup_s)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, reuse_port=False).start()
    except OSError as error:
        await runner.cleanup()
        raise StartError(f"--http-port {port} on {host} cannot be had ({error.strerror}); name another") from None
    return runner, int(runner.addresses[0][1])
