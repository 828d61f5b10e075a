"""``make bench``: compares the server with the raw model and a bare gRPC server, in alternating rounds.

*raw* is the plain, unfolded ONNX export in one default session, in process, at its best batch size; *floor* is one
grpc.aio server that sends a ready-made response of the same size. Every target is a ratio of two figures of the same
round (``tests.bench.rounds``), since absolute times mean little on a shared machine.

docs/decisions/0004-single-digits.md and 0013-completion-queue.md record what was tried.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from serve.command_line import OneLineParser, within
from serve.engine.onnx_runtime import ort
from serve.latents import LatentReader, Span, draw
from serve.observability.call_metrics import RpcMetrics
from serve.observability.metrics import Metrics
from serve.observability.model_metrics import ModelMetrics
from tests.bench.load import H2LOAD, Load, Result, by_python, closed
from tests.bench.process import Started, started
from tests.bench.report import Target, machine, print_targets, runs_per_second, say, write
from tests.bench.rounds import ROUNDS, Sample, alternate, costs_us, measure, rates, ratios, row

RAW_BATCHES = (16, 64, 256)
ONE_DIGIT_RESPONSE_BYTES = 832
SERVER = ("serve", "--grpc-port=0", "--http-port=0")
OVERLOAD_QUEUE = 1024  # images: as many as wait at capacity, with 16 requests of 64 in flight
SOAK_REQUESTS = 200_000


@dataclass(frozen=True)
class Case:
    """A kind of load, what the server is held against under it, and the bounds of its ratios to that."""

    name: str
    model: str
    digits: int
    in_flight: int
    connections: int
    beside: str  # floor or raw
    rate: float | None = None  # of the rate, at least
    cost: float | None = None  # of the processor time, at most


CASES = (
    Case("mlp, 1 digit, 64 in flight over 16 connections", "mlp", 1, 64, 16, "floor", rate=0.9, cost=1.1),
    Case("mlp, 1 digit, 64 in flight over 4 connections", "mlp", 1, 64, 4, "floor", rate=0.9, cost=1.1),
    Case("mlp, 1 digit, alone", "mlp", 1, 1, 1, "floor"),
    Case("mlp, 64 digits, 16 in flight", "mlp", 64, 16, 4, "raw", rate=0.55),
    Case("dcgan, 1 digit, 64 in flight", "dcgan", 1, 64, 4, "floor"),
    Case("dcgan, 64 digits, 16 in flight", "dcgan", 64, 16, 4, "raw", rate=1.2),
)


def main() -> int:
    flags = _parser().parse_args()
    figures: dict[str, Any] = {"normals_per_s": normals_rate()}
    targets = [Target("normal values a second on one core, millions", figures["normals_per_s"] / 1e6, 20)]
    say(f"{machine()['cpu']}, {machine()['cores']} cores; load by {'h2load' if H2LOAD else 'Python callers (no h2load here)'}")
    with ExitStack() as stack:
        floor = stack.enter_context(started("tests.bench.floor", str(ONE_DIGIT_RESPONSE_BYTES)))
        server = stack.enter_context(started(*SERVER))
        figures["idle_percent"] = idle_percent(server)
        targets.append(Target("idle: percent of one core", figures["idle_percent"], 1, at_most=True))
        for case in CASES:
            samples = figures[case.name] = beside(case, server, floor, flags)
            targets += case_targets(case, samples)
        figures["under_load"] = [under_load(server, flags.seconds) for _ in range(flags.rounds)]
    in_batches = [seen["p99_s"] / seen["batch_s"] for seen in figures["under_load"]]
    targets.append(Target("one dcgan digit's p99 while 16 × 64 are in flight, in batches", in_batches, 4, at_most=True))
    figures["overload"] = [overload(flags.seconds) for _ in range(flags.rounds)]
    targets += overload_targets(figures["overload"])
    with started(*SERVER) as server:
        cost = figures["metrics_cost"] = metrics_cost(server, flags.seconds)
    share = cost["metrics_s"] / cost["server_cpu_s"] * 100
    targets.append(Target("metrics: share of a request's processor time, percent", share, 3, at_most=True))
    if flags.soak:
        growth = figures["memory_growth"] = memory_growth(SOAK_REQUESTS)
        targets.append(Target(f"memory over {SOAK_REQUESTS:,} requests: percent more", growth * 100, 2, at_most=True))
    print_targets(targets)
    write(flags.out, {"figures": figures}, targets)
    return 0


def beside(case: Case, server: Started, floor: Started, flags: argparse.Namespace) -> dict[str, list[Sample]]:
    """The server under one kind of load, in rounds with what it is held against; prints a line for each."""
    load = partial(Load, seconds=flags.seconds, in_flight=case.in_flight, connections=case.connections)
    subjects = {"serve": partial(measure, server, load(server.target, case.model, case.digits))}
    if case.beside == "floor":
        subjects["floor"] = partial(measure, floor, load(floor.target, "", case.digits))
    else:
        subjects["raw"] = partial(raw_sample, flags.plain / f"{case.model}.onnx", case.digits)
    say(f"{case.name}: {', '.join(subjects)}, {flags.rounds} rounds")
    samples = alternate(subjects, flags.rounds)
    print(case.name)
    for name, seen in samples.items():
        latency = f"   p50 {np.median([sample.result.p50_s for sample in seen]) * 1e3:.2f} ms" if case.in_flight == 1 else ""
        print(row(name, seen, samples[case.beside]) + latency, flush=True)
    return samples


def case_targets(case: Case, samples: dict[str, list[Sample]]) -> list[Target]:
    """The bounds of a case, beside what was measured."""
    served, bound, name = samples["serve"], samples[case.beside], f"{case.name}: serve / {case.beside}"
    targets = []
    if case.rate is not None:
        targets.append(Target(f"{name}, rate", ratios(rates(served), rates(bound)), case.rate))
    if case.cost is not None:
        targets.append(Target(f"{name}, time", ratios(costs_us(served), costs_us(bound)), case.cost, at_most=True))
    return targets


def raw_sample(path: Path, digits: int) -> Sample:
    """The raw model as if it answered requests of so many digits."""
    used, begun = time.process_time(), time.perf_counter()
    rate = raw_rate(path) / digits
    share = (time.process_time() - used) / (time.perf_counter() - begun)
    return Sample(Result(rate), share / rate, {})


def raw_rate(path: Path) -> float:
    """Digits a second of the plain graph in one default session, at its best batch size."""
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    latent_size = session.get_inputs()[0].shape[1]
    rates = []
    for batch in RAW_BATCHES:
        latents = draw(7, 0, batch, latent_size)
        session.run(None, {"latents": latents})
        rates.append(batch * runs_per_second(partial(session.run, None, {"latents": latents})))
    return max(rates)


def normals_rate() -> float:
    """Normal values a second by the address rule, on one core."""
    reader, out = LatentReader(64), np.empty((4096, 64), np.float32)
    return out.size * runs_per_second(lambda: reader.fill(out, [Span(7, 0, len(out))]))


def under_load(server: Started, seconds: int) -> dict[str, float]:
    """An interactive caller of one dcgan digit while 16 requests of 64 are in flight, and what one batch takes then."""
    say("dcgan: one digit while 16 requests of 64 are in flight")
    background = Load(server.target, "dcgan", 64, seconds + 3, 16)
    names = ("digits_compute_seconds_sum", "digits_compute_seconds_count")
    before = [server.metric(name, model="dcgan") for name in names]
    thread = threading.Thread(target=lambda: closed(background))
    thread.start()
    time.sleep(1.0)  # the background's own warm-up
    foreground = closed(Load(server.target, "dcgan", 1, seconds))
    thread.join()
    after = [server.metric(name, model="dcgan") for name in names]
    batch_s = (after[0] - before[0]) / (after[1] - before[1])
    return {"p50_s": foreground.p50_s, "p99_s": foreground.p99_s, "batch_s": batch_s}


def overload(seconds: int) -> dict[str, Any]:
    """dcgan, 64 digits a request: at capacity, three times as many requests as it can answer, and at capacity again.

    The machine's own pace changes within seconds: what the middle one is held against is measured on both sides of it.
    """
    say("overload: three times the capacity")
    with started(*SERVER, f"--max-queue-images={OVERLOAD_QUEUE}", f"--max-count={OVERLOAD_QUEUE}") as server:
        at_capacity = partial(by_python, Load(server.target, "dcgan", 64, seconds, 16))
        before = at_capacity()
        flood = by_python(Load(server.target, "dcgan", 64, seconds, rate=3 * before.requests_per_s, deadline_s=5))
        after = at_capacity()
    return {"capacity": [asdict(before), asdict(after)], "three_times": asdict(flood)}


def metrics_cost(server: Started, seconds: int) -> dict[str, float]:
    """What the metrics of one request cost, and the processor time that the server takes for one.

    The calls are timed by themselves: with and without them in turn, throughput differs by less than by the minute.
    """
    say("metrics: what they cost a request")
    metrics = Metrics(CollectorRegistry())
    rpc, model = RpcMetrics(metrics, "unary", "bench", "Generate"), ModelMetrics(metrics, "bench", 1)

    def request() -> None:
        rpc.started()
        model.answer("uint8", 1, 0.002, 0.00002)
        rpc.ended("OK", 200, 0.01)

    def batch() -> None:
        model.batch(1, 1, 0.0001, 0.001)

    used_s = measure(server, Load(server.target, "mlp", 1, seconds, 64)).cpu_s
    images, batches = (server.metric(f"digits_batch_images_{name}", model="mlp") for name in ("sum", "count"))
    cost = 1 / runs_per_second(request) + batches / images / runs_per_second(batch)
    return {"metrics_s": cost, "server_cpu_s": used_s}


def memory_growth(requests: int) -> float:
    """Growth of the resident memory over so many requests of mixed sizes and both models, after a tenth as many."""
    say(f"memory over {requests:,} mixed requests")
    with started(*SERVER) as server:
        _mixed(server, requests // 10)
        before = server.process.memory_info().rss
        _mixed(server, requests)
        return server.process.memory_info().rss / before - 1


def _mixed(server: Started, requests: int) -> None:
    def done() -> float:
        return server.metric("grpc_server_handled_total", grpc_method="Generate")

    goal = done() + requests
    while done() < goal:
        for model, count, seconds in (("mlp", 1, 6), ("dcgan", 1, 2), ("mlp", 16, 2), ("dcgan", 64, 1), ("mlp", 257, 1)):
            closed(Load(server.target, model, count, seconds, 64 if count == 1 else 16))


def idle_percent(server: Started) -> float:
    """Percent of one core used while nothing is asked."""
    server.process.cpu_percent()
    return server.process.cpu_percent(interval=5)


def overload_targets(rounds: list[dict[str, Any]]) -> list[Target]:
    """What three times the capacity may do to those who are accepted and those who are not."""
    floods = [seen["three_times"] for seen in rounds]
    known = {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}

    def of_capacity(seen: dict[str, Any], figure: str) -> float:
        return float(seen["three_times"][figure] / np.mean([capacity[figure] for capacity in seen["capacity"]]))

    return [
        Target("3 × capacity: rejections' p99, ms", [flood["refused_p99_s"] * 1e3 for flood in floods], 20, at_most=True),
        Target("3 × capacity: accepted p99 / at capacity", [of_capacity(seen, "p99_s") for seen in rounds], 2, at_most=True),
        Target("3 × capacity: goodput / capacity", [of_capacity(seen, "requests_per_s") for seen in rounds], 0.9),
        Target("3 × capacity: other refusals", [len(set(flood["codes"]) - known) for flood in floods], 0, at_most=True),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m tests.bench", description="Measure the server beside its bounds.")
    parser.add_argument(
        "--plain", type=Path, default=Path("build/plain"), help="folder of the plain exports (default: build/plain)"
    )
    parser.add_argument("--seconds", type=within(1, 600), default=3, help="length of each measurement (default: 3)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench.json"), help="JSON file to write (default: build/bench.json)"
    )
    parser.add_argument("--rounds", type=within(1, 1000), default=ROUNDS, help=f"how often each is measured (default: {ROUNDS})")
    text = "measure memory over some hundred thousand requests (default: yes)"
    parser.add_argument("--soak", action=argparse.BooleanOptionalAction, default=True, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
