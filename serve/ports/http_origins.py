"""Whose requests the HTTP ports answer: under which names they are asked, and from which sites' pages (CORS)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from aiohttp import web

from serve.api.http_call import CONTENT_ENCODINGS, error_answer
from serve.observability.logs import REQUEST_ID_KEY
from serve.settings import LOOPBACK_NAMES

OPEN_TO_EVERY_NAME = re.compile(r"/metrics|/healthz|/readyz(/[^/]+)?")  # asked by address, by those who watch
API = re.compile(r"/v[12](/.*)?")  # what other sites' pages can be let in to
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]/@]+))(?::[0-9]{0,5})?", re.ASCII)
ANY_ORIGIN = "*"
# What a page may send, and for how long a browser need not ask again.
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Content-Encoding, Inference-Header-Content-Length, "
    f"{REQUEST_ID_KEY}, traceparent, tracestate",
    "Access-Control-Max-Age": "7200",
}


class Origins:
    """The sites whose pages may call the API, as their browsers name them.

    The server keeps no cookies, and lets none be sent: what a page cannot do without a token, it cannot do from here
    (WHATWG, Fetch, "HTTP-CORS protocol").
    """

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = allowed

    def allow(self, request: web.Request) -> bool:
        """Whether this is a page's request, from a site that may."""
        origin = request.headers.get("Origin") if self._allowed else None
        if origin is None or not API.fullmatch(request.path):
            return False
        return ANY_ORIGIN in self._allowed or origin.lower() in self._allowed

    def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let the page read the answer, an error too, and caches know that another site's page has another one."""
        if not self._allowed or not API.fullmatch(request.path):
            return
        by_origin = ANY_ORIGIN not in self._allowed
        if by_origin:
            response.headers.add("Vary", "Origin")
        if not by_origin or self.allow(request):  # where every site may, whoever asked: a cache hands the same answer to all
            response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"] if by_origin else ANY_ORIGIN
            response.headers["Access-Control-Expose-Headers"] = "*"


def host_name(host: str) -> str:
    """The name in a Host header, in lower case and without its port; empty where it is none."""
    found = HOST.fullmatch(host.lower())
    return (found[1] or found[2]) if found else ""


def refusing(names: Collection[str] | None, origins: Origins) -> Any:
    """Refuses what no client of this server sends, unless it is a probe. ``names`` are answered to; None: all."""

    @web.middleware
    async def check(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        if not OPEN_TO_EVERY_NAME.fullmatch(request.path):
            name = host_name(request.headers.get("Host", ""))
            # A page elsewhere could otherwise read digits by having its own name lead here.
            if names is not None and name not in names:
                return error_answer(421, f"this server does not answer to the name {name[:100]!r}; --http-names adds one")
            if origins.allow(request):
                if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                    return web.Response(status=204, headers=PREFLIGHT)
            elif _of_another_site(request, names or ()):
                return error_answer(403, "requests from another site's pages are not answered; --http-origins lets a site in")
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
