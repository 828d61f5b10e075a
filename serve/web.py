"""The HTTP port: /metrics, /healthz, /readyz; serve.http_api adds the page. Everything on it only reads."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from serve.errors import StartError


def make_app(registry: CollectorRegistry | None, not_ready: Callable[[], str | None]) -> web.Application:
    """The application. ``not_ready`` says why the server is not ready, or None when it is; no ``registry``, no /metrics."""

    async def metrics(request: web.Request) -> web.Response:
        if registry is None:
            return web.Response(status=404, text="metrics are turned off: --metrics true\n")
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def readyz(request: web.Request) -> web.Response:
        reason = not_ready()
        return web.Response(text="ready\n") if reason is None else web.Response(status=503, text=reason + "\n")

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    return app


async def start_http(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, int]:
    """Listen; returns the runner, to be cleaned up, and the port. Raises StartError when the port cannot be had."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, reuse_port=False).start()
    except OSError as error:
        await runner.cleanup()
        raise StartError(f"--http-port {port} on {host} cannot be had ({error.strerror}); name another") from None
    return runner, int(runner.addresses[0][1])
