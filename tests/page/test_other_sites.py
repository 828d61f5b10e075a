"""A page of another site in a headless Chromium, which calls the HTTP API over TLS: CORS as a browser has it."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.certificates import Certificates
from tests.server_process import ServerProcess

# What the page's script does with the API's address and a token: draw a picture, ask in JSON, infer, and read an error.
CALLS = """async ([api, token]) => {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const picture = await fetch(`${api}/v1/digits?count=4&format=png&model=mlp`, { headers });
  const inputs = [{ name: "count", datatype: "INT32", shape: [1], data: [2] }];
  const json = { ...headers, "content-type": "application/json" };
  const infer = await fetch(`${api}/v2/models/mlp/infer`, { method: "POST", headers: json, body: JSON.stringify({ inputs }) });
  const refused = await fetch(`${api}/v1/digits?count=0`, { headers });
  const image = await createImageBitmap(await picture.blob());
  return {
    size: [image.width, image.height],
    model: picture.headers.get("digits-model"),
    shape: (await infer.json()).outputs[0].shape,
    refused: [refused.status, (await refused.json()).error],
  };
}"""


@pytest.fixture
def other_site(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """A page that another server on this machine has sent; its origin is not the API's."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("<!doctype html><title>another site</title>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever).start()
        context = browser.new_context(ignore_https_errors=True)
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        yield page
        context.close()
        server.shutdown()


@pytest.mark.parametrize("anyone", [False, True])
def test_a_page_of_a_site_that_is_let_in_draws_digits_with_its_token(
    anyone: bool,
    other_site: Page,
    tmp_path: Path,
    start_server: Callable[..., ServerProcess],
    add_token: Callable[..., str],
) -> None:
    tokens, token = tmp_path / "tokens.json", add_token("site")
    origin = "*" if anyone else other_site.evaluate("location.origin")
    server = start_server(*Certificates(tmp_path).flags, f"--tokens-file={tokens}", f"--http-origins={origin}")
    seen = other_site.evaluate(CALLS, [f"https://{server.https}", token])
    assert (seen["model"], seen["shape"]) == ("mlp/1", [2, 28, 28])
    assert min(seen["size"]) >= 56
    assert seen["refused"][0] == 400
    assert "count must be from 1 to" in seen["refused"][1]


@pytest.mark.parametrize("flags", [[], ["--http-origins=https://app.example.org"]])
def test_a_page_of_another_site_gets_nothing(
    flags: list[str], other_site: Page, tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server(*Certificates(tmp_path).flags, *flags)
    for path in ("/v1/digits", "/openapi.json", "/"):
        outcome = other_site.evaluate("url => fetch(url).then(answer => answer.status, String)", f"https://{server.https}{path}")
        assert outcome == "TypeError: Failed to fetch", path
    assert server.metric("digits_images_total") == 0
    own = other_site.context.new_page()
    own.goto(f"https://{server.https}/?seed=7")
    expect(own.locator("#digits img")).to_have_count(25, timeout=20_000)  # its own page, over TLS
