"""Measures each hop of a request in process: ``python -m tests.bench.hops``. Requests for a single mlp digit.

The figures are medians of many repetitions; a busy machine changes them, but seldom their order. The cost of thread changes is
the difference between a request through the batcher and the sum of what the batcher's slot does.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from prometheus_client import CollectorRegistry

from serve.access.identity import Account, Accounts, Caller
from serve.api.admission import Admission, Call, InFlight
from serve.api.digits_v1 import DigitService
from serve.core.generate import Core
from serve.core.request import Addresses, DigitsRequest
from serve.engine.factory import make_engine
from serve.engine.provider import EngineOptions
from serve.latents import LatentReader, Span
from serve.manifest import BUNDLED_DIR
from serve.models.catalog import Catalog
from serve.models.model import open_model
from serve.models.repository import read_bundle
from serve.observability.metrics import Metrics, RpcMetrics
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.settings import Settings
from serve.waiting import Steps

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
    service = DigitService(core, list)
    admission = Admission(metrics, InFlight(), Accounts(None, 0, 0.0))
    observed = RpcMetrics(metrics, "unary", "bench", "Generate")
    raw = pb.GenerateRequest(model="mlp", count=1, seed=7).SerializeToString()
    record = DigitsRequest(rows=Addresses(7, 0, 1), model="mlp")
    everyone = Account("bench", 0, 0.0)
    message = pb.GenerateRequest.FromString(raw)

    def admit() -> None:
        call = Call(admission, observed, None)
        call.admit(Caller(lambda: "ipv4:127.0.0.1:1"), "generate")
        call.answered()
        call.ended()
        call.sent()

    def whole(what: Callable[[], Coroutine[Any, Any, Any]]) -> float:
        times = []
        ended = threading.Event()

        async def timed() -> None:
            begun = time.perf_counter()
            await what()
            times.append(time.perf_counter() - begun)
            ended.set()

        for _ in range(REPEATS):
            ended.clear()
            Steps(timed()).begin()
            ended.wait()
        return statistics.median(times) * 1e6

    call = cast(Any, SimpleNamespace(deadline=None, account=everyone, encoded=lambda digits, seconds: None))
    engine = make_engine(bundle.model, bundle.manifest, EngineOptions(), 64)
    reader, feeds = LatentReader(64), engine.blank(1)
    spans = [Span(7, 0, 1)]
    hops = {
        "api: parse the message": microseconds(lambda: pb.GenerateRequest.FromString(raw)),
        "api: admit, count, time": microseconds(admit),
        "core: find the model, check": microseconds(lambda: core._resolve(record)),
        "batching: assemble the latents": microseconds(lambda: reader.fill(feeds["latents"], spans)),
        "engine: run": microseconds(lambda: engine.run(feeds)),
    }
    through_core = whole(lambda: core.generate(record, everyone))
    through_api = whole(lambda: service.generate(message, call))
    inside = hops["core: find the model, check"] + hops["batching: assemble the latents"] + hops["engine: run"]
    hops["batching: queue, and the change of thread"] = through_core - inside
    hops["api: the request's record, and encoding the answer"] = through_api - through_core
    hops["all of it, without gRPC"] = through_api + hops["api: parse the message"] + hops["api: admit, count, time"]
    assert model.batcher.close(30) == 0
    return hops


def main() -> int:
    """Print the table."""
    for hop, cost in measure().items():
        print(f"{hop:52s} {np.round(cost, 1):8.1f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
