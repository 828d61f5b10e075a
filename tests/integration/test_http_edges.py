"""What callers and browsers can do to the HTTP port, and what it costs others."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import re
import resource
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from serve.api import encoding, http_call
from serve.manifest import BUNDLED_DIR
from serve.ports.http_origins import host_name
from serve.ports.http_port import HEAD_TIMEOUT_S, takes_gzip
from tests.in_process import Running, with_server
from tests.server_process import ServerProcess
from tests.waiting import wait_until

IDLE = 600
INFER = "/v2/models/mlp/infer"
BODY = json.dumps({"inputs": [{"name": "count", "datatype": "INT32", "shape": [1], "data": [1]}]}).encode()


def where(server: ServerProcess) -> tuple[str, int]:
    host, _, port = server.http.rpartition(":")
    return host, int(port)


def ask(server: ServerProcess, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, bytes]:
    """Status, headers and body; ``_`` in a header's name is ``-``."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(http.client.HTTPConnection(*where(server), timeout=20)) as connection:
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def raw(server: ServerProcess, content: bytes) -> bytes:
    """What is answered to some bytes, until the server closes the connection."""
    with socket.create_connection(where(server), timeout=15) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(content)
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1 << 16):
                parts.append(part)
        return b"".join(parts)


@contextlib.contextmanager
def open_files(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def probed(server: ServerProcess, path: str = "/healthz") -> Iterator[list[float]]:
    """Seconds that the same probe takes again and again, on one connection, until the block ends."""
    seen: list[float] = []
    stop = threading.Event()

    def probe() -> None:
        with closing(http.client.HTTPConnection(*where(server), timeout=20)) as connection:
            while not (stop.wait(0.005) and seen):
                started = time.perf_counter()
                connection.request("GET", path)
                connection.getresponse().read()
                seen.append(time.perf_counter() - started)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        wait_until(lambda: seen)
        yield seen
    finally:
        stop.set()
        thread.join(30)


@pytest.mark.long
def test_a_probe_finds_a_place_among_600_idle_connections(start_server: Callable[..., ServerProcess]) -> None:
    with open_files(4096), ExitStack() as stack:
        server = start_server()
        for number in range(IDLE):
            connection = stack.enter_context(socket.create_connection(where(server), timeout=10))
            with contextlib.suppress(OSError):
                connection.sendall(b"" if number % 2 else b"GET / HTTP/1.1\r\nHost: localhost\r\nX:")
        begun = time.monotonic()
        for path in ("/healthz", "/readyz", "/metrics") * 10:
            started = time.perf_counter()
            assert ask(server, "GET", path)[0] == 200
            assert time.perf_counter() - started < 1
        assert time.monotonic() - begun < HEAD_TIMEOUT_S / 2, "they were idle all the while"


@pytest.mark.long
def test_requests_that_never_end_take_no_place_from_a_probe(start_server: Callable[..., ServerProcess]) -> None:
    with open_files(4096), ExitStack() as stack:
        server = start_server()
        head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n".encode()
        for _ in range(IDLE):
            connection = stack.enter_context(socket.create_connection(where(server), timeout=10))
            with contextlib.suppress(OSError):
                connection.sendall(head)
        for path in ("/healthz", "/readyz") * 10:
            started = time.perf_counter()
            assert ask(server, "GET", path)[0] == 200
            assert time.perf_counter() - started < 1
        status, headers, answer = ask(server, "GET", "/v1/digits")
        told = json.loads(answer)
        assert (status, headers["Retry-After"], told["reason"], told["retry_after_s"]) == (503, "1", "OVERLOADED", 1)


@pytest.mark.parametrize("numbers", [500_000, 1_300_000])
def test_numbers_in_json_do_not_hold_up_a_probe(numbers: int, shared_server: ServerProcess) -> None:
    """Issue: 1.3 M of them held /healthz up for 771 ms."""
    latents = {"name": "latents", "datatype": "FP32", "shape": [numbers // 50, 50]}
    body = json.dumps({"inputs": [latents]})[:-3].encode() + b', "data": [' + b"0," * (numbers - 1) + b"0]}]}"
    worst = []
    for _ in range(3):
        with probed(shared_server) as seen:
            assert ask(shared_server, "POST", INFER, body)[0] == 400
        worst.append(max(seen))
    assert min(worst) < 0.1, worst


def test_many_numbers_in_an_answer_do_not_hold_up_a_probe(shared_server: ServerProcess) -> None:
    body = BODY.replace(b'"data": [1]', b'"data": [4096]')
    worst = []
    for _ in range(3):
        with probed(shared_server) as seen:
            status, _, answer = ask(shared_server, "POST", INFER, body)
            assert status == 200
            assert ask(shared_server, "GET", "/v1/digits?count=4096&model=mlp")[0] == 200
        worst.append(max(seen))
    [output] = json.loads(answer)["outputs"]
    assert (output["shape"], len(output["data"])) == ([4096, 28, 28], 4096 * 784)
    assert min(worst) < 0.25, worst


def test_more_numbers_than_a_request_can_need_are_refused_by_their_number(shared_server: ServerProcess) -> None:
    body = BODY.replace(b'"data": [1]', b'"data": [' + b"0," * (1 << 20) + b"0]")
    status, _, answer = ask(shared_server, "POST", INFER, body)
    assert (status, "1048577 numbers" in json.loads(answer)["error"]) == (400, True)


@pytest.mark.parametrize("data", ["[[1]]", " [ [ 1 ] ] ", "[\n1\n]", "1"])
def test_numbers_in_json_may_be_nested_or_flat(data: str, shared_server: ServerProcess) -> None:
    assert ask(shared_server, "POST", INFER, BODY.replace(b"[1]}", data.encode() + b"}"))[0] == 200


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", gzip.compress(BODY, mtime=0), 200),
        ("GZIP", gzip.compress(BODY, mtime=0), 200),
        ("deflate", zlib.compress(BODY), 200),
        ("identity", BODY, 200),
        ("gzip", BODY, 400),
        ("deflate", BODY, 400),
        ("gzip", gzip.compress(BODY, mtime=0)[:-9], 400),
        ("gzip", gzip.compress(BODY, mtime=0) + b"more", 400),
        ("gzip", gzip.compress(b" " * (5 << 20), mtime=0), 400),
        ("gzip", b"", 400),
        ("br", BODY, 415),
        ("zstd", BODY, 415),
        ("gzip, gzip", gzip.compress(BODY, mtime=0), 415),
        ("compress", BODY, 415),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:20],
)
def test_a_compressed_body_is_read_or_refused_and_never_an_error_of_ours(
    encoding: str, body: bytes, status: int, shared_server: ServerProcess
) -> None:
    """Issue: a wrong gzip body was 500 with a stack trace."""
    got, headers, answer = ask(shared_server, "POST", INFER, body, Content_Encoding=encoding)
    assert got == status, answer
    assert headers["Content-Type"].startswith("application/json")
    assert status != 415 or headers["Accept-Encoding"] == "identity, gzip, deflate"


@pytest.mark.parametrize("chunks", [b"zz\r\n", b"5\r\nab", b"-1\r\nab\r\n", b"5;" + b"x" * 70_000 + b"\r\n"])
def test_a_body_in_bad_chunks_is_the_callers_mistake(chunks: bytes, shared_server: ServerProcess) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with socket.create_connection(where(shared_server), timeout=15) as connection:
        connection.sendall(head)
        time.sleep(0.05)
        connection.sendall(chunks)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(1 << 16)
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer


ACCEPTS = (
    "text/plain; version=abc",
    'text/plain; version="1.0.0"',
    "text/plain;version=1.0.0;q=0.5",
    "application/openmetrics-text; version=x",
    "application/openmetrics-text; version=1.0.0; escaping=allow-utf-8",
    "application/openmetrics-text;version=9.9.9",
    "*/*",
    "",
    "application/openmetrics-text; version=1.0.0.dev1",
    "application/openmetrics-text; version=",
    "text/plain;version=;q=1, , ;=",
    "application/openmetrics-text; version=٣.0",
    "text/plain; version=1!2.0+local",
    "application/openmetrics-text; version=2.0.0",
)


@pytest.mark.parametrize("accept", ACCEPTS)
def test_metrics_are_given_whatever_format_is_asked_for(accept: str, shared_server: ServerProcess) -> None:
    """Issue: legal Accept headers were 500 with a stack trace."""
    with closing(http.client.HTTPConnection(*where(shared_server), timeout=20)) as connection:
        connection.putrequest("GET", "/metrics")
        connection.putheader("Accept", accept.encode())
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 200
        assert b"python_info" in answer.read()
        assert answer.headers["Content-Type"].isascii()


@pytest.mark.parametrize(
    ("accepted", "taken"),
    [
        ("gzip", True),
        ("GZIP, deflate", True),
        ("deflate, gzip;q=0.5", True),
        ("gzip; q=1.000", True),
        ("br;q=1.0, gzip;q=0.001", True),
        ("", False),
        ("deflate", False),
        ("gzip;q=0", False),
        ("gzip; q=0.0, identity", False),
        ("gzip;q=0.000", False),
        ("br", False),
    ],
)
def test_an_answer_is_compressed_only_where_that_is_taken(accepted: str, taken: bool, shared_server: ServerProcess) -> None:
    assert takes_gzip(accepted) is taken
    headers = ask(shared_server, "GET", "/metrics", Accept_Encoding=accepted)[1]
    assert headers.get("Content-Encoding") == ("gzip" if taken else None)


GARBAGE = (
    b"\x16\x03\x01\x02\0",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\0 HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nA: " + b"x" * 40_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nExpect: much\r\nConnection: close\r\n\r\n",
)


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_aiohttps_own_errors_are_json_without_a_banner(content: bytes, shared_server: ServerProcess) -> None:
    head, _, body = raw(shared_server, content).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4")
    assert b"\r\nserver:" not in head.lower()
    assert b"\r\ncross-origin-resource-policy: same-origin" in head.lower()
    assert set(json.loads(body)) == {"error"}


def test_garbage_makes_no_line_with_what_was_sent(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    for number in range(100):
        raw(server, b"GET / HTTP/1.1\r\nAuthorization\0: Bearer secret-%d\r\n\r\n" % number)
        head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 6\r\n\r\n"
        raw(server, head.encode() + b"secret" + b"secret secret\r\n\r\n")
    _, log = server.terminate()
    assert "secret" not in log
    assert "Traceback" not in log
    assert len(log.splitlines()) < 20


def test_cookies_of_other_programs_on_localhost_leave_the_page_usable(shared_server: ServerProcess) -> None:
    for size, status in ((8 << 10, 200), (30 << 10, 200), (40 << 10, 431)):
        assert ask(shared_server, "GET", "/", Cookie="c=" + "x" * size)[0] == status


def test_a_head_without_end_is_cut_off(shared_server: ServerProcess) -> None:
    sent = 0
    with socket.create_connection(where(shared_server), timeout=15) as connection, contextlib.suppress(OSError):
        connection.sendall(b"GET / HTTP/1.1\r\n")
        while sent < 64 << 20:
            connection.sendall(b"A: " + b"x" * 20_000 + b"\r\n")
            sent += 20_000
    assert sent < 16 << 20


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost:8080", "localhost"),
        ("LOCALHOST", "localhost"),
        ("[::1]:8080", "::1"),
        ("[::1]", "::1"),
        ("127.0.0.1:", "127.0.0.1"),
        ("[::1]evil", ""),
        ("[::1]:8080evil", ""),
        ("[::1]@evil", ""),
        ("localhost:8080.evil", ""),
        ("evil]", ""),
        ("", ""),
        ("a:b:c", ""),
    ],
)
def test_a_host_header_is_a_name_or_none(host: str, name: str, shared_server: ServerProcess) -> None:
    assert host_name(host) == name
    assert ask(shared_server, "GET", "/v1/status", Host=host)[0] == (200 if name else 421)


@pytest.mark.parametrize("content_type", ["text/plain", "application/json", "application/x-www-form-urlencoded"])
def test_another_sites_page_can_write_nothing(content_type: str, shared_server: ServerProcess) -> None:
    own = f"http://{shared_server.http}"
    for status, headers in (
        (200, {}),
        (200, {"Origin": own}),
        (200, {"Origin": own, "Sec_Fetch_Site": "same-origin"}),
        (403, {"Origin": "http://evil.example"}),
        (403, {"Origin": "null"}),
        (403, {"Origin": "http://localhost:3000"}),
        (403, {"Sec_Fetch_Site": "cross-site"}),
        (403, {"Sec_Fetch_Site": "same-site"}),
    ):
        got, _, answer = ask(shared_server, "POST", INFER, BODY, Content_Type=content_type, **headers)
        assert got == status, headers
        assert status == 200 or set(json.loads(answer)) == {"error"}


def test_another_sites_page_can_embed_nothing_and_link_to_the_page(shared_server: ServerProcess) -> None:
    for path in ("/", "/v1/digits", "/openapi.json", "/metrics", "/healthz", "/nowhere"):
        headers = ask(shared_server, "GET", path)[1]
        assert (headers["Cross-Origin-Resource-Policy"], headers["X-Frame-Options"]) == ("same-origin", "DENY")
    foreign = {"Sec_Fetch_Site": "cross-site"}
    assert ask(shared_server, "GET", "/v1/digits?format=png", Sec_Fetch_Mode="no-cors", **foreign)[0] == 403
    assert ask(shared_server, "GET", "/v1/digits", Sec_Fetch_Mode="cors", Origin="http://evil.example", **foreign)[0] == 403
    assert ask(shared_server, "GET", "/", Sec_Fetch_Mode="navigate", **foreign)[0] == 200
    assert ask(shared_server, "GET", "/v1/digits", Sec_Fetch_Mode="cors", Sec_Fetch_Site="same-origin")[0] == 200


def test_a_page_behind_a_proxy_is_this_servers_by_its_name(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--http-names=digits.example.org")
    assert ask(server, "POST", INFER, BODY, Origin="https://digits.example.org")[0] == 200
    assert ask(server, "POST", INFER, BODY, Origin="https://digits.example.org.evil.example")[0] == 403


def test_a_client_that_takes_no_answer_is_left_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_call, "SEND_TIMEOUT_S", 0.5)

    async def test(running: Running) -> None:
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            slow.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(slow, ("127.0.0.1", running.ports.http))
            body = BODY.replace(b'"data": [1]', b'"data": [4096]')
            head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            await loop.sock_sendall(slow, head.encode() + body)
            await running.until_metric(1, "http_server_request_duration_seconds_count", status="200")
            await asyncio.sleep(1)
            received = b""
            with contextlib.suppress(ConnectionError):
                while part := await loop.sock_recv(slow, 1 << 20):
                    received += part
        length = int(re.findall(rb"Content-Length: (\d+)", received)[0])
        assert len(received) < length - (1 << 20), "the rest was given up"

    with_server(test, monkeypatch, BUNDLED_DIR)


def test_pictures_of_a_client_who_has_left_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    free = threading.Event()

    def to_png(pixels: Any, origin: Any) -> bytes:
        made.append(len(pixels))
        free.wait(10)
        return b""

    monkeypatch.setattr(encoding, "to_png", to_png)

    async def test(running: Running) -> None:
        async def asked(count: int) -> asyncio.StreamWriter:
            writer = (await asyncio.open_connection("127.0.0.1", running.ports.http))[1]
            writer.write(f"GET /v1/digits?count={count}&model=mlp HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            return writer

        try:
            others = [await asked(1) for _ in range(40)]  # every thread that encodes has something to do
            await asyncio.sleep(0.5)
            at_work = len(made)
            assert at_work < 40
            leaving = await asked(100)
            await asyncio.sleep(0.5)
            leaving.close()
            await asyncio.sleep(0.5)
        finally:
            free.set()
        await running.until_metric(40, "http_server_request_duration_seconds_count", status="200")
        assert await running.metric("http_server_request_duration_seconds_count", status="499") == 1
        assert len(made) == 40
        for other in others:
            other.close()

    with_server(test, monkeypatch, BUNDLED_DIR)
