"""The process ends when it has promised to, whatever its peers do or leave undone."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.hostile.attacks import WATCH
from tests.hostile.http2 import Http2Connection
from tests.server_process import ServerProcess
from tests.waiting import wait_until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
DRAIN_S = 1.0
OVERHEAD_S = 6.0  # what ending may take beyond the drain, whatever hangs
WATCHERS = 5


def seconds_to_exit(server: ServerProcess, limit_s: float) -> float:
    """How long the process takes to end from now on; it must end well, and within the limit."""
    began = time.monotonic()
    _, log = server.process.communicate(timeout=limit_s)
    assert server.process.returncode == 0, log
    return time.monotonic() - began


@pytest.mark.long
def test_watchers_that_do_not_read_hold_up_neither_other_watchers_nor_checks_nor_the_end(
    start_server: Callable[..., ServerProcess],
) -> None:
    """Issue: one of them, with a window of 0, and the process never drained nor ended."""
    grace_s = 2.0
    server = start_server(f"--drain-grace-s={grace_s}", f"--drain-deadline-s={DRAIN_S}")
    told: list[tuple[int, float]] = []
    with ExitStack() as stack:
        for _ in range(WATCHERS):
            connection = stack.enter_context(Http2Connection(server.target, window=0, grants=False))
            connection.open_many(WATCH, 1, b"")
            connection.settle(0.2)  # until it is registered
        channel = stack.enter_context(grpc.insecure_channel(server.target))
        stub: Any = health_pb2_grpc.HealthStub(channel)

        def watch() -> None:
            try:
                for answer in stub.Watch(health_pb2.HealthCheckRequest(), timeout=30):
                    told.append((answer.status, time.monotonic()))
            except grpc.RpcError:
                pass  # the server has ended

        watching = threading.Thread(target=watch)
        watching.start()
        wait_until(lambda: told)
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        statuses = []
        while time.monotonic() - began < grace_s - 0.5 and NOT_SERVING not in statuses:
            statuses.append(stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status)
        assert statuses[-1] == NOT_SERVING
        assert seconds_to_exit(server, 30) < grace_s + DRAIN_S + OVERHEAD_S
        watching.join(30)
    assert [status for status, _ in told] == [SERVING, NOT_SERVING]
    assert told[1][1] - began < grace_s


@pytest.mark.long
def test_a_client_that_is_stopped_holds_up_the_end_no_longer_than_promised(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(f"--drain-deadline-s={DRAIN_S}")
    command = [sys.executable, "-m", "tests.hostile.stopped_client", server.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n"
            time.sleep(0.5)  # it reads
            client.send_signal(signal.SIGSTOP)
            time.sleep(0.5)  # and what it reads no more piles up
            server.process.send_signal(signal.SIGTERM)
            assert seconds_to_exit(server, 60) < DRAIN_S + OVERHEAD_S
        finally:
            client.kill()


@pytest.mark.long
def test_a_peer_without_a_call_that_answers_no_ping_costs_no_drain(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--drain-deadline-s=20")
    with Http2Connection(server.target, answers_pings=False) as connection:
        connection.settle(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert seconds_to_exit(server, 60) < OVERHEAD_S


def test_a_hangup_ends_nothing(start_server: Callable[..., ServerProcess]) -> None:
    """Issue: SIGHUP ended the process without a drain."""
    server = start_server()
    server.process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(timeout=1)
    assert server.get("/readyz")[0] == 200


WRITER = """
import pathlib, sys
from serve.files import replace_file
path = pathlib.Path(sys.argv[1])
for turn in range(1_000_000):
    replace_file(path, b'{"turn": %d, "filler": "%s"}' % (turn, b"x" * (turn % 100_000)), 0o644)
    if turn == 0:
        print("ready", flush=True)
"""


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "serving.json"
    chance = random.Random(1)
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0, 0.2))  # by chance amid a write
            writer.kill()
        assert json.loads(path.read_text())["filler"].strip("x") == ""
