"""``make bench``: the server beside the raw model and the bare gRPC server, in one run, as a table and as JSON.

*raw* is the plain, unfolded ONNX export in one default session, in process, at its best batch size; *floor* is a
grpc.aio server that answers a ready-made response of the same size. Every target is a ratio of two figures of the same
run, since absolute times mean little on a shared machine.

What was tried, and what it gave, is in docs/decisions/0004-single-digits.md.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from serve.bench.load import H2LOAD, WARM_UP_S, Load, by_python, closed
from serve.bench.process import Started, started
from serve.bench.report import Target, machine, print_targets, runs_per_second, say, write
from serve.engine.onnx_runtime import ort
from serve.engine.provider import EngineOptions
from serve.engine.session import Engine
from serve.latents import LatentReader, Span
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle
from serve.observability.metrics import Metrics, ModelMetrics, RpcMetrics

MODELS = ("mlp", "dcgan")
RAW_BATCHES = (16, 64, 256)
ONE_DIGIT_RESPONSE_BYTES = 832
SERVER = ("serve", "--grpc-port=0", "--http-port=0")
OVERLOAD_QUEUE = 1024  # images: as many as wait at capacity, with 16 requests of 64 in flight
SOAK_REQUESTS = 200_000
ROUNDS = 3


def main() -> int:
    flags = _parser().parse_args()
    figures: dict[str, Any] = {}
    targets: list[Target] = []
    say(f"{machine()['cpu']}, {machine()['cores']} cores; load by {'h2load' if H2LOAD else 'Python callers (no h2load here)'}")
    figures["normals_per_s"] = normals_rate()
    targets.append(Target("normals a second on one core, millions", figures["normals_per_s"] / 1e6, 20))
    with started("serve.bench.floor", str(ONE_DIGIT_RESPONSE_BYTES)) as floor:
        with started(*SERVER) as server:
            figures["idle_cpu_percent"] = idle_percent(server)
            figures["rounds"] = [side_by_side(server, floor, flags.plain, flags.seconds) for _ in range(ROUNDS)]
        figures["floor_unloaded"] = asdict(closed(Load(floor.target, "", 1, flags.seconds)))
    with started(*SERVER) as server:
        for model in MODELS:
            figures[model] = throughput(server, model, flags.seconds)
        figures["interactive_under_load"] = under_load(server, flags.seconds)
    targets += throughput_targets(figures)
    targets.append(Target("idle: percent of one core", figures["idle_cpu_percent"], 1, at_most=True))
    figures["overload"] = overload(flags.seconds)
    targets += overload_targets(figures["overload"])
    with started(*SERVER) as server:
        cost = figures["metrics_cost"] = metrics_cost(server, flags.seconds)
    share = cost["metrics_s"] / cost["server_cpu_s"] * 100
    targets.append(Target("metrics: share of a request's time, percent", share, 2, at_most=True))
    if flags.soak:
        figures["memory_growth"] = memory_growth()
        targets.append(Target("RSS growth over 200,000 mixed requests, percent", figures["memory_growth"] * 100, 2, at_most=True))
    print_targets(targets)
    write(flags.out, {"figures": figures}, targets)
    return 0


def side_by_side(server: Started, floor: Started, plain: Path, seconds: float) -> dict[str, float]:
    """One round of what is compared as ratios, each beside its bound: rates drift by a third within minutes here."""
    say("side by side: served, raw, floor")
    seen: dict[str, float] = {}
    for model in MODELS:
        before = raw_rate(plain / f"{model}.onnx")
        served = closed(Load(server.target, model, 64, seconds, 16)).requests_per_s * 64
        raw = (before + raw_rate(plain / f"{model}.onnx")) / 2
        seen |= {f"{model}_served": served, f"{model}_raw": raw, f"{model}_ratio": served / raw}
    bare = closed(Load(floor.target, "", 1, seconds, 64)).requests_per_s
    single = closed(Load(server.target, "mlp", 1, seconds, 64)).requests_per_s
    bare = (bare + closed(Load(floor.target, "", 1, seconds, 64)).requests_per_s) / 2
    return seen | {"single_served": single, "single_floor": bare, "single_ratio": single / bare}


def raw_rate(path: Path) -> float:
    """Digits a second of the plain graph in one default session, at its best batch size."""
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    latent_size = session.get_inputs()[0].shape[1]
    rates = []
    for batch in RAW_BATCHES:
        latents = np.zeros((batch, latent_size), np.float32)
        session.run(None, {"latents": latents})
        rates.append(batch * runs_per_second(partial(session.run, None, {"latents": latents})))
    return max(rates)


def normals_rate() -> float:
    """Normal values a second by the address rule, on one core."""
    reader, out = LatentReader(64), np.empty((4096, 64), np.float32)
    return out.size * runs_per_second(lambda: reader.fill(out, [Span(7, 0, len(out))]))


def throughput(server: Started, model: str, seconds: float) -> dict[str, Any]:
    """Requests a second of three kinds of load, the unloaded latency, and the model's own time for a batch of one."""
    say(f"{model}: single digits, 16 and 64 a request, unloaded")
    bundle = read_bundle(BUNDLED_DIR / model / "1")
    engine = Engine(bundle.model, bundle.manifest, EngineOptions(), 64)
    return {
        "64x1": asdict(closed(Load(server.target, model, 1, seconds, 64))),
        "16x16": asdict(closed(Load(server.target, model, 16, seconds, 16))),
        "16x64": asdict(closed(Load(server.target, model, 64, seconds, 16))),
        "unloaded": asdict(closed(Load(server.target, model, 1, seconds))),
        "batch_of_one_s": 1 / runs_per_second(lambda: engine.run(engine.blank(1))),
    }


def under_load(server: Started, seconds: float) -> dict[str, float]:
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


def overload(seconds: float) -> dict[str, Any]:
    """dcgan, 64 digits a request: at capacity, and three times as many requests as it can answer."""
    say("overload: three times the capacity")
    with started(*SERVER, f"--max-queue-images={OVERLOAD_QUEUE}", f"--max-count={OVERLOAD_QUEUE}") as server:
        capacity = by_python(Load(server.target, "dcgan", 64, seconds, 16))
        flood = by_python(Load(server.target, "dcgan", 64, seconds, rate=3 * capacity.requests_per_s, deadline_s=5))
    return {"capacity": asdict(capacity), "three_times": asdict(flood)}


def metrics_cost(server: Started, seconds: float) -> dict[str, float]:
    """What the metrics of one request cost, and the processor time that the server takes for one.

    The calls are timed by themselves: with and without them in turn, throughput differs by less than by the minute.
    """
    say("metrics: what they cost a request")
    metrics = Metrics(CollectorRegistry())
    rpc, model = RpcMetrics(metrics, "unary", "bench", "Generate"), ModelMetrics(metrics, "bench", 1)

    def request() -> None:
        rpc.started()
        model.queue_wait(0.002)
        model.images("uint8").inc(1)
        model.encode(0.00002)
        rpc.handled("OK").inc()
        rpc.seconds(0.01)

    def batch() -> None:
        model.batch(1, 0, 0.0001, 0.001)

    before = server.process.cpu_times()
    load = Load(server.target, "mlp", 1, seconds, 64)
    answered = closed(load).requests_per_s * (load.seconds + WARM_UP_S)
    after = server.process.cpu_times()
    used = after.user + after.system - before.user - before.system
    images, batches = (server.metric(f"digits_batch_images_{name}", model="mlp") for name in ("sum", "count"))
    cost = 1 / runs_per_second(request) + batches / images / runs_per_second(batch)
    return {"metrics_s": cost, "server_cpu_s": used / answered}


def memory_growth() -> float:
    """Growth of the resident memory over 200,000 requests of mixed sizes and both models, after a tenth as many."""
    say("memory over 200,000 mixed requests")
    with started(*SERVER) as server:
        _mixed(server, SOAK_REQUESTS // 10)
        before = server.process.memory_info().rss
        _mixed(server, SOAK_REQUESTS)
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


def throughput_targets(figures: dict[str, Any]) -> list[Target]:
    mlp, loaded = figures["mlp"], figures["interactive_under_load"]
    allowed = 1.5 * (figures["floor_unloaded"]["p50_s"] + mlp["batch_of_one_s"])

    def median(name: str) -> float:
        return float(np.median([seen[name] for seen in figures["rounds"]]))

    return [
        Target("1 dcgan 16 × 64: served / raw", median("dcgan_ratio"), 1.2),
        Target("2 mlp 16 × 64: served / raw", median("mlp_ratio"), 0.55),
        Target("3 mlp 64 × 1: served / floor", median("single_ratio"), 0.7),
        Target("4 mlp unloaded p50, ms", mlp["unloaded"]["p50_s"] * 1e3, allowed * 1e3, at_most=True),
        Target("4 one digit's p99 under load / a batch", loaded["p99_s"] / loaded["batch_s"], 4, at_most=True),
    ]


def overload_targets(seen: dict[str, Any]) -> list[Target]:
    capacity, flood = seen["capacity"], seen["three_times"]
    others = set(flood["codes"]) - {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    return [
        Target("5 rejections' p99, ms", flood["refused_p99_s"] * 1e3, 20, at_most=True),
        Target("5 accepted p99 / that at capacity", flood["p99_s"] / capacity["p99_s"], 2, at_most=True),
        Target("5 goodput / capacity", flood["requests_per_s"] / capacity["requests_per_s"], 0.9),
        Target("5 other refusals", len(others), 0, at_most=True),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve.bench", description="Measure the server beside its bounds.")
    parser.add_argument("--plain", type=Path, default=Path("build/plain"), help="folder of the plain exports")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each measurement (default: 4)")
    parser.add_argument("--out", type=Path, default=Path("build/bench.json"), help="where the JSON goes")
    parser.add_argument("--soak", action=argparse.BooleanOptionalAction, default=True, help="watch memory over 200,000 requests")
    return parser


if __name__ == "__main__":
    sys.exit(main())
