"""What callers make the server hold has a bound: the rest is refused at once, others are served, and the memory comes back."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import grpc
import psutil
import pytest

from tests.hostile.attacks import ON_MEMORY, under_attack, unread_answers
from tests.hostile.confined import can_confine, memory_limit
from tests.hostile.http2 import Http2Connection
from tests.hostile.shapes import GENERATE, STREAM, generate_request
from tests.hostile.victim import Victim
from tests.server_process import ServerProcess
from tests.waiting import wait_until

BOUNDED = ("--max-inflight-mib=64",)
MOST_MIB = 64 + 136  # the budget, what Python makes of it, and what connections and streams cost beside it
KEPT_MIB = 100  # that an allocator may keep when the attackers have left
HELD_MS = 1000.0  # the attackers are many here, and the server works for all of them
LASTS_S = 6.0
ALL_AT_ONCE_S = 20.0  # 60 to measure by
SILENT_S = (9.0, 15.0)  # when a call without a message is ended
SILENT_CALLS = 20
DEPLOY = Path(__file__).parents[2] / "deploy"
DEPLOYED = ("overlays/cpu/kustomization.yaml", "kserve/servingruntime.yaml")
MIB = {"Mi": 1, "Gi": 1024}


class Resident:
    """A process's memory, watched from a thread while the block lasts; MiB beyond what it was."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._before = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.most_mib = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def mib(self) -> int:
        return (self._process.memory_info().rss - self._before) >> 20

    def _watch(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not self._stop.wait(0.02):
                self.most_mib = max(self.most_mib, self.mib)


def warm_up(server: ServerProcess) -> None:
    """Have the server do its largest work once: what that takes it keeps."""
    with Http2Connection(server.target) as connection:
        for _ in range(3):
            assert connection.call(GENERATE, generate_request(4096)).status == 0


@pytest.mark.long
@pytest.mark.parametrize("attack", ON_MEMORY)
def test_what_a_caller_makes_the_server_hold_has_a_bound(attack: str, start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(*BOUNDED)
    warm_up(server)
    with Resident(server.process.pid) as resident:
        with Victim(server.target) as victim, under_attack(server.target, ON_MEMORY[attack]) as connections:
            deadline = time.monotonic() + LASTS_S
            while time.monotonic() < deadline:
                victim.baseline(0.5)
            held = victim.baseline(1.0)
            assert connections
        assert not held.failures
        assert held.calls > 5
        assert held.longest_ms < HELD_MS
        wait_until(lambda: resident.mib < KEPT_MIB, lambda: f": {resident.mib} MiB are kept")
    print(f"{attack}: {resident.most_mib} MiB more at most, the victim's longest call {held.longest_ms:.1f} ms")
    assert resident.most_mib < MOST_MIB


@pytest.mark.long
def test_what_goes_beyond_the_budget_is_refused_at_once_and_only_for_who_took_it(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server(*BOUNDED)
    with under_attack(server.target, unread_answers) as (connection,), Victim(server.target) as victim:
        began = time.monotonic()
        (stream,) = connection.open_many(GENERATE, 1, generate_request(4096))
        answer = connection.finish(stream, 5)
        assert answer.status == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert time.monotonic() - began < 2  # it does not wait for room
        assert not victim.baseline(0.5).failures
    with Http2Connection(server.target) as connection:  # as soon as the others have left

        def answered() -> bool:
            return connection.call(GENERATE, generate_request(4096)).status == 0

        wait_until(answered)


@pytest.mark.long
def test_a_call_that_sends_no_message_is_ended_by_the_server(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    with Http2Connection(server.target) as connection:
        began = time.monotonic()
        streams = [connection.open(method) for method in (GENERATE, STREAM) for _ in range(SILENT_CALLS)]
        answers = [connection.finish(stream, 20) for stream in streams]
        assert SILENT_S[0] < time.monotonic() - began < SILENT_S[1]
        assert all(answer.reset is not None or answer.status for answer in answers)
        assert connection.call(GENERATE, generate_request(1)).status == 0


def deployed_limit_mib(manifest: str) -> int:
    """The memory limit in a file of deploy/."""
    [(number, unit)] = re.findall(r"limits:\n +memory: (\d+)(Mi|Gi)$", (DEPLOY / manifest).read_text(), re.MULTILINE)
    return int(number) * MIB[unit]


@pytest.mark.long
@pytest.mark.skipif(not can_confine(), reason="this process may not make control groups (version 1, /sys/fs/cgroup/memory)")
@pytest.mark.parametrize("manifest", DEPLOYED)
def test_all_attacks_on_memory_at_once_are_survived_under_the_deployed_limit(manifest: str) -> None:
    """By the budget that the server takes by itself: a quarter of the limit."""
    limit_mib = deployed_limit_mib(manifest)
    with memory_limit(limit_mib << 20) as group:
        server = ServerProcess("--instances=2", module=group.module)
        try:
            warm_up(server)
            deadline = time.monotonic() + ALL_AT_ONCE_S
            with Resident(server.process.pid) as resident, Victim(server.target) as victim:
                while time.monotonic() < deadline:
                    with under_attack(server.target, *ON_MEMORY.values()):
                        held = victim.baseline(2.0)
                    assert server.process.poll() is None, f"killed: {group.kills} times, at {group.most_bytes >> 20} MiB"
                    assert not held.failures
                    assert held.calls > 5
                wait_until(lambda: resident.mib < KEPT_MIB, lambda: f": {resident.mib} MiB are kept")
            assert group.kills == 0
            print(f"\n{manifest}: {group.most_bytes >> 20} MiB of {limit_mib}")
        finally:
            server.kill()
