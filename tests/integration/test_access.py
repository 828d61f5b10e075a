"""Who gets in and who does not, over the wire: certificates, tokens, limits, and their changes under load."""

from __future__ import annotations

import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serve.access.tokens import RELOAD_CHECK_S
from serve.access.tokens import main as tokens_command
from serve.client import DigitClient
from serve.client.channel import Access
from serve.files import replace_file
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from tests.certificates import Certificates
from tests.server_process import ServerProcess
from tests.waiting import wait_until

ONE = pb.GenerateRequest(model="mlp", count=1, seed=1)
GUESSES = 10_000


def secure(target: str, certificates: Certificates, *own: bytes) -> grpc.Channel:
    """A channel that trusts the authority; ``own`` is a private key and a certificate chain."""
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(certificates.ca.read_bytes(), *own))


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    """How a call ends."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def generate(channel: grpc.Channel, token: str = "") -> grpc.StatusCode:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    return code_of(lambda: pb_grpc.DigitGeneratorStub(channel).Generate(ONE, timeout=20, metadata=metadata))


def test_tls_serves_who_trusts_it_and_nobody_in_plaintext(
    certificates: Certificates, start_server: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)  # the client in this process has set it
    server = start_server(*certificates.flags)
    assert f"gRPC  {server.target} with TLS" in server.announced
    with DigitClient(server.target, access=Access(ca=certificates.ca)) as client:
        assert len(client.generate(3, model="mlp").pixels) == 3
        assert sum(len(part.pixels) for part in client.stream(500, model="mlp")) == 500
    with grpc.insecure_channel(server.target) as channel:
        assert generate(channel) is grpc.StatusCode.UNAVAILABLE
    stranger = Certificates(certificates.ca.parent / "..")
    with secure(server.target, stranger) as channel:
        assert generate(channel) is grpc.StatusCode.UNAVAILABLE
    assert "Handshake failed" in server.terminate()[1]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_older_than_1_2_is_refused(
    version: ssl.TLSVersion, certificates: Certificates, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server(*certificates.flags)
    host, _, port = server.target.rpartition(":")

    def handshake(least: ssl.TLSVersion, most: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(certificates.ca))
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.set_alpn_protocols(["h2"])
        context.minimum_version, context.maximum_version = least, most
        with socket.create_connection((host, int(port)), timeout=10) as raw, context.wrap_socket(raw, server_hostname=host) as it:
            return it.version()

    assert handshake(ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(version, version)


@pytest.mark.parametrize("who", ["nobody", "stranger", "expired", "early", "right"])
def test_a_client_certificate_must_be_there_by_the_right_authority_and_valid_now(
    who: str, certificates: Certificates, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server(*certificates.flags, f"--tls-client-ca={certificates.ca}")
    now = datetime.now(UTC)
    authority = trustme.CA() if who == "stranger" else certificates.authority
    times = {"expired": {"not_after": now - timedelta(days=1)}, "early": {"not_before": now + timedelta(days=1)}}.get(who, {})
    issued = authority.issue_cert("client", **times)
    own = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    with secure(server.target, certificates, *(() if who == "nobody" else own)) as channel:
        assert generate(channel) is (grpc.StatusCode.OK if who == "right" else grpc.StatusCode.UNAVAILABLE)


@contextmanager
def steady_calls(call: Callable[[], grpc.StatusCode]) -> Iterator[list[grpc.StatusCode]]:
    """Call again and again from two threads; yields how the calls ended so far."""
    ends: list[grpc.StatusCode] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            ends.append(call())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield ends
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def presented_certificate(target: str, ca: Path) -> bytes | None:
    host, _, port = target.rpartition(":")
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), timeout=10) as raw, context.wrap_socket(raw, server_hostname=host) as it:
        return it.getpeercert(binary_form=True)


@pytest.mark.parametrize("rotations", [5, pytest.param(100, marks=pytest.mark.long)])
def test_a_certificate_rotated_under_load_fails_no_call_and_is_taken_up(
    rotations: int, certificates: Certificates, start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server(*certificates.flags)
    seen = {presented_certificate(server.target, certificates.ca)}

    def call() -> grpc.StatusCode:
        with secure(server.target, certificates) as channel:  # a new handshake each time
            return generate(channel)

    with steady_calls(call) as ends:
        for rotation in range(rotations):
            certificates.renew()
            so_far = len(ends)
            wait_until(lambda: len(ends) > so_far + 5)  # noqa: B023  # called before the next turn
            seen.add(presented_certificate(server.target, certificates.ca))
            assert len(seen) == rotation + 2
        certificates.cert.write_text("half a certifi")
        so_far = len(ends)
        wait_until(lambda: len(ends) > so_far + 5)
    assert set(ends) == {grpc.StatusCode.OK}
    assert presented_certificate(server.target, certificates.ca) in seen
    assert server.metric("digits_access_reloads_total", what="certificate", result="ok") >= rotations
    assert server.metric("digits_access_reloads_total", what="certificate", result="failed") >= 1


def test_tokens_decide_and_health_needs_none(
    tmp_path: Path, add_token: Callable[..., str], start_server: Callable[..., ServerProcess]
) -> None:
    user = add_token("user")
    server = start_server(f"--tokens-file={tmp_path / 'tokens.json'}")
    with grpc.insecure_channel(server.target) as channel:
        assert generate(channel) is grpc.StatusCode.UNAUTHENTICATED
        assert generate(channel, user + "x") is grpc.StatusCode.UNAUTHENTICATED
        assert generate(channel, user) is grpc.StatusCode.OK
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        with DigitClient(server.target, access=Access(token=user)) as client:
            assert sum(len(part.pixels) for part in client.stream(500, model="mlp")) == 500
            assert client.get_model("mlp").latent_size == 64
    denied = {reason: server.metric("digits_access_denied_total", reason=reason) for reason in ("missing", "unknown")}
    assert denied == {"missing": 1, "unknown": 1}
    _, log = server.terminate()
    assert user not in log
    assert user.partition(".")[2] not in log


def test_a_token_revoked_under_load_is_out_at_the_next_look_at_the_file_and_others_stay(
    tmp_path: Path, add_token: Callable[..., str], start_server: Callable[..., ServerProcess]
) -> None:
    leaving, staying = add_token("leaving"), add_token("staying")
    path = tmp_path / "tokens.json"
    server = start_server(f"--tokens-file={path}")
    refused = threading.Event()
    let_in_again: list[grpc.StatusCode] = []

    def leave() -> grpc.StatusCode:
        known_as_refused = refused.is_set()  # read before the call: one that is under way at the refusal may still pass
        code = generate(channel, leaving)
        if code is grpc.StatusCode.UNAUTHENTICATED:
            refused.set()
        elif known_as_refused:
            let_in_again.append(code)
        return code

    with (
        grpc.insecure_channel(server.target) as channel,
        steady_calls(leave) as left,
        steady_calls(lambda: generate(channel, staying)) as stayed,
    ):
        wait_until(lambda: len(left) > 50 and len(stayed) > 50)
        assert tokens_command(["remove", str(path), "--name=leaving"]) == 0
        revoked = time.monotonic()
        wait_until(refused.is_set)
        assert time.monotonic() - revoked < RELOAD_CHECK_S + 10, "and what a busy neighbour may take"
        left_so_far, stayed_so_far = len(left), len(stayed)
        wait_until(lambda: len(left) > left_so_far + 50 and len(stayed) > stayed_so_far + 50)
    assert set(left) == {grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED}
    assert not let_in_again
    assert set(stayed) == {grpc.StatusCode.OK}


@pytest.mark.long
def test_a_tokens_file_rewritten_a_thousand_times_under_load_keeps_nobody_out(
    tmp_path: Path, add_token: Callable[..., str], start_server: Callable[..., ServerProcess]
) -> None:
    staying = add_token("staying")
    path = tmp_path / "tokens.json"
    one = path.read_bytes()
    add_token("another")
    server = start_server(f"--tokens-file={path}")
    both = path.read_bytes()
    with grpc.insecure_channel(server.target) as channel, steady_calls(lambda: generate(channel, staying)) as ends:
        for turn in range(1000):
            replace_file(path, one if turn % 2 else both, 0o600)
            so_far = len(ends)
            wait_until(lambda: len(ends) > so_far + 1)  # noqa: B023  # called before the next turn
    assert set(ends) == {grpc.StatusCode.OK}
    assert server.metric("digits_access_reloads_total", what="tokens", result="failed") == 0


def test_a_revoked_tokens_stream_ends_at_its_next_chunk_and_the_log_names_who_was_kept_out(
    tmp_path: Path, add_token: Callable[..., str], start_server: Callable[..., ServerProcess]
) -> None:
    """Issue: it went on until the connection's age ended it."""
    token = add_token("leaving")
    path = tmp_path / "tokens.json"
    server = start_server(f"--tokens-file={path}")
    with grpc.insecure_channel(server.target) as channel:
        request = pb.GenerateStreamRequest(count=10_000_000, chunk=64, model="mlp")
        stream = pb_grpc.DigitGeneratorStub(channel).GenerateStream(request, metadata=Access(token=token).metadata, timeout=60)
        next(stream)
        assert tokens_command(["remove", str(path), "--name=leaving"]) == 0
        revoked = time.monotonic()
        code = code_of(lambda: [None for _ in stream])
        assert time.monotonic() - revoked < 30
    assert code is grpc.StatusCode.UNAUTHENTICATED
    _, log = server.terminate()
    assert "denied: the bearer token is not known here, from 127.0.0.1" in log


@pytest.mark.long
def test_ten_thousand_guesses_over_the_wire_get_nobody_in_and_cost_nobody_else(
    tmp_path: Path, add_token: Callable[..., str], start_server: Callable[..., ServerProcess]
) -> None:
    token = add_token("jobs")
    server = start_server(f"--tokens-file={tmp_path / 'tokens.json'}")
    chance = random.Random(1)
    tenth = GUESSES // 10
    process = psutil.Process(server.process.pid)
    used_s: list[float] = []  # the server's processor time up to each tenth: it moves less than time when a neighbour is busy
    with grpc.insecure_channel(server.target) as channel:
        assert generate(channel, token) is grpc.StatusCode.OK
        ends = set()
        for number in range(GUESSES):
            if number % tenth == 0:
                used_s.append(process.cpu_times().user + process.cpu_times().system)
            ends.add(generate(channel, f"jobs.{chance.randbytes(32).hex()}"))
        used_s.append(process.cpu_times().user + process.cpu_times().system)
        assert ends == {grpc.StatusCode.UNAUTHENTICATED}
        assert generate(channel, token) is grpc.StatusCode.OK
    tenths_s = np.diff(used_s)
    assert min(tenths_s[-2:]) < 3 * max(tenths_s[:2]), "what the first guesses left behind slows the last ones"
    assert server.metric("digits_access_denied_total", reason="unknown") == GUESSES


def test_one_callers_limits_are_its_own(
    tmp_path: Path, add_token: Callable[..., str], start_server: Callable[..., ServerProcess]
) -> None:
    small, slow, free = add_token("small", "--images=500"), add_token("slow", "--requests-per-s=2"), add_token("free")
    server = start_server(f"--tokens-file={tmp_path / 'tokens.json'}", "--instances=1")
    with grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)

        def begin(token: str, count: int) -> grpc.Future:
            request = pb.GenerateRequest(model="dcgan", count=count)
            return stub.Generate.future(request, timeout=60, metadata=Access(token=token).metadata)

        # A stream holds two chunks' images for as long as it lasts.
        request = pb.GenerateStreamRequest(model="dcgan", count=10_000_000, chunk=200)
        stream = stub.GenerateStream(request, timeout=60, metadata=Access(token=small).metadata)
        assert next(stream).count == 200
        over = begin(small, 200).exception(timeout=20)
        assert over.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[union-attr]
        assert "small has 400 images in flight and asks for 200; its limit is 500" in over.details()  # type: ignore[union-attr]
        assert "grpc-retry-pushback-ms" in dict(over.trailing_metadata())  # type: ignore[union-attr]
        assert begin(free, 200).result(timeout=60).count == 200
        stream.cancel()
        cancelled = {"grpc_method": "GenerateStream", "grpc_code": "CANCELLED"}
        wait_until(lambda: server.metric("grpc_server_handled_total", **cancelled) == 1)
        wait_until(lambda: server.metric("digits_queue_images") + server.metric("digits_running_images") == 0)
        with DigitClient(server.target, access=Access(token=small)) as client:
            assert sum(len(part.pixels) for part in client.stream(1200, chunk=200, model="mlp")) == 1200, "it adapts"
        ends = [generate(channel, slow) for _ in range(10)]
        assert 2 <= ends.count(grpc.StatusCode.OK) < 10  # two at once, and two a second while it lasts
        assert set(ends) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert {generate(channel, free) for _ in range(50)} == {grpc.StatusCode.OK}
    assert server.metric("digits_access_denied_total", reason="images") == 1
    assert server.metric("digits_access_denied_total", reason="requests") == ends.count(grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_reflection_and_metrics_can_be_turned_off_and_http_changes_nothing(
    start_server: Callable[..., ServerProcess], shared_server: ServerProcess
) -> None:
    def reflects(target: str) -> grpc.StatusCode:
        with grpc.insecure_channel(target) as channel:
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            return code_of(lambda: next(iter(stub.ServerReflectionInfo(iter([request]), timeout=10))))

    assert reflects(shared_server.target) is grpc.StatusCode.OK
    server = start_server("--reflection=false", "--metrics=false")
    assert reflects(server.target) is grpc.StatusCode.UNIMPLEMENTED
    assert server.get("/metrics")[0] == 404
    assert server.get("/healthz")[0] == 200
    host, _, port = shared_server.http.rpartition(":")
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        for path in ("/metrics", "/healthz", "/readyz", "/"):
            with socket.create_connection((host, int(port)), timeout=10) as raw:
                raw.sendall(
                    f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
                )
                assert raw.recv(100).split()[1] in (b"404", b"405")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host=0.0.0.0"], "--host 0.0.0.0 would be served in plaintext"),
        (["--tls-cert=no.crt", "--tls-key=no.key"], "--tls-cert no.crt cannot be read (No such file or directory)"),
        (["--tokens-file=no.json"], "--tokens-file no.json cannot be read (No such file or directory)"),
    ],
)
def test_what_would_leave_the_door_open_stops_the_start(flags: list[str], message: str) -> None:
    command = [sys.executable, "-m", "serve", "--grpc-port=0", "--http-port=0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_line_client_gets_in_with_certificates_and_a_token(
    tmp_path: Path, certificates: Certificates, add_token: Callable[..., str], start_server: Callable[..., ServerProcess]
) -> None:
    (tmp_path / "token").write_text(add_token("person") + "\n")
    own = certificates.authority.issue_cert("client")
    (tmp_path / "own.crt").write_bytes(own.cert_chain_pems[0].bytes())
    (tmp_path / "own.key").write_bytes(own.private_key_pem.bytes())
    server = start_server(*certificates.flags, f"--tls-client-ca={certificates.ca}", f"--tokens-file={tmp_path / 'tokens.json'}")
    command = [sys.executable, "-m", "serve.client", "--target", server.target, "--out", str(tmp_path / "digits.png")]
    files = {"ca": certificates.ca, "cert": tmp_path / "own.crt", "key": tmp_path / "own.key", "token-file": tmp_path / "token"}
    flags = [f"--{name}={path}" for name, path in files.items()]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits.png").stat().st_size > 1000
    done = subprocess.run([*command, *flags[:3]], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "UNAUTHENTICATED: a bearer token is needed" in done.stderr
