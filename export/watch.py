"""Compares a live server with PyTorch for as long as it runs: ``python -m export watch --target HOST:PORT``.

Requests random addresses and explicit latents as FLOAT32, runs the same rows through the bundle's TorchScript, and
exports the largest difference as a metric. It is a separate process, so that the server needs no torch, and because a faulty
server cannot check itself.
"""

from __future__ import annotations

import logging
import math
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from export.errors import ExportError
from export.generator import torch_form
from export.graphs.to_torchscript import load_torchscript
from serve.client import DigitClient, DigitError
from serve.errors import BundleError
from serve.latents import INDEX_LIMIT, SEED_LIMIT, Span, draw_span
from serve.manifest import TORCHSCRIPT_FILE, Manifest
from serve.models.repository import read_bundle

log = logging.getLogger(__name__)

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


class Round(NamedTuple):
    """The comparisons of all versions, and why others could not be made: one version's failure leaves out no other."""

    checks: list[Check]
    failures: list[DigitError | ExportError]


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
        # A histogram has no bucket for a NaN, and its count would leave the comparison out.
        self.difference.labels(*labels).observe(math.inf if math.isnan(check.difference) else check.difference)
        breaches = self.breaches.labels(*labels)
        if check.breach:
            breaches.inc()
        self.last.set_to_current_time()


class Watch:
    """Compares what ``client``'s server serves with the bundles of ``models_dir``, version by version."""

    def __init__(self, client: DigitClient, models_dir: Path, chance: random.Random) -> None:
        self._client = client
        self._models_dir = models_dir
        self._chance = chance
        self._modules: dict[tuple[str, int], tuple[Manifest, torch.jit.ScriptModule]] = {}

    def round(self) -> Round:
        """One comparison by address and one by explicit latents for each version that is served at the moment.

        Raises DigitError when the server does not say what it serves.
        """
        served = {(summary.name, summary.version) for summary in self._client.list_models().models}
        self._modules = {key: module for key, module in self._modules.items() if key in served}
        done = Round([], [])
        for name, version in sorted(served):
            try:
                done.checks.extend(self._compare(name, version))
            except (DigitError, ExportError) as error:
                done.failures.append(error)
        return done

    def _compare(self, name: str, version: int) -> list[Check]:
        """Raises DigitError, or ExportError for a version that is not among the bundles or is another than theirs."""
        manifest, module = self._modules.get((name, version)) or self._load(name, version)
        checks = []
        seed, start = self._chance.randrange(SEED_LIMIT), self._chance.randrange(INDEX_LIMIT - ROWS)
        rows, labels = draw_span(Span(seed, start, ROWS), manifest.latent_size, manifest.labels)
        by_address = self._client.generate(ROWS, seed=seed, start=start, model=name, version=version, as_float=True, bulk=True)
        checks.append(_check(manifest, module, "address", (rows, labels), by_address.pixels))
        rows = np.array([[self._chance.gauss(0, 1) for _ in range(manifest.latent_size)] for _ in range(ROWS)], np.float32)
        by_latents = self._client.generate(
            latents=rows,
            labels=() if labels is None else labels.tolist(),
            model=name,
            version=version,
            as_float=True,
            bulk=True,
        )
        checks.append(_check(manifest, module, "latents", (rows, labels), by_latents.pixels))
        return checks

    def _load(self, name: str, version: int) -> tuple[Manifest, torch.jit.ScriptModule]:
        path = self._models_dir / name / str(version)
        try:
            bundle = read_bundle(path)
        except BundleError as error:
            raise ExportError(str(error)) from None
        if (digest := self._client.get_model(name, version).digest) != bundle.digest:
            raise ExportError(f"{path} is not what the server serves as {name}/{version} (digest {digest[:12]}...)")
        module = load_torchscript((path / TORCHSCRIPT_FILE).read_bytes())
        self._modules[name, version] = (bundle.manifest, module)
        return bundle.manifest, module


def watch_forever(watch: Watch, metrics: WatchMetrics, interval_s: float, stop: threading.Event) -> None:
    """Compare every ``interval_s`` until ``stop`` is set. A server that does not answer is counted, not fatal."""
    while not stop.is_set():
        try:
            done = watch.round()
        except DigitError as error:
            done = Round([], [error])
        for check in done.checks:
            metrics.record(check)
        for failure in done.failures:
            if isinstance(failure, DigitError):
                metrics.failures.labels(failure.code().name).inc()
            else:
                log.error("%s", failure)
                metrics.failures.labels("bundle").inc()
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
    manifest: Manifest,
    module: torch.jit.ScriptModule,
    source: str,
    inputs: tuple[NDArray[np.float32], NDArray[np.int64] | None],
    served: NDArray[np.float32],
) -> Check:
    expected = torch_form(module)(*inputs)["images"]
    difference = float(np.abs(expected[:, 0] - served).max())
    return Check(manifest.name, manifest.version, source, len(served), difference, manifest.tolerance.images)
