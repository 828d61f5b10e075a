"""One served model version: its bundle, its batcher, and whether it may answer. Knows no transport."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from serve.background import settle, until
from serve.batching.batcher import Batcher, Limits
from serve.batching.instance import Engine
from serve.batching.ticket import Priority, Ticket
from serve.engine.cuda_engine import make_engine
from serve.engine.golden import golden_difference, golden_samples
from serve.engine.provider import EngineOptions, Provider
from serve.engine.resources import usable_cores
from serve.engine.session import PIXELS
from serve.errors import EngineError, OutOfMemoryError, ProviderError, QueueFullError, ServeError, UnavailableError
from serve.latents import Span
from serve.manifest import Manifest
from serve.models.repository import Bundle
from serve.observability.metrics import Metrics
from serve.observability.model_metrics import ModelMetrics
from serve.settings import Settings, parse_cuda_options

log = logging.getLogger(__name__)

# For bundles without a figure of their own. A CPU gains nothing beyond it: 16 images a run were as fast as 256 for the dcgan.
DEFAULT_BATCH_SIZES: Mapping[Provider, int] = {"cpu": 16, "cuda": 1024}
# One uploads the next batch while the other computes: 12 % more dcgan digits from an H100 than by one.
CUDA_INSTANCES = 2
JOIN_S = 5.0  # for an instance's running batch to end


class RefCount:
    """Counts the calls that use something: until the last has left it is not to be released."""

    def __init__(self) -> None:
        self.calls = 0
        self._closed = False
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Count a call. False when it is closed."""
        with self._lock:
            if self._closed:
                return False
            self.calls += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self.calls -= 1

    def close(self) -> None:
        """Let no more calls in."""
        with self._lock:
            self._closed = True


class Model:
    """A model version that answers requests. Make it with ``open_model``."""

    def __init__(
        self,
        bundle: Bundle,
        provider: Provider,
        batcher: Batcher,
        metrics: ModelMetrics,
        *,
        batch_invariant: bool = False,
        device_latents: bool = False,
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.provider = provider
        self.batcher = batcher
        self.metrics = metrics
        self.device_latents = device_latents
        self.batch_invariant = batch_invariant  # whether a digit's bits were the same in batches of every size tried
        self.breached = False
        self.in_use = RefCount()

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return not self.breached and self.batcher.broken is None

    async def release(self, timeout_s: float) -> int:
        """Let the calls under way finish, then end the instances. Returns how many requests the timeout cut off."""
        self.in_use.close()
        await until(lambda: not self.in_use.calls, time.monotonic() + timeout_s)
        cut_off = self.batcher.cut_off()
        if stuck := await asyncio.to_thread(self.batcher.close, JOIN_S):
            log.error("%d instances of %s/%s did not end", stuck, self.manifest.name, self.manifest.version)
        return cut_off

    def gauges(self) -> dict[str, float]:
        """The values of ``GAUGES`` in serve/observability/metrics.py that a model knows by itself."""
        return {
            "queue_images": self.batcher.queued_images,
            "queue_limit_images": self.batcher.limits.max_queue_images,
            "running_images": self.batcher.running_images,
            "instances_busy": self.batcher.busy_instances,
            "instances_live": self.batcher.live_instances,
            "instances_wanted": self.batcher.limits.instances,
            "model_ready": self.ready,
            "device_latents": self.device_latents,
            "model_batch_invariant": self.batch_invariant,
        }

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket. Raises UnavailableError or QueueFullError, and then its completion is not called."""
        if self.breached:
            raise UnavailableError(f"model {self.manifest.name}/{self.manifest.version} fails its golden check")
        self.batcher.submit(ticket)

    async def run(self, ticket: Ticket) -> Ticket:
        """Run a ticket's rows; given up when the waiter is cancelled. On the event loop. Raises ServeError."""
        return await _ended(ticket, self.submit, self.batcher)

    async def self_check(self) -> None:
        """The golden check through the live batcher; a breach stops the model until a later check passes."""
        if not self.in_use.enter():
            return
        try:
            await self._self_check()
        finally:
            self.in_use.leave()

    async def _self_check(self) -> None:
        samples = golden_samples(self.manifest)
        span = Span(0, 0, len(samples.latents), samples.latents, samples.labels)
        name = f"{self.manifest.name}/{self.manifest.version}"
        try:
            ticket = await _ended(Ticket(span, PIXELS, Priority.BULK, None), self.batcher.submit, self.batcher)
        except QueueFullError:
            self.metrics.self_checks("skipped").inc()
            return
        except ServeError as error:
            self.metrics.self_checks("failed").inc()
            log.error("self-check of %s could not run: %s", name, error)
            return
        problem = golden_difference(self.manifest, samples.pixels, np.concatenate(ordered(ticket, "pixels")))
        self.metrics.self_checks("breach" if problem else "passed").inc()
        if problem:
            log.error("self-check of %s: %s", name, problem)
        elif self.breached:
            log.warning("self-check of %s passes again", name)
        self.breached = problem is not None


def open_model(bundle: Bundle, provider: Provider, settings: Settings, metrics: Metrics) -> Model:
    """Load, check against the golden samples, warm and start. Raises BundleError or ProviderError."""
    manifest = bundle.manifest
    model_metrics = ModelMetrics(metrics, manifest.name, manifest.version)
    limits = Limits(
        latent_size=manifest.latent_size,
        labels=manifest.labels,
        max_batch_size=settings.max_batch_size or batch_size(manifest, provider),
        max_queue_images=settings.max_queue_images,
        linger_s=settings.linger_us / 1e6,
        instances=settings.instances or (usable_cores() if provider == "cpu" else CUDA_INSTANCES),
        watchdog_s=settings.watchdog_s,
    )

    drawing: list[bool] = []
    differences: set[str] = set()  # of the engines' batches

    def load() -> Engine:
        engine = make_engine(bundle.model, manifest, engine_options(settings, provider), limits.max_batch_size)
        try:
            with engine.closed_if_it_fails():
                captures = engine.warm()
                engine.check_golden()  # of what will run: graphs, where there are any
                if difference := engine.batch_difference():
                    differences.add(difference)
        except OutOfMemoryError as error:
            raise ProviderError(
                f"{error}; name a smaller --max-batch-size or a larger --gpu-mem-limit-mib, or use --provider cpu"
            ) from None
        except EngineError as error:  # CUDA finds out at the first run that cuDNN or a kernel is missing
            raise ProviderError(f"{error}; use --provider cpu, or mend CUDA") from None
        for captured in captures.values():
            model_metrics.graph_capture("captured" if captured else "failed")
        drawing.append(engine.draws_latents)
        return engine

    make_engine_of = load
    if provider == "cpu":
        shared = load()  # one session for all instances: its weights and its arena exist once
        make_engine_of = lambda: shared  # noqa: E731  # a named function cannot replace the one above

    batcher = Batcher(limits, make_engine_of, model_metrics)
    batcher.start()
    for difference in differences:
        log.warning("%s/%s is not batch-invariant: %s", manifest.name, manifest.version, difference)
    return Model(bundle, provider, batcher, model_metrics, batch_invariant=not differences, device_latents=all(drawing))


def batch_size(manifest: Manifest, provider: Provider) -> int:
    """The most images in one run, where the settings do not say: the bundle's own figure, the same on every machine."""
    return manifest.batch_sizes.get(provider, DEFAULT_BATCH_SIZES[provider])


def engine_options(settings: Settings, provider: Provider) -> EngineOptions:
    """What the settings say of how sessions run on ``provider``."""
    cuda_options = parse_cuda_options(settings.cuda_options)
    if settings.gpu_mem_limit_mib:
        cuda_options["gpu_mem_limit"] = str(settings.gpu_mem_limit_mib << 20)
    return EngineOptions(
        provider=provider,
        device=settings.device,
        intra_op_threads=settings.intra_op_threads,
        pad_to_powers=settings.buckets == "powers",
        cuda_graphs=settings.cuda_graphs != "off",
        device_latents=settings.device_latents,
        cuda_options=cuda_options,
    )


def ordered(ticket: Ticket, name: str) -> list[NDArray[np.generic]]:
    """A finished ticket's rows of one output, or its ``labels``, in order and in the pieces they were computed in."""
    parts = ticket.parts
    if len(parts) > 1:
        parts = sorted(parts, key=lambda part: part.first)
    return [part.rows[name] for part in parts]


async def _ended(ticket: Ticket, submit: Callable[[Ticket], None], batcher: Batcher) -> Ticket:
    """Submit a ticket and wait for it on the event loop. Raises its error."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def completed(_: Ticket) -> None:
        loop.call_soon_threadsafe(settle, ended, None)

    ticket.completion = completed
    submit(ticket)
    try:
        await ended
    except asyncio.CancelledError:
        batcher.cancel(ticket)
        raise
    if ticket.error is not None:
        raise ticket.error
    return ticket
