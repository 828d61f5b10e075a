"""Measures a bundle's maximum batch size and writes it into the manifest, so that it is the same on every machine.

If servers measured it at start, it would depend on the machine's other work, and replicas would differ for
as long as they live.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from export.errors import ExportError
from serve.engine.cuda_engine import make_engine
from serve.engine.provider import EngineOptions, Provider
from serve.files import replace_file
from serve.manifest import MANIFEST_FILE, SCHEMA_VERSION
from serve.models.repository import Bundle

# A batch should not hold others up for longer than this: it is the wait of a caller who comes a moment too late.
# Beyond it batches gain nothing on a CPU: 16 images a run were as fast as 256 for the dcgan.
BATCH_SECONDS = 0.005
LARGEST = {"cpu": 64, "cuda": 4096}
WORTH = 0.9  # of the most images a second; on a GPU a larger batch may make fewer (docs/decisions/0012-cuda.md)
ROUNDS = 20


@dataclass(frozen=True)
class Timing:
    """The fastest of many runs of one batch size, in seconds."""

    size: int
    run_s: float

    @property
    def images_per_s(self) -> float:
        return self.size / self.run_s


def time_batches(bundle: Bundle, provider: Provider) -> list[Timing]:
    """Time every power of two, by turns: the fastest run of many is what the machine can do when nothing disturbs it."""
    engine = make_engine(bundle.model, bundle.manifest, EngineOptions(provider=provider), LARGEST[provider])
    engine.warm()
    sizes = [1 << power for power in range(LARGEST[provider].bit_length())]
    fastest = dict.fromkeys(sizes, float("inf"))
    for _ in range(ROUNDS):
        for size in sizes:
            feeds = engine.sample(size)
            begun = time.perf_counter()
            engine.run(feeds)
            fastest[size] = min(fastest[size], time.perf_counter() - begun)
    return [Timing(size, run_s) for size, run_s in fastest.items()]


def choose(timings: list[Timing]) -> int:
    """The largest of the sizes that run in at most ``BATCH_SECONDS`` and reach ``WORTH`` of the best rate among them; 1 if
    none does."""
    short = [timing for timing in timings if timing.run_s <= BATCH_SECONDS]
    best = max((timing.images_per_s for timing in short), default=0.0)
    return max((timing.size for timing in short if timing.images_per_s >= WORTH * best), default=1)


def write(bundle: Bundle, provider: Provider, size: int) -> Path:
    """Write a batch size into a bundle's manifest; returns the manifest's path. Raises ExportError."""
    manifest = msgspec.structs.replace(bundle.manifest, batch_sizes={**bundle.manifest.batch_sizes, provider: size})
    manifest = msgspec.structs.replace(manifest, schema_version=SCHEMA_VERSION)
    path = bundle.path / MANIFEST_FILE
    try:
        replace_file(path, manifest.to_json().encode(), 0o644)
    except OSError as error:
        raise ExportError(f"{path} cannot be written ({error.strerror}); leave --write out") from None
    return path
