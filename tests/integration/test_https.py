"""The HTTP API over TLS: who gets in, what a caller without TLS costs others, and clients that are not ours."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import trustme

from serve.client import DigitClient
from serve.client.channel import Access
from tests.certificates import Certificates
from tests.server_process import ServerProcess
from tests.waiting import wait_until

ONE = "/v1/digits?count=1&model=mlp&seed=7"
# With 256 descriptors, of which each HTTP port takes 32 for connections, and little time for a head.
FEW = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); sys.argv = ['serve', *sys.argv[1:]]"
HEAD_S = 3.0
HURRIED = f"import serve.ports.http_port as port; port.HEAD_TIMEOUT_S = {HEAD_S}"
SILENT = 150
REFUSED = r"SSL|[Rr]eset|closed|Broken"  # by TLS, or by the connection's end
RUN = "import runpy; runpy.run_module('serve', run_name='__main__')"


def where(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def trusting(ca: Path, own: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    if own is not None:
        context.load_cert_chain(*own)
    return context


def ask(address: str, path: str, context: ssl.SSLContext, token: str = "", **headers: str) -> tuple[int, Any]:
    """Status, and the answer's JSON or text. Raises OSError."""
    named = {name.replace("_", "-"): value for name, value in headers.items()} | (
        {"Authorization": f"Bearer {token}"} if token else {}
    )
    with closing(http.client.HTTPSConnection(*where(address), timeout=20, context=context)) as connection:
        connection.request("GET", path, headers=named)
        answer = connection.getresponse()
        body = answer.read()
        return answer.status, json.loads(body) if "json" in answer.headers.get("Content-Type", "") else body.decode()


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Certificates]]:
    """A server with TLS, for tests that leave it as it was."""
    certificates = Certificates(tmp_path_factory.mktemp("tls"))
    server = ServerProcess(*certificates.flags)
    yield server, certificates
    server.kill()


def test_digits_are_had_over_tls_alone_and_probes_and_metrics_in_plaintext(secure: tuple[ServerProcess, Certificates]) -> None:
    server, certificates = secure
    context = trusting(certificates.ca)
    assert f"page  https://{server.https}/" in server.announced
    status, answer = ask(server.https, ONE, context)
    assert (status, answer["model"], len(answer["digits"])) == (200, "mlp", 1)
    assert ask(server.https, "/", context)[0] == ask(server.https, "/v2/health/ready", context)[0] == 200
    assert {ask(server.https, path, context)[0] for path in ("/metrics", "/healthz", "/readyz")} == {404}
    assert {server.get(path)[0] for path in ("/metrics", "/healthz", "/readyz", "/readyz/mlp")} == {200}
    port = server.https.rpartition(":")[2]
    for path in (ONE, "/", "/openapi.json", "/v2", "/v2/models/mlp"):
        status, text = server.get(path)
        assert (status, json.loads(text)["error"]) == (404, f"the HTTP API is served over TLS, on port {port} (--https-port)")
    assert server.metric("http_server_request_duration_seconds_count", route="/v1/digits", status="200") >= 1


def test_nobody_is_answered_in_plaintext_nor_who_does_not_trust_the_certificate(
    secure: tuple[ServerProcess, Certificates], tmp_path: Path
) -> None:
    server, _ = secure
    with socket.create_connection(where(server.https), timeout=15) as connection:
        connection.sendall(b"GET /v1/digits HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(4096):
                answer += part
        assert b"HTTP/1.1" not in answer
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(server.https, ONE, trusting(Certificates(tmp_path).ca))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_older_than_1_2_is_refused(version: ssl.TLSVersion, secure: tuple[ServerProcess, Certificates]) -> None:
    server, certificates = secure
    for least, most, good in ((ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2, True), (version, version, False)):
        context = trusting(certificates.ca)
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version, context.maximum_version = least, most
        with contextlib.nullcontext() if good else pytest.raises((ssl.SSLError, ConnectionError)):
            assert ask(server.https, ONE, context)[0] == 200


def test_tokens_decide_over_https_too(
    tmp_path: Path, certificates: Certificates, add_token: Callable[..., str], start_server: Callable[..., ServerProcess]
) -> None:
    token = add_token("user", "--images=8")
    server = start_server(*certificates.flags, f"--tokens-file={tmp_path / 'tokens.json'}")
    context = trusting(certificates.ca)
    for path in (ONE, "/v1/status", "/v2", "/v2/models/mlp"):
        assert ask(server.https, path, context)[0] == ask(server.https, path, context, token + "x")[0] == 401
        assert ask(server.https, path, context, token)[0] == 200
    assert ask(server.https, "/v2/health/ready", context)[0] == 200
    status, answer = ask(server.https, "/v1/digits?count=9&model=mlp", context, token)
    assert (status, "its limit is 8" in answer["error"]) == (429, True)
    assert server.metric("digits_access_denied_total", reason="missing") == 4
    assert token.partition(".")[2] not in server.terminate()[1]


def test_a_client_certificate_is_asked_for_where_grpc_asks_for_one(
    certificates: Certificates, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server(*certificates.flags, f"--tls-client-ca={certificates.ca}")
    expired = {"not_after": datetime.now(UTC) - timedelta(days=1)}
    for own in (lambda: None, lambda: certificates.client(trustme.CA()), lambda: certificates.client(**expired)):
        with pytest.raises(OSError, match=REFUSED):
            ask(server.https, ONE, trusting(certificates.ca, own()))
    assert ask(server.https, ONE, trusting(certificates.ca, certificates.client()))[0] == 200
    assert server.get("/readyz")[0] == 200, "whoever probes has no certificate"


def test_certificates_and_authorities_are_taken_up_as_they_change_and_open_connections_stay(
    certificates: Certificates, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server(*certificates.flags, f"--tls-client-ca={certificates.ca}")
    old = trusting(certificates.ca, certificates.client())
    with closing(http.client.HTTPSConnection(*where(server.https), timeout=20, context=old)) as kept:
        kept.request("GET", ONE)
        assert kept.getresponse().read()
        certificates.cert.write_text("half a certifi")
        assert ask(server.https, ONE, old)[0] == 200, "what cannot be used changes nothing"
        certificates.authority = trustme.CA()
        certificates.authority.cert_pem.write_to_path(certificates.ca)
        certificates.renew()
        new = trusting(certificates.ca, certificates.client())
        assert ask(server.https, ONE, new)[0] == 200, "from the next handshake on"
        old.load_verify_locations(certificates.ca)
        with pytest.raises(OSError, match=REFUSED):
            ask(server.https, ONE, old)
        kept.request("GET", ONE)
        assert kept.getresponse().status == 200
    counted = {
        result: server.metric("digits_access_reloads_total", what="certificate", result=result) for result in ("ok", "failed")
    }
    assert counted["ok"] >= 1
    assert counted["failed"] >= 1


def silent(address: str, number: int, context: ssl.SSLContext) -> socket.socket:
    """A connection that says nothing: before TLS, in its first message's middle, behind the handshake, or at its end."""
    connection = socket.create_connection(where(address), timeout=20)
    with contextlib.suppress(OSError):
        if number % 4 == 1:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        if number % 4 >= 2:
            connection = context.wrap_socket(connection, server_hostname="127.0.0.1")
        if number % 4 == 3:  # TLS ends by a word from either side, for which asyncio waits 30 s
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    return connection


def test_callers_who_open_connections_and_say_nothing_are_bounded_and_keep_nobody_out(certificates: Certificates) -> None:
    """A TLS server of asyncio tells of a connection when its handshake is over: until then it would be unbounded."""
    program = f"{FEW}; {HURRIED}; {RUN}"
    server = ServerProcess(*certificates.flags, module=("-c", program))
    try:
        context = trusting(certificates.ca)
        process = psutil.Process(server.process.pid)
        ask(server.https, ONE, context)
        before = process.num_fds()
        with ExitStack() as stack, DigitClient(server.target, access=Access(ca=certificates.ca)) as client:
            held = [stack.enter_context(closing(silent(server.https, number, context))) for number in range(SILENT)]
            assert process.num_fds() - before <= 32 + 4
            assert ask(server.https, ONE, context)[0] == 200, "the one that has waited longest makes room"
            assert len(client.generate(1, model="mlp").pixels) == 1
            assert server.get("/readyz")[0] == 200
            for connection in held:  # those that still have a place are given up in a head's time
                with contextlib.suppress(OSError):
                    while connection.recv(4096):  # a session's tickets
                        pass
            wait_until(lambda: process.num_fds() <= before + 4)
        assert ask(server.https, ONE, context)[0] == 200
        status, log = server.terminate()
        assert status == 0
        assert "Traceback" not in log
        assert " ERROR " not in log
    finally:
        server.kill()


def test_garbage_leaves_no_trace_in_the_log(certificates: Certificates, start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(*certificates.flags)
    for garbage in (b"\x16\x03\x01\x02\0", b"\x80\x2e\x01\x00\x02", b"\0" * 9000, b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b""):
        with socket.create_connection(where(server.https), timeout=10) as connection, contextlib.suppress(OSError):
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert ask(server.https, ONE, trusting(certificates.ca))[0] == 200
    _, log = server.terminate()
    assert "Traceback" not in log
    assert " ERROR " not in log
    assert " WARNING " not in log


def test_stopping_waits_for_no_handshake(certificates: Certificates, start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(*certificates.flags)
    with ExitStack() as stack:
        for number in range(9):
            stack.enter_context(closing(silent(server.https, number, trusting(certificates.ca))))
        started = time.monotonic()
        status, log = server.terminate()
        assert (status, "Traceback" in log) == (0, False)
        assert time.monotonic() - started < 8


def test_a_burst_of_handshakes_does_not_hold_up_a_probe(secure: tuple[ServerProcess, Certificates]) -> None:
    """The costly part of all of them at once: 200 first messages that have been held back."""
    server, certificates = secure
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting(certificates.ca).wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(where(server.https), timeout=20)) for _ in range(200)]
        worst = []
        stop = threading.Event()

        def probe() -> None:
            while not stop.is_set():
                started = time.perf_counter()
                assert server.get("/healthz")[0] == 200
                worst.append(time.perf_counter() - started)

        thread = threading.Thread(target=probe)
        thread.start()
        wait_until(lambda: len(worst) > 5)
        for connection in held:
            connection.sendall(hello)
        so_far = len(worst)
        wait_until(lambda: len(worst) > so_far + 20)
        stop.set()
        thread.join(30)
    assert max(worst) < 2, sorted(worst)[-5:]  # a probe's own limit


def test_the_https_port_that_is_taken_is_named(certificates: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flag = f"--https-port={taken.getsockname()[1]}"
        with pytest.raises(AssertionError, match=f"error: {flag.replace('=', ' ')} on 127.0.0.1 cannot be had"):
            ServerProcess(*certificates.flags, flag)


def test_tritonclient_is_answered_over_tls_with_a_token_as_over_grpc(
    tmp_path: Path,
    certificates: Certificates,
    add_token: Callable[..., str],
    start_server: Callable[..., ServerProcess],
    by_triton: Callable[..., dict[str, Any]],
) -> None:
    token = add_token("triton")
    server = start_server(*certificates.flags, f"--tokens-file={tmp_path / 'tokens.json'}")
    seen = by_triton("triton_http_caller.py", f"localhost:{server.https.rpartition(':')[2]}", str(certificates.ca), token)
    assert (seen["live"], seen["ready"], seen["server"]["name"]) == (True, True, "digits-serve")
    with DigitClient(server.target, access=Access(ca=certificates.ca, token=token)) as client:
        own = client.generate(5, model="mlp", seed=2**64 - 1, start=1000).pixels.astype(int)
    for binary in (True, False):
        assert int(np.abs(np.array(seen[f"pixels {binary}"]) - own).max()) <= 1


def test_curl_with_a_ca_a_token_and_another_sites_preflight(
    tmp_path: Path, certificates: Certificates, add_token: Callable[..., str], start_server: Callable[..., ServerProcess]
) -> None:
    token = add_token("curl")
    site = "https://app.example.org"
    server = start_server(*certificates.flags, f"--tokens-file={tmp_path / 'tokens.json'}", f"--http-origins={site}")

    def curl(*arguments: str) -> tuple[int, list[str], str]:
        command = ["curl", "--silent", "--show-error", "--include", "--max-time", "20", *arguments]
        done = subprocess.run(command, capture_output=True, timeout=30, check=True)
        head, _, body = done.stdout.decode(errors="replace").partition("\r\n\r\n")
        first, *headers = head.split("\r\n")
        return int(first.split()[1]), [header.lower() for header in headers], body

    api = f"https://localhost:{server.https.rpartition(':')[2]}"
    trust, bearer = ("--cacert", str(certificates.ca)), ("--header", f"Authorization: Bearer {token}")
    assert curl(*trust, *bearer, f"{api}/v1/digits?count=4&format=png")[0] == 200
    assert curl(*trust, f"{api}/v1/digits")[0] == 401
    wanted = ("--header", f"Origin: {site}", "--header", "Access-Control-Request-Method: POST")
    status, headers, body = curl(*trust, "--request", "OPTIONS", *wanted, f"{api}/v2/models/mlp/infer")
    assert (status, body) == (204, "")
    assert f"access-control-allow-origin: {site}" in headers
    assert not [header for header in headers if header.startswith("access-control-allow-credentials")]
    done = subprocess.run(["curl", "--silent", f"{api}/v1/digits"], capture_output=True, timeout=30, check=False)
    assert done.returncode == 60, "curl's own: the certificate cannot be verified"
