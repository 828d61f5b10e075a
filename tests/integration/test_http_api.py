"""Digits over HTTP: the gRPC service's own answers, limits and errors under another protocol."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import io
import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from serve.client import DigitClient
from serve.pictures import to_grid
from tests.comparing import apart
from tests.server_process import ServerProcess


def get(server: ServerProcess, path: str, **headers: str) -> tuple[int, Any, bytes]:
    """Status, headers and body."""
    request = urllib.request.Request(f"http://{server.http}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def picture(content: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(content)) as opened:
        return np.asarray(opened)


def test_json_has_the_digits_of_the_address_one_by_one(shared_server: ServerProcess) -> None:
    seed = 2**64 - 1
    status, headers, body = get(shared_server, f"/v1/digits?seed={seed}&start=3&count=4&labels=7,1,0,9&truncation=1.5")
    answer = json.loads(body)
    assert (status, headers["Content-Type"].split(";")[0], headers["Cache-Control"]) == (200, "application/json", "no-store")
    assert (answer["model"], answer["version"], answer["seed"]) == ("rpgan", 1, str(seed)), "64 bits as text"
    assert [(digit["index"], digit["label"]) for digit in answer["digits"]] == [("3", 7), ("4", 1), ("5", 0), ("6", 9)]
    with DigitClient(shared_server.target) as client:
        same = client.generate(4, seed=seed, start=3, labels=[7, 1, 0, 9], truncation=1.5)
    for digit, pixels in zip(answer["digits"], same.pixels, strict=True):
        assert apart(picture(base64.b64decode(digit["png"])), pixels) <= 1


def test_png_is_one_picture_with_the_address_in_its_headers(shared_server: ServerProcess) -> None:
    status, headers, body = get(shared_server, "/v1/digits?seed=5&count=6&labels=2&format=png")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert (headers["Digits-Model"], headers["Digits-Seed"], headers["Digits-Start"]) == ("rpgan/1", "5", "0")
    assert headers["Digits-Labels"] == "2,2,2,2,2,2"
    with DigitClient(shared_server.target) as client:
        assert apart(picture(body), to_grid(client.generate(6, seed=5, labels=2).pixels)) <= 1
    assert get(shared_server, "/v1/digits?seed=5&count=6&labels=2&format=png")[2] == body


def test_a_pictures_headers_are_none_too_long_for_clients_and_proxies(shared_server: ServerProcess) -> None:
    few, many = (get(shared_server, f"/v1/digits?seed=5&count={count}&format=png") for count in (1024, 1025))
    assert len(few[1]["Digits-Labels"].split(",")) == 1024
    assert "Digits-Labels" not in many[1]
    assert sum(len(name) + len(value) + 4 for name, value in few[1].items()) < 4096


@pytest.mark.parametrize("comma", [",", "%2C"])
def test_every_digit_of_the_largest_answer_can_be_asked_for_by_its_label(shared_server: ServerProcess, comma: str) -> None:
    labels = [index % 10 for index in range(4096)]
    status, _, body = get(shared_server, f"/v1/digits?seed=5&count=4096&labels={comma.join(map(str, labels))}")
    assert status == 200, body
    assert [digit["label"] for digit in json.loads(body)["digits"]] == labels


def test_an_unconditional_model_has_no_labels_and_an_interpolation_no_seed(shared_server: ServerProcess) -> None:
    answer = json.loads(get(shared_server, "/v1/digits?model=mlp&seed=1")[2])
    assert [digit["label"] for digit in answer["digits"]] == [None]
    way = json.loads(get(shared_server, "/v1/interpolation?seed=1&to_seed=1&to_start=5&steps=7&labels=4")[2])
    assert (way["seed"], len(way["digits"]), way["digits"][0]["label"]) == (None, 7, 4)
    with DigitClient(shared_server.target) as client:
        same = client.interpolate((1, 0), (1, 5), 7, labels=4)
    assert apart(picture(base64.b64decode(way["digits"][3]["png"])), same.pixels[3]) <= 1


@pytest.mark.parametrize(
    ("status", "text", "path"),
    [
        (400, "count must be a whole number, got 'x'", "/v1/digits?count=x"),
        (400, "count must be from 1 to 4096 for png, got 5000", "/v1/digits?count=5000"),
        (400, "count is out of range: -1", "/v1/digits?count=-1"),
        (400, "seed is out of range: 18446744073709551616", f"/v1/digits?seed={2**64}"),
        (400, "labels must be digits joined by commas, got '7;8'", "/v1/digits?labels=7;8"),
        (400, "labels is out of range", "/v1/digits?labels=-1"),
        (400, "labels must be from 0 to 9 for model rpgan/1, got 12", "/v1/digits?labels=12"),
        (400, "truncation must be a number, got ''", "/v1/digits?truncation="),
        (400, "truncation must be 0.01 or more", "/v1/digits?truncation=-2"),
        (400, "format must be one of json, png, got 'gif'", "/v1/digits?format=gif"),
        (400, "parameter 'colour' is unknown; there are model", "/v1/digits?colour=red"),
        (400, "steps must be from 2 to 4096", "/v1/interpolation?steps=1&seed=1&to_seed=2"),
        (400, "to_seed is missing; give seed, to_seed, steps", "/v1/interpolation?steps=3&seed=1"),
        (400, "seed is missing; give seed, to_seed, steps", "/v1/interpolation?steps=3"),
        (400, "count is given twice", "/v1/digits?count=1&count=2"),
        (400, "format is given twice", "/v1/digits?format=png&format=json"),
        (400, "truncation must be 0.01 or more", "/v1/digits?truncation=1e-300"),
        (400, "truncation must be a number, got 'nan'", "/v1/digits?truncation=nan"),
        (400, "count must be a whole number, got '1_000'", "/v1/digits?count=1_000"),
        (400, "count must be a whole number, got '１２'", "/v1/digits?count=%EF%BC%91%EF%BC%92"),
        (400, "count must be a whole number, got '٣'", "/v1/digits?count=%D9%A3"),
        (400, "labels must be digits joined by commas, got '1,2_0'", "/v1/digits?labels=1,2_0"),
        (404, "model 'vae' is not served; there are cdcgan, dcgan, mlp, rpgan", "/v1/digits?model=vae"),
    ],
)
def test_what_is_refused_is_named_with_its_status(shared_server: ServerProcess, status: int, text: str, path: str) -> None:
    got, headers, body = get(shared_server, path)
    assert (got, text in json.loads(body)["error"]) == (status, True), body
    assert headers["Content-Type"].startswith("application/json")


def test_status_counts_what_either_protocol_returned(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    before = json.loads(get(server, "/v1/status")[2])
    assert {model["name"]: (model["labels"], model["provider"]) for model in before["models"]} == {
        "cdcgan": (10, "cpu"), "dcgan": (0, "cpu"), "mlp": (0, "cpu"), "rpgan": (10, "cpu"),
    }  # fmt: skip
    assert (before["grpc"], before["default_model"]) == (server.target, "rpgan")
    get(server, "/v1/digits?count=5")
    with DigitClient(server.target) as client:
        client.generate(7)
    after = json.loads(get(server, "/v1/status")[2])
    assert after["images_total"] - before["images_total"] == 12
    assert after["calls_total"] - before["calls_total"] == 2
    assert 0 < after["seconds_total"] - before["seconds_total"] < 10
    for _ in range(2):
        get(server, "/v2/models/nobody/versions/7/ready")
    name, metrics = "http_server_request_duration_seconds", get(server, "/metrics")[2].decode()
    seen = re.findall(rf'^{name}_count{{method="(.+)",route="(.+)",status="(.+)"}} (\S+)$', metrics, re.MULTILINE)
    assert {(method, route, status): float(count) for method, route, status, count in seen} == {
        ("GET", "/v1/digits", "200"): 1,
        ("GET", "/v1/status", "200"): 2,
        ("GET", "/v2/models/{model}/versions/{version}/ready", "404"): 2,  # a template: what callers send is no label
    }
    assert server.metric(f"{name}_sum", route="/v1/digits") > 0
    assert 'grpc_service="http"' not in metrics


def test_limits_hold_for_http_as_well(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--caller-requests-per-s=2")
    answers = [get(server, "/v1/digits") for _ in range(6)]
    refused = [answer for answer in answers if answer[0] == 429]
    assert 1 <= len(refused) <= 5
    assert "over its 2 requests a second" in json.loads(refused[0][2])["error"]
    assert refused[0][1]["Retry-After"] == "1"


def test_a_full_queue_is_429(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max-count=256", "--max-queue-images=256", "--instances=1")
    seen: list[int] = []

    def flood() -> None:
        seen.extend(get(server, "/v1/digits?count=256&format=png")[0] for _ in range(3))

    threads = [threading.Thread(target=flood) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {200, 429}


def test_tokens_are_needed_where_grpc_needs_them(
    start_server: Callable[..., ServerProcess], tmp_path: Path, add_token: Callable[..., str]
) -> None:
    tokens, token = tmp_path / "tokens.json", add_token("reader")
    server = start_server(f"--tokens-file={tokens}")
    for path in ("/v1/digits", "/v1/interpolation?steps=3&seed=1&to_seed=2", "/v1/status"):
        status, headers, _ = get(server, path)
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert get(server, path, Authorization="Bearer reader.wrong")[0] == 401
        assert get(server, path, Authorization=f"Bearer {token}")[0] == 200
    assert get(server, "/")[0] == 200, "the page itself is open: it has a field for the token"
    for path in ("/v2", "/v2/models/mlp", "/v2/models/mlp/versions/1"):
        assert get(server, path)[0] == 401
        assert get(server, path, Authorization=f"Bearer {token}")[0] == 200
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/mlp/ready"):
        assert get(server, path)[0] == 200, "health is open to all"
    request = urllib.request.Request(f"http://{server.http}/v2/models/mlp/infer", b"{}")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    with caught.value as refused:
        assert refused.code == 401


def test_the_page_is_three_files_and_can_be_turned_off(
    shared_server: ServerProcess, start_server: Callable[..., ServerProcess]
) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, body = get(shared_server, path)
        assert (status, headers["Content-Type"].split(";")[0], len(body) > 100) == (200, kind, True)
        assert "default-src 'self'" in headers["Content-Security-Policy"]
    for path in ("/page/../../settings.py", "/..%2fsettings.py", "/index.html"):
        assert get(shared_server, path)[0] == 404
    server = start_server("--page=false")
    assert "page" not in server.announced
    for path, status in (("/", 404), ("/page.js", 404), ("/openapi.json", 404), ("/v1/digits", 200), ("/v2", 200)):
        assert get(server, path)[0] == status


def test_the_http_api_can_be_turned_off_and_probes_stay(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--page=false", "--http-api=false")
    assert "API" not in server.announced
    for path in ("/", "/page.js", "/openapi.json", "/v1/digits", "/v1/status", "/v2", "/v2/health/ready"):
        assert get(server, path)[0] == 404
    assert get(server, "/healthz")[0] == get(server, "/readyz")[0] == get(server, "/metrics")[0] == 200


def test_only_get_is_answered(shared_server: ServerProcess) -> None:
    for method in ("POST", "PUT", "DELETE"):
        request = urllib.request.Request(f"http://{shared_server.http}/v1/digits", method=method)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=20)
        caught.value.close()
        assert caught.value.code == 405


def test_errors_of_the_transport_are_json_too_and_no_banner_is_shown(shared_server: ServerProcess) -> None:
    host, _, port = shared_server.http.rpartition(":")
    for method, path, status in (("GET", "/nowhere", 404), ("POST", "/v1/digits", 405), ("GET", "/v1/digits?count=0", 400)):
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            assert answer.status == status
            assert answer.headers["Content-Type"].startswith("application/json")
            assert "Server" not in answer.headers
            assert json.loads(answer.read())["error"]


def test_another_name_than_this_servers_is_refused_but_for_probes_and_metrics(
    start_server: Callable[..., ServerProcess],
) -> None:
    """A page elsewhere could have its own name lead to this machine and read what is here (DNS rebinding)."""

    def status(server: ServerProcess, path: str, name: str) -> int:
        request = urllib.request.Request(f"http://{server.http}{path}", headers={"Host": name})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    server = start_server("--http-names=digits.example.org")
    for path in ("/", "/v1/digits", "/v1/status"):
        for name, expected in (("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("DIGITS.example.org", 200),
                               ("evil.example.com", 421), ("localhost.evil.com", 421), ("", 421)):  # fmt: skip
            assert status(server, path, name) == expected, (path, name)
    assert status(server, "/readyz", "evil.example.com") == status(server, "/metrics", "10.0.0.7") == 200


def test_metrics_are_compressed_where_that_is_taken_and_have_no_creation_times(shared_server: ServerProcess) -> None:
    request = urllib.request.Request(f"http://{shared_server.http}/metrics", headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        text = gzip.decompress(answer.read()).decode()
    assert "digits_images_total" in text
    assert "_created" not in text


def test_what_is_no_http_leaves_no_trace_in_the_log(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    host, _, port = server.http.rpartition(":")
    for garbage in (
        b"\x16\x03\x01\x02\0",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\0 HTTP/1.1\r\n\r\n",
        b"\r\n" * 9 + b"?" * 9000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nA : b\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert server.get("/v1/digits")[0] == 200
    _, log = server.terminate()
    assert "Traceback" not in log
    assert " ERROR " not in log


@pytest.mark.long
def test_half_open_connections_are_ended_and_take_no_descriptors_from_grpc() -> None:
    """Issue: 1,500 half-open connections were held, and with 256 descriptors 400 of them took gRPC down."""
    few = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); sys.argv = ['serve', *sys.argv[1:]]"
    slow = "import serve.ports.http_port as port; port.HEAD_TIMEOUT_S = 1.5"
    program = f"{few}; {slow}; import runpy; runpy.run_module('serve', run_name='__main__')"
    server = ServerProcess(module=("-c", program))
    try:
        host, _, port = server.http.rpartition(":")
        process = psutil.Process(server.process.pid)
        with contextlib.ExitStack() as stack, DigitClient(server.target) as client:
            held = [stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(200)]
            for number, connection in enumerate(held):
                with contextlib.suppress(OSError):
                    connection.sendall(b"" if number % 2 else b"GET / HTTP/1.1\r\nHost:")
            with DigitClient(server.target) as newcomer:
                assert newcomer.generate(1).model == client.generate(1).model
            assert process.num_fds() < 200
            for connection in held:
                with contextlib.suppress(OSError):
                    assert connection.recv(1) == b"", "it is ended"
        assert server.get("/readyz")[0] == 200
    finally:
        server.kill()
