"""Measures each hop of a request in process: ``python -m tests.bench.hops``. Requests for a single mlp digit.

The figures are medians of many repetitions; a busy machine changes them, but seldom their order. The cost of thread changes is
the difference between a request through the core and the sum of what the batcher's instance does.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from serve.access.budget import Budget, Hold
from serve.access.identity import Account, Accounts, Caller
from serve.api.admission import Admission, Call
from serve.api.digits_v1 import DigitService
from serve.core.generate import Core
from serve.core.request import Addresses, DigitsRequest
from serve.engine.cuda_engine import make_engine
from serve.engine.provider import EngineOptions
from serve.latents import LatentReader, Span
from serve.manifest import BUNDLED_DIR
from serve.models.catalog import Catalog
from serve.models.model import open_model
from serve.models.repository import read_bundle
from serve.observability.call_metrics import RpcMetrics
from serve.observability.metrics import Metrics
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.settings import Settings
from tests.fake_wire import FakeWire

REPEATS = 2000


def microseconds(run: Callable[[], Any]) -> float:
    """The median time of a call."""
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6


def measure() -> dict[str, float]:
    """Hop → microseconds."""
    metrics = Metrics(CollectorRegistry())
    bundle = read_bundle(BUNDLED_DIR / "mlp" / "1")
    model = open_model(bundle, "cpu", Settings(instances=1), metrics)
    catalog = Catalog("mlp")
    catalog.put(model)
    core = Core(catalog, 4096, 1024)
    admission = Admission(metrics, Accounts(None, 0, 0.0), Budget(1 << 30))
    table = DigitService(core, lambda: []).table(admission, ThreadPoolExecutor(1))
    observed = RpcMetrics(metrics, "unary", "bench", "Generate")
    raw = pb.GenerateRequest(model="mlp", count=1, seed=7).SerializeToString()
    record = DigitsRequest(rows=Addresses(7, 0, 1), model="mlp")
    begin = table.methods["/digits.v1.DigitGenerator/Generate"].begin
    assert begin is not None

    def admit() -> None:
        call = Call(admission, observed, Caller(lambda: "ipv4:127.0.0.1:1"), None)
        call.admit("generate")
        call.answered()
        call.sent()

    def whole() -> None:
        wire = FakeWire()
        begin(wire, raw)
        wire.ended()

    def through_core() -> None:
        ended = threading.Event()
        holder = Hold(Account("bench", 0, 0.0), Caller(), admission.budget)
        core.begin(record, holder, lambda result: ended.set())
        ended.wait()

    engine = make_engine(bundle.model, bundle.manifest, EngineOptions(), 64)
    reader, feeds = LatentReader(64), engine.sample(1)
    spans = [Span(7, 0, 1)]
    hops = {
        "api: parse the message": microseconds(lambda: pb.GenerateRequest.FromString(raw)),
        "api: admit, count, time": microseconds(admit),
        "batching: assemble the latents": microseconds(lambda: reader.fill(feeds["latents"], spans)),
        "engine: run": microseconds(lambda: engine.run(feeds)),
    }
    in_core, in_all = microseconds(through_core), microseconds(whole)
    in_instance = hops["batching: assemble the latents"] + hops["engine: run"]
    hops["core and batching: find the model, check, queue, change of thread"] = in_core - in_instance
    hops["api: the request's record, and encoding the answer"] = (
        in_all - in_core - hops["api: parse the message"] - hops["api: admit, count, time"]
    )
    hops["all of it, without gRPC"] = in_all
    assert model.batcher.close(30) == 0
    return hops


def main() -> int:
    """Print the table."""
    for hop, cost in measure().items():
        print(f"{hop:66s} {np.round(cost, 1):8.1f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
