"""Both clients where something is wrong: they end within seconds, and say what it is."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme

from serve.client import Access, AsyncDigitClient, DigitClient, DigitError, Digits, asyncio_client, client, diagnosis
from serve.ports import grpc_port
from tests.certificates import Certificates
from tests.fake_generator import blank, generating
from tests.in_process import Running, with_server
from tests.server_process import ServerProcess, free_port

SECONDS = 20  # far below the 30 s of a call's own timeout, and a loaded machine's
CODE = grpc.StatusCode
KINDS = ("blocking", "asyncio")


def generate(kind: str, target: str, *arguments: Any, call: dict[str, Any] | None = None, **options: Any) -> Digits:
    """One call of a new client of this kind."""
    if kind == "blocking":
        with DigitClient(target, *arguments, **options) as caller:
            return caller.generate(**call or {})

    async def ask() -> Digits:
        async with AsyncDigitClient(target, *arguments, **options) as caller:
            return await caller.generate(**call or {})

    return asyncio.run(ask())


def stream(kind: str, target: str, count: int, between: Callable[[], None] = lambda: None, **options: Any) -> list[int]:
    """The starts of a stream's chunks; ``between`` is called after each."""
    starts = []

    def take(part: Digits) -> None:
        starts.append(part.start)
        between()

    if kind == "blocking":
        with DigitClient(target, **options) as caller:
            for part in caller.stream(count, seed=7, chunk=100):
                take(part)
        return starts

    async def ask() -> None:
        async with AsyncDigitClient(target, **options) as caller:
            async for part in caller.stream(count, seed=7, chunk=100):
                take(part)

    asyncio.run(ask())
    return starts


@contextlib.contextmanager
def fails(text: str, code: grpc.StatusCode = CODE.UNAVAILABLE) -> Iterator[None]:
    began = time.monotonic()
    with pytest.raises(DigitError, match=text) as caught:
        yield
    assert time.monotonic() - began < SECONDS
    assert caught.value.code() is code
    assert str(caught.value).count(caught.value.details()) == 1
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "the transport's ten lines are not shown"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds because of its bounds takes fewer."""
    for module in (client, asyncio_client):
        monkeypatch.setattr(module, "CONNECT_S", 2.0)


@pytest.fixture(params=["blocking", pytest.param("asyncio", marks=pytest.mark.long)])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(name="free_port")
def unused_port() -> int:
    return free_port()


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("call", [generate, lambda kind, target, **options: stream(kind, target, 500, **options)])
def test_nobody_is_there(kind: str, call: Callable[..., Any], waits: bool, free_port: int) -> None:
    with fails(f"nobody answers at 127.0.0.1:{free_port} "):
        call(kind, f"127.0.0.1:{free_port}", wait_for_server=waits)


def test_an_http_port_is_named(kind: str, shared_server: ServerProcess) -> None:
    with fails(f"{shared_server.http} is an HTTP port"):
        generate(kind, shared_server.http)


@pytest.mark.parametrize("answers", [True, False])
def test_what_takes_connections_and_never_speaks_is_named(kind: str, answers: bool) -> None:
    with socket.socket() as silent, contextlib.ExitStack() as filling:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8 if answers else 0)
        host, port = silent.getsockname()
        if not answers:  # its queue is full: the system leaves out what more would connect
            for _ in range(3):
                one = filling.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex((host, port))
        with fails("says nothing" if answers else "nobody answers|came about"):
            generate(kind, f"{host}:{port}")


def test_a_server_that_hangs_ends_a_call_with_the_calls_own_time(kind: str, start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    with contextlib.ExitStack() as stopped:

        def stop() -> None:
            server.process.send_signal(signal.SIGSTOP)
            stopped.callback(server.process.send_signal, signal.SIGCONT)

        with fails("no answer from .* within 3 s|says nothing|came about", CODE.UNAVAILABLE):
            stream(kind, server.target, 1_000_000, stop, timeout_s=3.0)  # in which a busy machine answers the first time


@pytest.mark.long
def test_a_server_that_is_not_ready_is_told_from_one_that_does_not_answer(
    kind: str, start_server: Callable[..., ServerProcess]
) -> None:
    """Clients keep away from a server that says so, and gRPC says nothing of it."""
    server = start_server("--drain-grace-s=60")
    server.process.send_signal(signal.SIGTERM)
    for options in ({"timeout_s": 2.0}, {"wait_for_server": False}):
        with fails(f"the server at {server.target} says that it is not ready"):
            generate(kind, server.target, **options)  # type: ignore[arg-type]


def test_a_slow_answer_is_told_from_nobody(kind: str) -> None:
    release = threading.Event()

    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        release.wait(SECONDS)
        return blank()

    def slow_stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield blank(100)
        release.wait(SECONDS)

    with generating(Generate=slow, GenerateStream=slow_stream) as target:
        try:
            with fails(f"no answer from {target} within 2 s", CODE.DEADLINE_EXCEEDED):
                generate(kind, target, 2)
            with fails(f"no answer from {target} within 2 s", CODE.DEADLINE_EXCEEDED):
                stream(kind, target, 500, timeout_s=2)
        finally:
            release.set()


def test_calls_of_a_client_that_is_closed_meanwhile_say_so_and_cancelled_tasks_are_cancelled() -> None:
    release, begun = threading.Event(), threading.Semaphore(0)

    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        begun.release()
        release.wait(SECONDS)
        return blank()

    def slow_stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield slow(request, context)

    async def end(close: bool) -> list[Any]:
        caller = AsyncDigitClient(target)
        tasks = [asyncio.create_task(caller.generate()), asyncio.create_task(anext(caller.stream(5)))]  # type: ignore[arg-type]
        for _ in tasks:
            await asyncio.to_thread(begun.acquire)
        if close:
            await caller.close()
        else:
            for task in tasks:
                task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        await caller.close()
        return [*ended]

    with generating(Generate=slow, GenerateStream=slow_stream) as target:
        try:
            assert [str(each) for each in asyncio.run(end(close=True))] == ["CANCELLED: the client is closed"] * 2
            assert [type(each) for each in asyncio.run(end(close=False))] == [asyncio.CancelledError] * 2
            with DigitClient(target) as caller:
                closing = threading.Thread(target=lambda: (begun.acquire(), caller.close()))
                closing.start()
                with fails("closed", CODE.CANCELLED):
                    caller.generate()
                closing.join()
        finally:
            release.set()


def test_a_stream_whose_reader_is_slow_is_not_late(kind: str) -> None:
    """What is bounded is the wait for a chunk, not what is done with it."""

    def chunks(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from (blank(100, request.start), blank(100, request.start + 100))

    with generating(GenerateStream=chunks) as target:
        assert stream(kind, target, 200, lambda: time.sleep(2.5), timeout_s=2.0) == [0, 100]


def test_a_stream_ends_when_the_server_is_killed_half_way(kind: str, start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    with fails(f"nobody answers at {server.target}"):
        stream(kind, server.target, 10_000_000, server.process.kill, timeout_s=5.0)


def test_a_call_waits_for_a_server_that_is_restarted(free_port: int) -> None:
    """Once there was a connection, a call waits for the next one within its own time."""
    answer: dict[str, Any] = {"Generate": lambda request, context: blank()}
    with contextlib.ExitStack() as again, DigitClient(f"127.0.0.1:{free_port}") as caller:
        with generating(free_port, **answer):
            caller.generate()
        threading.Timer(1, lambda: again.enter_context(generating(free_port, **answer))).start()
        assert len(caller.generate()) == 1


@pytest.mark.long
def test_a_client_is_back_within_seconds_after_a_long_outage(free_port: int) -> None:
    """gRPC's own back-off would have grown to more than 20 s, also for a new client of the process."""
    answer: dict[str, Any] = {"Generate": lambda request, context: blank()}
    target = f"127.0.0.1:{free_port}"
    with DigitClient(target, wait_for_server=False) as caller:
        with generating(free_port, **answer):
            caller.generate()
        until = time.monotonic() + 50
        while time.monotonic() < until:
            with contextlib.suppress(DigitError):
                caller.generate()
        with generating(free_port, **answer):
            for each in (caller, DigitClient(target)):
                began = time.monotonic()
                while True:
                    with contextlib.suppress(DigitError):
                        each.generate()
                        break
                assert time.monotonic() - began < 10
            each.close()


def test_a_large_request_is_tried_again(kind: str) -> None:
    seen = []

    def once_away(request: Any, context: grpc.ServicerContext) -> Any:
        seen.append(len(request.latents))
        if len(seen) == 1:
            context.abort(CODE.UNAVAILABLE, "draining")
        return blank(len(request.latents) // 400)

    latents = np.zeros((9000, 100), np.float32)  # 3.6 MB
    with generating(Generate=once_away) as target, contextlib.suppress(DigitError):
        generate(kind, target, call={"latents": latents})
    assert seen == [latents.nbytes, latents.nbytes]


def test_an_overloaded_server_says_when_it_has_room(kind: str) -> None:
    def full(request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata((("grpc-retry-pushback-ms", "7"),))
        context.abort(CODE.RESOURCE_EXHAUSTED, "the queue is full")

    with generating(Generate=full) as target, pytest.raises(DigitError, match="the queue is full") as caught:
        generate(kind, target)
    assert (caught.value.code(), caught.value.retry_after_s) == (CODE.RESOURCE_EXHAUSTED, 0.007)


def test_an_overloaded_server_that_has_room_later_than_the_call_ends_says_so_at_once(kind: str) -> None:
    def full(request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata((("grpc-retry-pushback-ms", "60000"),))
        context.abort(CODE.RESOURCE_EXHAUSTED, "the queue is full")

    def full_stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield full(request, context)

    with generating(Generate=full, GenerateStream=full_stream) as target:
        for call in (generate, lambda kind, target: stream(kind, target, 500)):
            with fails("the queue is full", CODE.RESOURCE_EXHAUSTED):
                call(kind, target)  # type: ignore[no-untyped-call]


def test_a_proxy_is_not_asked_for_the_way_to_this_machine(
    kind: str, shared_server: ServerProcess, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port}")
    assert len(generate(kind, shared_server.target)) == 1


@pytest.mark.parametrize("proxy", ["nobody", "refuses"])
def test_a_proxy_that_does_not_lead_to_the_server_is_named(
    kind: str, proxy: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                connection.close()

    monkeypatch.delenv("no_proxy", raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        threading.Thread(target=refuse, daemon=True).start()
        port = free_port if proxy == "nobody" else listener.getsockname()[1]
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        why = "Connection refused" if proxy == "nobody" else "403 Forbidden"
        with fails(f"http_proxy names does not lead to digits.invalid:50051 .*{why}.*no_proxy=digits.invalid"):
            generate(kind, "digits.invalid:50051", wait_for_server=False)
        listener.shutdown(socket.SHUT_RDWR)


def certified(folder: Path, *names: str) -> tuple[list[str], Path]:
    """A server's flags for a certificate of these names, and the authority's file."""
    authority = trustme.CA()
    issued = authority.issue_cert(*names)
    issued.private_key_pem.write_to_path(folder / "tls.key")
    issued.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    authority.cert_pem.write_to_path(folder / "ca.crt")
    return [f"--tls-cert={folder / 'tls.crt'}", f"--tls-key={folder / 'tls.key'}"], folder / "ca.crt"


def test_several_addresses_with_tls(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> None:
    flags, ca = certified(tmp_path, "127.0.0.1")
    servers = [start_server(*flags) for _ in range(2)]
    target = "ipv4:" + ",".join(server.target for server in servers)
    for kind in KINDS:
        assert len(generate(kind, target, access=Access(ca=ca))) == 1
        with fails("speaks TLS"):
            generate(kind, target)
    servers[0].kill()
    for kind in KINDS:
        assert len(generate(kind, target, access=Access(ca=ca))) == 1


def test_an_https_port_is_named(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> None:
    flags, ca = certified(tmp_path, "127.0.0.1")
    server = start_server(*flags)
    for kind in KINDS:
        for access in (Access(ca=ca), Access()):
            with fails(f"{server.https} is an HTTPS port.*give the server's gRPC port"):
                generate(kind, server.https, access=access)


@pytest.mark.long
def test_a_certificate_for_another_name_is_named(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> None:
    flags, ca = certified(tmp_path, "digits.example")
    server = start_server(*flags)
    for kind in KINDS:
        with fails("certificate is not accepted .*127.0.0.1"):
            generate(kind, f"ipv4:{server.target},{server.target}", access=Access(ca=ca))


@pytest.mark.long
def test_a_client_certificate_that_is_missing_or_not_accepted_is_named(
    tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> None:
    certificates = Certificates(tmp_path)
    server = start_server(*certificates.flags, f"--tls-client-ca={certificates.ca}")
    cert, key = certificates.client(trustme.CA())
    for kind in KINDS:
        with fails("may want a certificate of its client"):
            generate(kind, server.target, access=Access(ca=certificates.ca))
        with fails(f"may not accept {cert}"):
            generate(kind, server.target, access=Access(ca=certificates.ca, cert=cert, key=key))


def test_a_file_that_cannot_be_read_is_named_at_once(kind: str, tmp_path: Path) -> None:
    with fails("missing.crt cannot be read", CODE.INVALID_ARGUMENT):
        generate(kind, "localhost:1", access=Access(ca=tmp_path / "missing.crt"))


@pytest.mark.long
def test_a_stream_goes_on_when_its_connection_is_ended_because_of_its_age(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_port, "CONNECTION_AGE_GRACE_S", 1)
    honest = diagnosis.failure_of
    cut: list[DigitError] = []

    async def test(running: Running) -> None:
        running.orders.slow_s = 0.01
        target = f"127.0.0.1:{running.ports.grpc}"
        both = [asyncio.to_thread(stream, "blocking", target, 1500), asyncio.to_thread(stream, "asyncio", target, 1500)]
        for starts in await asyncio.gather(*both):
            assert starts == list(range(0, 1500, 100))

    for module in (client, asyncio_client):
        monkeypatch.setattr(module, "failure_of", lambda *arguments: cut.append(honest(*arguments)) or cut[-1])
    with_server(test, monkeypatch, bundles, max_connection_age_s=2.0)
    assert len(cut) >= 2, "no connection was ended"
    # The core's own words: the connection's end may come while a message is on its way.
    said = [str(error.details()) for error in cut]
    assert all("max connection age" in each or "max_age" in each for each in said), said


def test_latents_of_a_wrong_shape_are_refused(kind: str, shared_server: ServerProcess) -> None:
    with DigitClient(shared_server.target) as caller:
        two, one = caller.latents(7, count=2), caller.latents(7, count=1)
    for wrong in (two.T, two.reshape(25, 8), one.T, one.reshape(25, 4), np.tile(one, 2)):
        with fails(r"latents must have shape \[n, 100\]", CODE.INVALID_ARGUMENT):
            generate(kind, shared_server.target, call={"latents": wrong, "labels": 3})
    assert len(generate(kind, shared_server.target, call={"latents": two, "labels": 3})) == 2


def test_float_images_are_within_0_and_1(kind: str, shared_server: ServerProcess) -> None:
    pixels = generate(kind, shared_server.target, call={"count": 200, "seed": 7, "as_float": True}).pixels
    assert (pixels.dtype, pixels.min(), pixels.max() <= 1) == (np.float32, 0, True)
