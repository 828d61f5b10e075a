"""Compares servers in rounds: each round measures every server once, in rotating order, and ratios are within a round.

Rates drift by a third within minutes on shared machines, so figures measured minutes apart cannot be compared. Besides the rate,
the processor time per request is measured (user and system, all threads and child processes of the server, without the load
generator), which a noisy neighbour changes less.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from serve.batching.instance import INSTANCE_THREAD
from tests.bench.load import WARM_UP_S, Load, Result, closed
from tests.bench.process import Started
from tests.bench.report import spread

ROUNDS = 5


@dataclass(frozen=True)
class Sample:
    """One server in one round. ``cpu_s`` is of one request; ``threads_s`` the same by kind of thread."""

    result: Result
    cpu_s: float
    threads_s: Mapping[str, float]

    @property
    def rate(self) -> float:
        return self.result.requests_per_s


def measure(server: Started, load: Load, send: Callable[[Load], Result] = closed) -> Sample:
    """Put a load on a server. Raises RuntimeError when calls failed: load generators for HTTP do not look at gRPC's status."""
    before, threads_before, failed_before = cpu_s(server.process), thread_s(server.process), server.failed_calls()
    result = send(load)
    if failed := server.failed_calls() - failed_before:
        raise RuntimeError(f"{failed:g} calls failed under {load}")
    requests = result.requests_per_s * (load.seconds + WARM_UP_S)
    threads = {kind: (seconds - threads_before[kind]) / requests for kind, seconds in thread_s(server.process).items()}
    return Sample(result, (cpu_s(server.process) - before) / requests, threads)


def alternate(subjects: Mapping[str, Callable[[], Sample]], rounds: int = ROUNDS) -> dict[str, list[Sample]]:
    """Measure every subject once a round, each round in the other order."""
    seen: dict[str, list[Sample]] = {name: [] for name in subjects}
    for turn in range(rounds):
        for name in list(subjects)[:: -1 if turn % 2 else 1]:
            seen[name].append(subjects[name]())
    return seen


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(over, under, strict=True)]


def rates(samples: Sequence[Sample]) -> list[float]:
    return [sample.rate for sample in samples]


def costs_us(samples: Sequence[Sample]) -> list[float]:
    return [sample.cpu_s * 1e6 for sample in samples]


def row(name: str, samples: Sequence[Sample], bound: Sequence[Sample]) -> str:
    """A server's figures under one load as a line, beside what bounds it."""
    threads = " ".join(
        f"{kind} {statistics.median(sample.threads_s.get(kind, 0.0) for sample in samples) * 1e6:.0f}"
        for kind in sorted({kind for sample in samples for kind in sample.threads_s})
    )
    return (
        f"  {name:10s} {spread(rates(samples), 0):>28s} a second   {spread(costs_us(samples), 0):>22s} µs   "
        f"{spread(ratios(rates(samples), rates(bound))):>20s} × the rate   "
        f"{spread(ratios(costs_us(samples), costs_us(bound))):>20s} × the time   ({threads})"
    )


def cpu_s(process: psutil.Process) -> float:
    """Processor time so far, of a process and its children."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def thread_s(process: psutil.Process) -> dict[str, float]:
    """Processor time so far by kind of thread: the event loop's, the instances', and the transport's."""
    seconds = dict.fromkeys(("event loop", "instances", "transport"), 0.0)
    for thread in process.threads():
        try:
            name = Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text(encoding="utf-8")
        except OSError:  # it has ended meanwhile
            continue
        kind = "event loop" if thread.id == process.pid else "instances" if name.startswith(INSTANCE_THREAD) else "transport"
        seconds[kind] += thread.user_time + thread.system_time
    return seconds
