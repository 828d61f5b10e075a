"""One served model version: its bundle, its batcher, and whether it may answer. Knows no gRPC.

Callers wait on the event loop, the batcher works in threads; results cross over once per batch, not once per caller.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from serve.batcher import Batcher, Limits
from serve.engine import Engine, EngineOptions, Provider, golden_difference, golden_samples
from serve.errors import QueueFullError, ServeError, UnavailableError
from serve.fair_queue import Priority, Ticket
from serve.latents import Span
from serve.metrics import Metrics, ModelMetrics
from serve.repository import Bundle
from serve.settings import Settings, parse_cuda_options

log = logging.getLogger(__name__)

# A batch should not hold others up for longer than this: it is the wait of a caller who comes a moment too late.
# Beyond it batches gain nothing on a CPU: 16 images a run were as fast as 256 for the dcgan.
BATCH_SECONDS = 0.005
MOST_TUNED_BATCH = {"cpu": 64, "cuda": 1024}
TIMING_RUNS = 3
JOIN_S = 5.0  # for an instance's running batch to end


class Usage:
    """Counts the blocks that are in it. One object for all of them: it is entered once for every request."""

    def __init__(self) -> None:
        self.calls = 0
        self.unused = asyncio.Event()
        self.unused.set()

    def __enter__(self) -> None:
        if not self.calls:
            self.unused.clear()
        self.calls += 1

    def __exit__(self, *_: object) -> None:
        self.calls -= 1
        if not self.calls:
            self.unused.set()


class Model:
    """A model version that answers requests. Make it with ``open_model``."""

    def __init__(self, bundle: Bundle, provider: Provider, batcher: Batcher, metrics: ModelMetrics) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.provider = provider
        self.batcher = batcher
        self.metrics = metrics
        self.breached = False
        self._usage = Usage()

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return not self.breached and self.batcher.live_instances > 0

    @property
    def calls(self) -> int:
        """Calls under way."""
        return self._usage.calls

    def in_use(self) -> Usage:
        """A block that keeps the model from being released while a call, however long, is answered by it."""
        return self._usage

    async def release(self, timeout_s: float) -> int:
        """Let the calls under way finish, then end the instances. Returns how many requests the timeout cut off."""
        deadline = time.monotonic() + timeout_s
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._usage.unused.wait()
        cut_off = await asyncio.to_thread(self.batcher.drain, deadline)
        if stuck := await asyncio.to_thread(self.batcher.close, JOIN_S):
            log.error("%d instances of %s/%s did not end", stuck, self.manifest.name, self.manifest.version)
        return cut_off

    def gauges(self) -> Mapping[str, Callable[[], float]]:
        """What ``Metrics.bind_gauges`` reads whenever it is scraped."""
        batcher = self.batcher
        return {
            "queue_images": lambda: batcher.queued_images,
            "queue_limit": lambda: batcher.limits.max_queue_images,
            "running_images": lambda: batcher.running_images,
            "instances_busy": lambda: batcher.busy_instances,
            "instances_live": lambda: batcher.live_instances,
            "model_ready": lambda: self.ready,
        }

    async def generate(self, span: Span, want_images: bool, priority: Priority, deadline: float | None) -> Ticket:
        """Run the span's rows; the ticket returned holds them in ``parts``. Raises ServeError."""
        if self.breached:
            raise UnavailableError(f"model {self.manifest.name}/{self.manifest.version} fails its golden check")
        ticket = await self._run(span, want_images, priority, deadline)
        self.metrics.queue_wait(ticket.queue_seconds)
        return ticket

    async def _run(self, span: Span, want_images: bool, priority: Priority, deadline: float | None) -> Ticket:
        """A ticket's way through the batcher; it is given up when its waiter is cancelled."""
        waiter = asyncio.get_running_loop().create_future()
        ticket = Ticket(span, want_images, priority, deadline, waiter)
        self.batcher.submit(ticket)
        try:
            await waiter
        except asyncio.CancelledError:
            self.batcher.cancel(ticket)
            raise
        return ticket

    async def self_check(self) -> None:
        """The golden check through the live batcher; a breach stops the model until a later check passes."""
        samples = golden_samples(self.manifest)
        span = Span(0, 0, len(samples.latents), samples.latents, samples.labels)
        try:
            ticket = await self._run(span, False, Priority.BULK, None)
        except QueueFullError:
            self.metrics.self_checks("skipped").inc()
            return
        except ServeError as error:
            self.metrics.self_checks("failed").inc()
            log.error("self-check of %s/%s could not run: %s", self.manifest.name, self.manifest.version, error)
            return
        problem = golden_difference(self.manifest, samples.pixels, joined_rows(ticket))
        self.metrics.self_checks("breach" if problem else "passed").inc()
        if problem:
            log.error("self-check of %s/%s: %s", self.manifest.name, self.manifest.version, problem)
        elif self.breached:
            log.warning("self-check of %s/%s passes again", self.manifest.name, self.manifest.version)
        self.breached = problem is not None


def open_model(
    bundle: Bundle,
    provider: Provider,
    settings: Settings,
    metrics: Metrics,
    loop: asyncio.AbstractEventLoop,
    *,
    batch_size: int = 0,
) -> Model:
    """Load, check against the golden samples, warm and start. Raises BundleError or ProviderError.

    ``batch_size`` is what an earlier version was tuned to: on a busy machine timing it again would mislead.
    """
    manifest = bundle.manifest
    options = engine_options(settings, provider)
    model_metrics = ModelMetrics(metrics, manifest.name, manifest.version)
    max_batch_size = settings.max_batch_size or batch_size
    if not max_batch_size:
        max_batch_size = tuned_batch_size(Engine(bundle.model, manifest, options, MOST_TUNED_BATCH[provider]))

    def make_runner() -> Engine:
        engine = Engine(bundle.model, manifest, options, max_batch_size)
        engine.check_golden()
        engine.warm()
        for captured in engine.captures.values():
            model_metrics.graph_capture("captured" if captured else "failed")
        return engine

    limits = Limits(
        latent_size=manifest.latent_size,
        labels=manifest.labels,
        max_batch_size=max_batch_size,
        max_queue_images=settings.max_queue_images,
        max_queue_delay_s=settings.max_queue_delay_us / 1e6,
        crowd_rest_s=settings.crowd_rest_us / 1e6,
        instances=settings.instances or (len(os.sched_getaffinity(0)) if provider == "cpu" else 1),
        watchdog_s=settings.watchdog_s,
    )

    def deliver(tickets: Sequence[Ticket]) -> None:
        if tickets:
            loop.call_soon_threadsafe(wake_callers, tickets)

    batcher = Batcher(limits, make_runner, deliver, model_metrics)
    batcher.start()
    return Model(bundle, provider, batcher, model_metrics)


def engine_options(settings: Settings, provider: Provider) -> EngineOptions:
    """What the settings say of how sessions run on ``provider``."""
    cuda_options = parse_cuda_options(settings.cuda_options)
    if settings.gpu_mem_limit_mib:
        cuda_options["gpu_mem_limit"] = str(settings.gpu_mem_limit_mib << 20)
    return EngineOptions(
        provider=provider,
        intra_op_threads=settings.intra_op_threads,
        powers=settings.buckets == "powers",
        cuda_graphs=settings.cuda_graphs != "off",
        cuda_options=cuda_options,
    )


def tuned_batch_size(engine: Engine) -> int:
    """The largest power of two whose run takes at most ``BATCH_SECONDS``, best of three, on this machine."""
    size, largest = 1, MOST_TUNED_BATCH[engine.provider]
    while size < largest and _fastest_run(engine, size * 2) <= BATCH_SECONDS:
        size *= 2
    return size


def joined_rows(ticket: Ticket) -> NDArray[np.uint8]:
    """A finished ticket's rows in order, as one array."""
    return np.concatenate(ordered_rows(ticket))


def ordered_rows(ticket: Ticket) -> list[NDArray[np.uint8]]:
    """A finished ticket's rows in order, in the pieces they were computed in."""
    return [part.rows for part in sorted(ticket.parts, key=lambda part: part.first)]


def ordered_labels(ticket: Ticket) -> NDArray[np.int64] | None:
    """The labels of a finished ticket's rows in order; None for an unconditional model's."""
    if ticket.parts[0].labels is None:
        return None
    return np.concatenate([part.labels for part in sorted(ticket.parts, key=lambda part: part.first)])


def _fastest_run(engine: Engine, size: int) -> float:
    engine.latents(size)[:] = 0
    seconds = []
    for _ in range(TIMING_RUNS):
        started = time.perf_counter()
        engine.run(size)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def wake_callers(tickets: Sequence[Ticket]) -> None:
    """Complete the futures that tickets' callers wait for. For the event loop's thread."""
    for ticket in tickets:
        waiter = ticket.caller
        assert isinstance(waiter, asyncio.Future)
        if waiter.done():  # the caller left in the meantime
            continue
        if ticket.error is not None:
            waiter.set_exception(ticket.error)
        else:
            waiter.set_result(None)
