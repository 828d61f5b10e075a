"""Which other sites' pages may call the HTTP API (CORS), and what is answered to those that may not."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.server_process import ServerProcess

SITE, OTHER = "https://app.example.org", "http://localhost:3000"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
INFER = "/v2/models/mlp/infer"
BODY = json.dumps({"inputs": [{"name": "count", "datatype": "INT32", "shape": [1], "data": [1]}]}).encode()
FETCH = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
PROBES = ("/metrics", "/healthz", "/readyz")  # which anybody may ask, and no other site's page can read
ALLOW, CREDENTIALS = "Access-Control-Allow-Origin", "Access-Control-Allow-Credentials"


def ask(
    server: ServerProcess, method: str, path: str, headers: dict[str, str], body: bytes | None = None
) -> tuple[int, http.client.HTTPMessage]:
    host, _, port = server.http.rpartition(":")
    with closing(http.client.HTTPConnection(host, int(port), timeout=20)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.read()
        assert answer.headers[CREDENTIALS] is None
        return answer.status, answer.headers


@pytest.fixture(scope="module")
def open_to_some() -> Iterator[ServerProcess]:
    server = ServerProcess(f"--http-origins={SITE},{OTHER}")
    yield server
    server.kill()


@pytest.mark.parametrize("origin", [SITE, OTHER])
def test_a_site_that_is_named_may_ask_and_read(origin: str, open_to_some: ServerProcess) -> None:
    status, headers = ask(open_to_some, "OPTIONS", INFER, {"Origin": origin, **PREFLIGHT, **FETCH})
    assert (status, headers[ALLOW]) == (204, origin)
    assert "POST" in headers["Access-Control-Allow-Methods"]
    allowed = headers["Access-Control-Allow-Headers"].lower()
    assert {"authorization", "content-type", "inference-header-content-length", "traceparent"} <= set(allowed.split(", "))
    for method, path, body, wanted in (
        ("POST", INFER, BODY, 200),
        ("GET", "/v1/digits", None, 200),
        ("GET", "/v1/digits?count=0", None, 400),  # an error is read, too
        ("GET", "/v2/models/nobody", None, 404),
        ("GET", "/v1/nowhere", None, 404),
    ):
        status, headers = ask(open_to_some, method, path, {"Origin": origin, **FETCH}, body)
        assert (status, headers[ALLOW], headers["Access-Control-Expose-Headers"]) == (wanted, origin, "*"), path
        assert "Origin" in headers.get_all("Vary", [])


@pytest.mark.parametrize(
    "origin",
    [f"{SITE}.evil.example", "http://app.example.org", f"{SITE}:8443", "https://evil.example", "null", f"{SITE}, {OTHER}"],
)
def test_a_site_that_is_not_named_may_not(origin: str, open_to_some: ServerProcess) -> None:
    for method, path, extra in (("OPTIONS", INFER, PREFLIGHT), ("POST", INFER, {}), ("GET", "/v1/digits", {})):
        status, headers = ask(
            open_to_some, method, path, {"Origin": origin, **extra, **FETCH}, BODY if method == "POST" else None
        )
        assert (status, headers[ALLOW]) == (403, None), (method, path)
        assert "Origin" in headers.get_all("Vary", [])


@pytest.mark.parametrize("path", ["/", "/page.js", "/openapi.json", *PROBES, "/v10/digits", "/v1x"])
def test_nothing_but_the_api_is_open_to_other_sites(path: str, open_to_some: ServerProcess) -> None:
    for method, extra in (("GET", {}), ("OPTIONS", PREFLIGHT)):
        status, headers = ask(open_to_some, method, path, {"Origin": SITE, **extra, **FETCH})
        assert headers[ALLOW] is None
        assert status == (403 if path not in PROBES else 200 if method == "GET" else 405)


def test_what_is_no_page_is_answered_as_ever(open_to_some: ServerProcess) -> None:
    status, headers = ask(open_to_some, "GET", "/v1/digits", {})
    assert (status, headers[ALLOW]) == (200, None)
    # A picture that a page shows without asking to read it has no Origin.
    assert (
        ask(open_to_some, "GET", "/v1/digits?format=png", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"})[0] == 403
    )
    assert ask(open_to_some, "OPTIONS", INFER, {"Origin": SITE})[0] == 405, "no preflight"


def test_by_default_no_site_may(shared_server: ServerProcess) -> None:
    for method, path, extra in (("OPTIONS", INFER, PREFLIGHT), ("POST", INFER, {}), ("GET", "/v1/digits", {})):
        status, headers = ask(shared_server, method, path, {"Origin": SITE, **extra, **FETCH}, BODY)
        assert (status, headers[ALLOW], headers["Vary"]) == (403, None, None)


def test_every_site_may_where_that_is_said_and_a_token_is_asked_for_as_ever(
    tmp_path: Path, add_token: Callable[..., str], start_server: Callable[..., ServerProcess]
) -> None:
    token = add_token("page")
    server = start_server("--http-origins=*", f"--tokens-file={tmp_path / 'tokens.json'}")
    for origin in (SITE, "null"):
        status, headers = ask(server, "OPTIONS", INFER, {"Origin": origin, **PREFLIGHT, **FETCH})
        assert (status, headers[ALLOW]) == (204, "*"), "a browser sends no token with it"
        assert ask(server, "GET", "/v1/digits", {"Origin": origin, **FETCH})[0] == 401
        status, headers = ask(server, "GET", "/v1/digits", {"Origin": origin, "Authorization": f"Bearer {token}", **FETCH})
        assert (status, headers[ALLOW], headers["Vary"]) == (200, "*", None)
    # A page elsewhere whose own name leads here is asked for by that name, and refused.
    assert ask(server, "GET", "/v1/digits", {"Origin": SITE, "Host": "evil.example", **FETCH})[0] == 421
