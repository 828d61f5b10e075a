"""The gRPC methods of both APIs over a model whose engine is a stand-in: no port, no ONNX Runtime."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Self, cast

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from serve.access.budget import Budget
from serve.access.identity import Accounts
from serve.api.admission import Admission
from serve.api.digits_v1 import SERVICE, DigitService
from serve.api.open_inference import OpenInferenceService
from serve.api.rpc import Method
from serve.batching.batcher import Batcher
from serve.core.generate import Core
from serve.models.catalog import Catalog
from serve.models.model import Model
from serve.observability.metrics import Metrics
from serve.observability.model_metrics import ModelMetrics
from tests.fake_engine import LATENT_SIZE, TIMEOUT_S, FakeEngine, make_limits
from tests.fake_wire import FakeWire

MAX_COUNT, MAX_COUNT_FLOAT32 = 64, 32


class FakeService:
    """A core with one model, ``mlp`` version 1, whose digits are the bytes of their latents; and the methods that use it."""

    def __init__(
        self,
        before: Callable[[NDArray[np.float32]], None] = lambda latents: None,
        *,
        labels: int = 0,
        budget_bytes: int = 1 << 30,
        tracing: Any = None,
        **limits: float,
    ) -> None:
        """``before`` is called in each run; ``limits`` are the batcher's."""
        self.metrics = Metrics(CollectorRegistry())
        observer = ModelMetrics(self.metrics, "mlp", 1)
        engine = FakeEngine(before, labelled=labels > 0)
        self.batcher = Batcher(make_limits(labels=labels, **limits), lambda: engine, observer)
        self.batcher.start()
        outputs = [SimpleNamespace(name="pixels", shape=(28, 28)), SimpleNamespace(name="images", shape=(1, 28, 28))]
        manifest = SimpleNamespace(
            name="mlp", version=1, latent_size=LATENT_SIZE, labels=labels, height=28, width=28, outputs=outputs
        )
        self.model = Model(cast(Any, SimpleNamespace(manifest=manifest, digest="")), "cpu", self.batcher, observer)
        catalog = Catalog("mlp")
        catalog.put(self.model)
        self.core = Core(catalog, MAX_COUNT, MAX_COUNT_FLOAT32)
        self.budget = Budget(budget_bytes)
        self.admission = Admission(self.metrics, Accounts(None, 0, 0.0), self.budget, tracing)
        self.workers = ThreadPoolExecutor(1, "worker")
        own = DigitService(self.core, lambda: []).table(self.admission, self.workers)
        inference = OpenInferenceService(self.core, lambda: None, self.metrics, lambda: [])
        self.methods: dict[str, Method] = own.methods | inference.table(self.admission, self.workers).methods

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.batcher.close(TIMEOUT_S)
        self.workers.shutdown()

    def call(self, name: str, request: Message | bytes, wire: FakeWire | None = None, service: str = SERVICE) -> FakeWire:
        """Call a method that is begun, or run the task of one that is a task."""
        wire = wire or FakeWire()
        raw = request if isinstance(request, bytes) else request.SerializeToString()
        method = self.methods[f"/{service}/{name}"]
        if method.begin is not None:
            method.begin(wire, raw)
        else:
            assert method.task is not None
            asyncio.run(method.task(wire, raw))
        return wire


class Holder:
    """What a request holds, written down."""

    def __init__(self, images_limit: int = 0) -> None:
        self.images_limit = images_limit
        self.taken: list[tuple[int, int]] = []

    def take(self, images: int, size: int) -> None:
        self.taken.append((images, size))


class Untouchable(Sequence[int]):
    """So many labels, none of which may be looked at."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("a label is looked at before their number is checked")
