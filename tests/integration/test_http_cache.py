"""What names model, version and seed may be kept, and a copy that is still good is confirmed without a run of the model."""

from __future__ import annotations

import base64
import io
import json
import ssl
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from serve.manifest import BUNDLED_DIR, MANIFEST_FILE, ONNX_FILE, parse_manifest
from serve.pictures import Way, read_origin
from tests.certificates import Certificates
from tests.integration.test_http_api import get
from tests.server_process import ServerProcess

PINNED = "/v1/digits?model=rpgan&version=1&seed=5&count=6&labels=2"
WAY = "/v1/interpolation?model=rpgan&version=1&seed=1&to_seed=2&to_start=9&steps=7"
FOR_EVER = "max-age=31536000, immutable"


def digest(name: str) -> str:
    path = BUNDLED_DIR / name / "1" / MANIFEST_FILE
    return parse_manifest(path.read_bytes(), str(path)).files[ONNX_FILE]


def tag_of(server: ServerProcess, path: str) -> str:
    status, headers, _ = get(server, path)
    assert status == 200
    tag: str = headers["ETag"]
    return tag


def images(server: ServerProcess) -> float:
    total: float = json.loads(get(server, "/v1/status")[2])["images_total"]
    return total


@pytest.mark.parametrize("path", [PINNED, f"{PINNED}&format=png", WAY, f"{WAY}&format=png"])
def test_what_names_model_version_and_seed_may_be_kept_by_everybody(shared_server: ServerProcess, path: str) -> None:
    status, headers, body = get(shared_server, path)
    assert (status, headers["Cache-Control"]) == (200, f"public, {FOR_EVER}")
    assert headers["Content-Security-Policy"], "the other headers stay"
    before = images(shared_server)
    again, kept, nothing = get(shared_server, path, **{"If-None-Match": headers["ETag"]})
    assert (again, nothing) == (304, b"")
    assert {name: kept[name] for name in ("ETag", "Cache-Control")} == {name: headers[name] for name in ("ETag", "Cache-Control")}
    assert images(shared_server) == before, "no model was run"
    assert body


@pytest.mark.parametrize(
    "path",
    [
        "/v1/digits?model=rpgan&version=1&count=6",  # the seed is drawn
        "/v1/digits?model=rpgan&seed=5",  # another version may answer tomorrow
        "/v1/digits?version=1&seed=5",  # another model may
        "/v1/digits?model=rpgan&version=0&seed=5",
        "/v1/interpolation?model=rpgan&seed=1&to_seed=2&steps=3",
        "/v1/digits?model=rpgan&version=1&seed=5&count=0",
        "/v1/digits?model=rpgan&version=9&seed=5",
        "/v1/status",
    ],
)
def test_everything_else_is_not_kept(shared_server: ServerProcess, path: str) -> None:
    _, headers, _ = get(shared_server, path, **{"If-None-Match": "*"})
    assert (headers["Cache-Control"], headers["ETag"]) == ("no-store", None)


def test_a_copy_is_known_again_as_the_standard_says(shared_server: ServerProcess) -> None:
    """RFC 9110, 13.1.2: any of a list, compared weakly, or ``*`` for whatever there is."""
    tag = tag_of(shared_server, PINNED)
    assert tag.startswith('W/"'), "on other processors the bytes may differ"
    for known in (tag, tag.removeprefix("W/"), f'"other", {tag}', f'W/"a,b" , {tag}, "c"', "*"):
        assert get(shared_server, PINNED, **{"If-None-Match": known})[0] == 304, known
    for unknown in ('"other"', tag.strip('W/"'), "", '"', "W/", '"*"', 'W/"*"', f'{tag[:-2]}x"'):
        assert get(shared_server, PINNED, **{"If-None-Match": unknown})[0] == 200, unknown
    assert get(shared_server, f"{PINNED}&truncation=-1", **{"If-None-Match": "*"})[0] == 400, "there is nothing to have a copy of"


def test_another_address_has_another_tag_and_the_same_one_the_same(shared_server: ServerProcess) -> None:
    others = [
        PINNED, f"{PINNED}&format=png", f"{PINNED}&start=1", f"{PINNED}&truncation=0.5", PINNED.replace("seed=5", "seed=6"),
        PINNED.replace("labels=2", "labels=3"), PINNED.replace("count=6", "count=5"), WAY, WAY.replace("steps=7", "steps=8"),
        WAY.replace("to_start=9", "to_start=8"), PINNED.replace("rpgan", "cdcgan"),
    ]  # fmt: skip
    tags = [tag_of(shared_server, path) for path in others]
    assert len(set(tags)) == len(others)
    head, _, query = PINNED.partition("?")
    turned = head + "?" + "&".join(reversed(query.split("&"))) + "&start=0"
    assert tag_of(shared_server, turned) == tags[0]


def test_where_callers_have_tokens_a_copy_is_its_callers_own(
    start_server: Callable[..., ServerProcess], tmp_path: Path, add_token: Callable[..., str]
) -> None:
    tokens = tmp_path / "tokens.json"
    access = {"Authorization": f"Bearer {add_token('reader')}"}
    server = start_server(f"--tokens-file={tokens}")
    status, headers, _ = get(server, PINNED, **access)
    assert (status, headers["Cache-Control"]) == (200, f"private, {FOR_EVER}")
    assert get(server, PINNED, **access, **{"If-None-Match": headers["ETag"]})[0] == 304
    refused, told, _ = get(server, PINNED, **{"If-None-Match": headers["ETag"]})
    assert (refused, told["Cache-Control"]) == (401, "no-store"), "a tag opens no door"


def test_where_callers_have_certificates_a_copy_is_its_callers_own(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    certificates = Certificates(tmp_path)
    server = start_server(*certificates.flags, f"--tls-client-ca={certificates.ca}")
    context = ssl.create_default_context(cafile=str(certificates.ca))
    context.load_cert_chain(*certificates.client())
    with urllib.request.urlopen(f"https://{server.https}{PINNED}", timeout=20, context=context) as answer:
        assert answer.headers["Cache-Control"] == f"private, {FOR_EVER}"


def test_a_copy_is_for_the_pages_that_may_read_it(start_server: Callable[..., ServerProcess]) -> None:
    site = {"Origin": "https://app.example.org", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    some, every = start_server("--http-origins=https://app.example.org"), start_server("--http-origins=*")
    tag = tag_of(some, PINNED)
    for asked, status in (({}, 200), (site, 200), ({"If-None-Match": tag}, 304), (site | {"If-None-Match": tag}, 304)):
        got, headers, _ = get(some, PINNED, **asked)
        assert (got, headers["Vary"], headers["ETag"]) == (status, "Origin", tag)
        assert headers["Access-Control-Allow-Origin"] == asked.get("Origin")
        got, headers, _ = get(every, PINNED, **asked)
        assert (got, headers["Vary"], headers["Access-Control-Allow-Origin"]) == (status, None, "*"), "a cache has one for all"


def test_every_picture_says_how_it_was_made(shared_server: ServerProcess) -> None:
    seed = 2**64 - 1
    grid = read_origin(get(shared_server, f"/v1/digits?seed={seed}&start=3&count=4&labels=7,1,0,9&truncation=1.5&format=png")[2])
    assert (grid.model, grid.version, grid.digest) == ("rpgan", 1, digest("rpgan"))
    assert (grid.seed, grid.index, grid.count, grid.labels, grid.truncation) == (seed, 3, 4, (7, 1, 0, 9), 1.5)
    listed = json.loads(get(shared_server, f"/v1/digits?seed={seed}&start=3&count=4&labels=7,1,0,9&truncation=1.5")[2])["digits"]
    assert [read_origin(base64.b64decode(each["png"])) for each in listed] == [grid.digit(offset) for offset in range(4)]
    drawn = json.loads(get(shared_server, "/v1/digits?model=mlp")[2])
    origin = read_origin(base64.b64decode(drawn["digits"][0]["png"]))
    assert (origin.model, str(origin.seed), origin.labels) == ("mlp", drawn["seed"], ()), "the seed that was drawn"
    way = json.loads(get(shared_server, WAY)[2])["digits"]
    middle = read_origin(base64.b64decode(way[3]["png"]))
    assert (middle.seed, middle.index, middle.to) == (1, 0, Way(2, 9, 7, 3))


def test_the_text_is_small_beside_the_largest_picture(shared_server: ServerProcess) -> None:
    body = get(shared_server, "/v1/digits?seed=1&count=4096&format=png")[2]
    with Image.open(io.BytesIO(body)) as picture:
        assert len(picture.info["digits"]) < 9000
