"""Stopping: nobody who was let in is turned away, nobody new is let in, and a deadline ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.client import DigitClient
from serve.client.channel import CHANNEL_OPTIONS
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from tests.server_process import ServerProcess
from tests.waiting import wait_until


def test_sigterm_finishes_what_was_accepted_and_exits_zero(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--instances=1", "--max-batch-size=8", "--drain-deadline-s=120")  # longer than a test waits
    with grpc.insecure_channel(server.target, CHANNEL_OPTIONS[1:]) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        calls = [stub.Generate.future(pb.GenerateRequest(count=500, model="dcgan", seed=n), timeout=60) for n in range(6)]
        wait_until(lambda: server.metric("digits_queue_images", model="dcgan") >= 2000)
        status, log = server.terminate()
        for number, call in enumerate(calls):
            answer = call.result(timeout=60)
            assert (answer.seed, len(answer.images[0])) == (number, 500 * 784)
    assert status == 0
    assert "0 requests were cancelled" in log


def test_grace_tells_not_serving_first_and_still_answers(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--drain-grace-s=5")
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        statuses = [
            iter(health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=60))
            for name in ("", "digits.v1.DigitGenerator/mlp")
        ]
        assert [next(status).status for status in statuses] == [health_pb2.HealthCheckResponse.SERVING] * 2
        stopping = threading.Thread(target=server.terminate)
        stopping.start()
        assert [next(status).status for status in statuses] == [health_pb2.HealthCheckResponse.NOT_SERVING] * 2
        assert server.get("/readyz") == (503, "draining\n")
        assert server.get("/healthz") == (200, "alive\n")
        # A caller who does not watch health, as DigitClient does, is still served.
        answer = pb_grpc.DigitGeneratorStub(channel).Generate(pb.GenerateRequest(count=5), timeout=20)
        assert answer.count == 5
        stopping.join(60)
    assert server.process.returncode == 0


def test_the_drain_deadline_cancels_and_counts_what_is_left(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--instances=1", "--max-batch-size=1", "--drain-deadline-s=0.3")
    with grpc.insecure_channel(server.target, CHANNEL_OPTIONS[1:]) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        calls = [stub.Generate.future(pb.GenerateRequest(count=4096, model="dcgan"), timeout=60) for _ in range(3)]
        wait_until(lambda: server.metric("digits_queue_images", model="dcgan") >= 8000)
        started = time.monotonic()
        status, log = server.terminate()
        assert time.monotonic() - started < 10
        assert {call.exception(timeout=60).code() for call in calls} <= {  # type: ignore[union-attr]
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
        }
    assert status == 0
    assert "3 requests were cancelled by the drain deadline" in log


@pytest.mark.long
def test_a_clients_stream_goes_on_at_another_replica(start_server: Callable[..., ServerProcess]) -> None:
    flags = ("--instances=1", "--max-batch-size=16", "--drain-deadline-s=0.2")
    replicas = [start_server(*flags), start_server(*flags)]
    with DigitClient("ipv4:" + ",".join(replica.target for replica in replicas)) as client:
        stream = client.stream(20_000, model="dcgan", seed=3, chunk=64)
        parts = [next(stream)]
        busy = 0 if replicas[0].metric("digits_batch_images_count", model="dcgan") else 1
        assert replicas[busy].terminate()[0] == 0
        parts += stream
    assert [part.start for part in parts] == [sum(len(part.pixels) for part in parts[:number]) for number in range(len(parts))]
    assert sum(len(part.pixels) for part in parts) == 20_000
    assert replicas[1 - busy].metric("digits_images_total", model="dcgan") > 1000


@pytest.mark.long
@pytest.mark.parametrize("rolls", [4, 50])
def test_restarts_under_load_fail_no_call(rolls: int, start_server: Callable[..., ServerProcess]) -> None:
    """Two replicas, one stopped by SIGTERM and started again at a time, callers with the published retry policy."""
    flags = ("--drain-grace-s=0.1", "--max-batch-size=16", "--instances=1", "--default-model=mlp")
    replicas = [start_server(*flags), start_server(*flags)]
    target = "ipv4:" + ",".join(replica.target for replica in replicas)
    failures: list[str] = []
    calls = [0]
    stop = threading.Event()

    def load(number: int) -> None:
        with DigitClient(target, timeout_s=30) as client:
            expected = client.generate(8, seed=number).pixels.astype(int)
            while not stop.is_set():
                try:
                    got = client.generate(8, seed=number).pixels
                except grpc.RpcError as error:
                    failures.append(f"{error.code().name}: {error.details()}")
                    continue
                calls[0] += 1
                if int(np.abs(got - expected).max()) > 1:
                    failures.append("wrong digits")

    threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for roll in range(rolls):
            turn = roll % 2
            port = replicas[turn].target.rpartition(":")[2]
            before = calls[0]
            status, _ = replicas[turn].terminate()
            assert status == 0
            replicas[turn] = start_server(*flags, f"--grpc-port={port}")
            wait_until(lambda: calls[0] >= before + 20)  # noqa: B023  # called before the next turn
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures, failures[:5]
    assert calls[0] > rolls * 20
