"""Whatever some callers do, the server answers the well-behaved ones throughout."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from serve.client import DigitClient
from serve.client.channel import CHANNEL_OPTIONS
from serve.latents import draw
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from tests.server_process import ServerProcess
from tests.waiting import wait_until

NO_RETRIES = CHANNEL_OPTIONS[1:]


@contextmanager
def well_behaved_caller(target: str) -> Iterator[list[float]]:
    """Asks for digits all the while; every call must succeed and be right. Yields the latencies as they come."""
    latencies: list[float] = []
    failures: list[str] = []
    stop, begun = threading.Event(), threading.Event()

    def call() -> None:
        with DigitClient(target, timeout_s=20) as client:
            expected = client.generate(3, model="mlp", seed=1).pixels.astype(int)
            begun.set()
            while not stop.is_set():
                started = time.perf_counter()
                try:
                    got = client.generate(3, model="mlp", seed=1).pixels
                except grpc.RpcError as error:
                    failures.append(f"{error.code()}: {error.details()}")
                    return
                latencies.append(time.perf_counter() - started)
                if int(np.abs(got - expected).max()) > 1:
                    failures.append("wrong digits")

    thread = threading.Thread(target=call)
    thread.start()
    assert begun.wait(60)  # or the others may be done before this caller is connected
    try:
        yield latencies
        deadline = time.monotonic() + 60
        while len(latencies) <= 3 and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join(60)
    assert not failures
    assert len(latencies) > 3


def test_malformed_messages_disturb_nobody(shared_server: ServerProcess) -> None:
    chance = random.Random(1)
    valid = pb.GenerateRequest(model="dcgan", count=3, latents=bytes(400)).SerializeToString()
    with well_behaved_caller(shared_server.target), grpc.insecure_channel(shared_server.target) as channel:
        for method in ("Generate", "GenerateStream", "GetModel"):
            call = channel.unary_stream(f"/digits.v1.DigitGenerator/{method}")
            for _ in range(300):
                message = bytearray(valid)
                for _ in range(chance.randrange(1, 6)):
                    message[chance.randrange(len(message))] = chance.randrange(256)
                del message[chance.randrange(len(message)) :]
                try:
                    for _ in call(bytes(message), timeout=20):
                        break
                except grpc.RpcError as error:
                    assert error.code() in (  # noqa: PT017  # a success is right too: some messages stay valid
                        grpc.StatusCode.INVALID_ARGUMENT,
                        grpc.StatusCode.NOT_FOUND,
                    )
    assert shared_server.metric("grpc_server_handled_total", grpc_code="INTERNAL") == 0


def test_an_oversize_message_is_refused(shared_server: ServerProcess) -> None:
    with well_behaved_caller(shared_server.target), grpc.insecure_channel(shared_server.target, NO_RETRIES) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        for _ in range(5):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Generate(pb.GenerateRequest(latents=bytes(5 << 20)), timeout=20)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_small_requests_for_huge_answers_cost_no_memory(shared_server: ServerProcess) -> None:
    process = psutil.Process(shared_server.process.pid)
    before = process.memory_info().rss
    with grpc.insecure_channel(shared_server.target, NO_RETRIES) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        for count in (2**32 - 1, 10**6):
            with pytest.raises(grpc.RpcError):
                stub.Generate(pb.GenerateRequest(count=count), timeout=20)
        # A stream of 2**62 digits is allowed; what it may not do is run ahead of its reader.
        endless = stub.GenerateStream(pb.GenerateStreamRequest(count=2**62, model="mlp", chunk=4096), timeout=60)
        next(endless)
        time.sleep(1.0)  # a reader that is slow on purpose
        next(endless)
        endless.cancel()
    assert process.memory_info().rss - before < 200 << 20


def test_slow_readers_and_callers_who_leave_hold_up_nobody(shared_server: ServerProcess) -> None:
    with (
        well_behaved_caller(shared_server.target) as latencies,
        grpc.insecure_channel(shared_server.target, NO_RETRIES) as channel,
    ):
        stub = pb_grpc.DigitGeneratorStub(channel)
        streams = [stub.GenerateStream(pb.GenerateStreamRequest(count=10**6, model="mlp"), timeout=60) for _ in range(10)]
        for stream in streams:
            next(stream)  # one chunk, then nothing is read any more
        leaving = [stub.Generate.future(pb.GenerateRequest(count=1000, model="mlp"), timeout=60) for _ in range(20)]
        for call in leaving:
            call.cancel()
        seen = len(latencies)
        wait_until(lambda: len(latencies) >= seen + 20)
        for stream in streams:
            stream.cancel()


@pytest.mark.long
def test_a_thousand_connections_opened_and_dropped_and_a_thousand_callers_cost_no_thread_each(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server()
    host, _, port = server.target.rpartition(":")
    process = psutil.Process(server.process.pid)
    threads_before = process.num_threads()
    with well_behaved_caller(server.target):
        for number in range(1000):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                if number % 3 == 0:
                    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                elif number % 3 == 1:
                    connection.sendall(bytes(range(256)))
    with grpc.insecure_channel(server.target, NO_RETRIES) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        calls = [stub.Generate.future(pb.GenerateRequest(count=4, model="dcgan", seed=n), timeout=60) for n in range(1000)]

        def started() -> bool:
            assert process.num_threads() - threads_before < 20
            return server.metric("grpc_server_started_total", grpc_method="Generate") >= 1000

        wait_until(started)
        for number, call in enumerate(calls):
            answer = call.result(timeout=60)
            assert (answer.seed, answer.count) == (number, 4)
    assert process.num_threads() - threads_before < 20


def test_rows_that_nobody_waits_for_any_more_are_counted_and_never_run(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--instances=1", "--max-batch-size=4")
    with grpc.insecure_channel(server.target, NO_RETRIES) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        assert stub.Generate(pb.GenerateRequest(count=1, model="dcgan"), timeout=60).count == 1  # it is connected
        long = stub.Generate.future(pb.GenerateRequest(count=2000, model="dcgan", seed=1), timeout=60)
        hopeless = [
            stub.Generate.future(pb.GenerateRequest(count=500, model="dcgan", priority=pb.PRIORITY_BULK), timeout=1)
            for _ in range(5)
        ]
        for call in hopeless:
            assert call.exception(timeout=60).code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[union-attr]
        assert long.result(timeout=60).count == 2000
    dropped = server.metric("digits_dropped_images_total", model="dcgan")
    ran = server.metric("digits_batch_images_sum", model="dcgan")
    assert dropped > 1000
    assert ran == 1 + 2000 + 5 * 500 - dropped
    assert server.metric("digits_queue_images") == 0


def test_overload_is_refused_at_once_with_pushback_and_the_rest_is_served(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server("--instances=1", "--max-queue-images=256", "--max-count=256")
    outcomes: list[tuple[str, float]] = []
    with grpc.insecure_channel(server.target, NO_RETRIES) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)

        def call(seed: int) -> None:
            started = time.perf_counter()
            try:
                answer = stub.Generate(pb.GenerateRequest(count=64, model="dcgan", seed=seed), timeout=30)
            except grpc.RpcError as error:
                outcomes.append((error.code().name, time.perf_counter() - started))
                pushback = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
                assert pushback is not None
                assert 1 <= int(pushback or 1) < 10_000
                return
            row = np.frombuffer(answer.images[0], np.uint8).reshape(64, 28, 28)
            assert row[0].any()
            outcomes.append(("OK", time.perf_counter() - started))

        threads = [threading.Thread(target=call, args=(seed,)) for seed in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    codes = [code for code, _ in outcomes]
    assert len(codes) == 40
    assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert codes.count("OK") >= 4


def test_one_digit_behind_a_thousand_waits_for_a_batch_and_not_for_a_thousand(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server("--instances=1", "--max-batch-size=16")
    with grpc.insecure_channel(server.target, NO_RETRIES) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        long = stub.Generate.future(pb.GenerateRequest(count=4096, model="dcgan"), timeout=60)
        wait_until(lambda: server.metric("digits_batch_images_count", model="dcgan") >= 1)
        started, short_s = time.perf_counter(), []
        for _ in range(3):
            asked = time.perf_counter()
            stub.Generate(pb.GenerateRequest(count=1, model="dcgan"), timeout=60)
            short_s.append(time.perf_counter() - asked)
        assert not long.done()
        long.result(timeout=60)
        long_s = time.perf_counter() - started
    assert min(short_s) < long_s / 5


def test_explicit_latents_of_many_callers_are_never_mixed_up(shared_server: ServerProcess) -> None:
    problems: list[Any] = []

    def call(number: int) -> None:
        with DigitClient(shared_server.target) as client:
            for turn in range(10):
                rows = draw(number, turn * 10, 1 + (number + turn) % 7, 64)
                by_latents = client.generate(latents=rows, model="mlp").pixels.astype(int)
                by_address = client.generate(len(rows), seed=number, start=turn * 10, model="mlp").pixels
                if int(np.abs(by_latents - by_address).max()) > 1:
                    problems.append((number, turn))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems
