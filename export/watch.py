"""A live server against PyTorch, for as long as it runs: ``python -m export watch --target HOST:PORT``.

Asks for random addresses and for explicit latents as FLOAT32, runs the same rows through the bundle's TorchScript, and
exports the largest difference. It is a process of its own: the server stays free of torch, and a server that is wrong
cannot vouch for itself.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from export.errors import ExportError
from export.to_torchscript import load_torchscript
from serve import latents as address
from serve.client import DigitClient
from serve.errors import BundleError
from serve.latents import INDEX_LIMIT, SEED_LIMIT
from serve.manifest import TORCHSCRIPT_FILE, Manifest
from serve.repository import latest_bundles, read_bundle

ROWS = 16
DIFFERENCE_BUCKETS = (1e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference of a pixel in [0, 1] over ``rows`` rows, and whether it is allowed."""

    model: str
    version: int
    source: str  # "address" or "latents"
    rows: int
    difference: float
    tolerance: float

    @property
    def breach(self) -> bool:
        return not self.difference <= self.tolerance  # a NaN is a breach


class WatchMetrics:
    """What the watch exports, on an injected registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("model", "version", "source")
        self.difference = Histogram(
            "digits_watch_difference",
            "Largest difference between a served pixel in [0, 1] and PyTorch's",
            labels,
            buckets=DIFFERENCE_BUCKETS,
            registry=registry,
        )
        self.breaches = Counter("digits_watch_breaches", "Comparisons beyond the bundle's tolerance", labels, registry=registry)
        self.failures = Counter("digits_watch_failures", "Comparisons that could not be made", ("code",), registry=registry)
        self.last = Gauge("digits_watch_last_check_timestamp_seconds", "When the last comparison was made", registry=registry)

    def record(self, check: Check) -> None:
        labels = (check.model, str(check.version), check.source)
        self.difference.labels(*labels).observe(check.difference)
        breaches = self.breaches.labels(*labels)
        if check.breach:
            breaches.inc()
        self.last.set_to_current_time()


class Watch:
    """Compares the models of ``models_dir`` as ``client``'s server serves them. Raises ExportError for bad bundles."""

    def __init__(self, client: DigitClient, models_dir: Path, chance: random.Random) -> None:
        self._client = client
        self._chance = chance
        self._modules: list[tuple[Manifest, torch.jit.ScriptModule]] = []
        try:
            for path in latest_bundles(models_dir):
                bundle = read_bundle(path)
                self._modules.append((bundle.manifest, load_torchscript((path / TORCHSCRIPT_FILE).read_bytes())))
        except BundleError as error:
            raise ExportError(str(error)) from None

    def round(self) -> list[Check]:
        """One comparison by address and one by explicit latents for each model. Raises grpc.RpcError."""
        checks = []
        for manifest, module in self._modules:
            seed, start = self._chance.randrange(SEED_LIMIT), self._chance.randrange(INDEX_LIMIT - ROWS)
            rows = address.draw(seed, start, ROWS, manifest.latent_size)
            served = self._client.generate(
                ROWS, seed=seed, start=start, model=manifest.name, version=manifest.version, as_float=True, bulk=True
            )
            checks.append(_check(manifest, module, "address", rows, served.pixels))
            rows = np.array([[self._chance.gauss(0, 1) for _ in range(manifest.latent_size)] for _ in range(ROWS)], np.float32)
            served = self._client.generate(latents=rows, model=manifest.name, version=manifest.version, as_float=True, bulk=True)
            checks.append(_check(manifest, module, "latents", rows, served.pixels))
        return checks


def watch_forever(watch: Watch, metrics: WatchMetrics, interval_s: float, stop: threading.Event) -> None:
    """Compare every ``interval_s`` until ``stop`` is set. A server that does not answer is counted, not fatal."""
    while not stop.is_set():
        try:
            for check in watch.round():
                metrics.record(check)
        except grpc.RpcError as error:
            metrics.failures.labels(error.code().name).inc()
        stop.wait(interval_s)


def table(checks: list[Check]) -> str:
    """The checks for a person."""
    lines = ["model         by        rows  largest difference   allowed"]
    for check in checks:
        name = f"{check.model}/{check.version}"
        verdict = "  BREACH" if check.breach else ""
        lines.append(f"{name:13s} {check.source:8s} {check.rows:5d} {check.difference:19.2e} {check.tolerance:9.0e}{verdict}")
    return "\n".join(lines)


def _check(
    manifest: Manifest, module: torch.jit.ScriptModule, source: str, rows: NDArray[np.float32], served: NDArray[np.float32]
) -> Check:
    with torch.no_grad():
        images, _ = module(torch.from_numpy(rows))
    difference = float(np.abs(images.numpy()[:, 0] - served).max())
    return Check(manifest.name, manifest.version, source, len(rows), difference, manifest.tolerance.images)
