"""One served model version: its bundle, its batcher, and whether it may answer. Knows no transport."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from serve.batching.batcher import Batcher
from serve.batching.limits import Limits
from serve.batching.slot import Runner
from serve.batching.ticket import Priority, Ticket
from serve.engine.cores import usable_cores
from serve.engine.factory import make_engine
from serve.engine.golden import golden_difference, golden_samples
from serve.engine.provider import EngineOptions, Provider
from serve.engine.session import PIXELS
from serve.errors import EngineError, ProviderError, QueueFullError, ServeError, UnavailableError
from serve.latents import Span
from serve.manifest import Manifest
from serve.models.repository import Bundle
from serve.observability.metrics import Metrics, ModelMetrics
from serve.settings import Settings, parse_cuda_options
from serve.waiting import RefCount, deferred, done, until

log = logging.getLogger(__name__)

# For bundles without a figure of their own. A CPU gains nothing beyond it: 16 images a run were as fast as 256 for the dcgan.
DEFAULT_BATCH_SIZES: Mapping[Provider, int] = {"cpu": 16, "cuda": 1024}
# One uploads the next batch while the other computes: 12 % more dcgan digits from an H100 than by one.
CUDA_INSTANCES = 2
JOIN_S = 5.0  # for a slot's running batch to end
TOGETHER = 64  # callers whose answers are sent together: the first of a large batch is not to wait for the last


class _Run:
    """A ticket's way through the batcher, for ``done`` to wait for."""

    __slots__ = ("_batcher", "_ticket")

    def __init__(self, batcher: Batcher, ticket: Ticket) -> None:
        self._batcher = batcher
        self._ticket = ticket

    def begin(self, ended: Callable[[], object]) -> None:
        self._ticket.caller = ended
        self._batcher.submit(self._ticket)

    def cancel(self) -> bool:
        return self._batcher.cancel(self._ticket)


class Model:
    """A model version that answers requests. Make it with ``open_model``."""

    def __init__(self, bundle: Bundle, provider: Provider, batcher: Batcher, metrics: ModelMetrics) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.provider = provider
        self.batcher = batcher
        self.metrics = metrics
        self.breached = False
        self.in_use = RefCount()

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return not self.breached and self.batcher.live_slots > 0 and self.batcher.device_lost is None

    async def release(self, timeout_s: float) -> int:
        """Let the calls under way finish, then end the slots. Returns how many requests the timeout cut off."""
        self.in_use.close()
        await until(lambda: not self.in_use.calls and self.batcher.quiet, time.monotonic() + timeout_s)
        cut_off = self.batcher.cut_off()
        if stuck := await asyncio.to_thread(self.batcher.close, JOIN_S):
            log.error("%d slots of %s/%s did not end", stuck, self.manifest.name, self.manifest.version)
        return cut_off

    def gauges(self) -> Mapping[str, Callable[[], float]]:
        """What ``Metrics.bind_gauges`` reads whenever it is scraped."""
        batcher = self.batcher
        return {
            "queue_images": lambda: batcher.queued_images,
            "queue_limit": lambda: batcher.limits.max_queue_images,
            "running_images": lambda: batcher.running_images,
            "instances_busy": lambda: batcher.busy_slots,
            "instances_live": lambda: batcher.live_slots,
            "instances_wanted": lambda: batcher.limits.slots,
            "model_ready": lambda: self.ready,
        }

    async def run(
        self,
        span: Span,
        outputs: Sequence[str],
        priority: Priority,
        deadline: float | None,
        waits_for_room: bool = False,
        *,
        checking: bool = False,
    ) -> Ticket:
        """Run a span's rows through the batcher; given up when the waiter is cancelled. Raises ServeError.

        Only ``checking``, whether it does so again, goes on while the model fails its golden check.
        """
        if self.breached and not checking:
            raise UnavailableError(f"model {self.manifest.name}/{self.manifest.version} fails its golden check")
        ticket = Ticket(span, outputs, priority, deadline, waits_for_room=waits_for_room)
        await done(_Run(self.batcher, ticket))
        if ticket.error is not None:
            raise ticket.error
        return ticket

    async def self_check(self) -> None:
        """The golden check through the live batcher; a breach stops the model until a later check passes."""
        samples = golden_samples(self.manifest)
        span = Span(0, 0, len(samples.latents), samples.latents, samples.labels)
        name = f"{self.manifest.name}/{self.manifest.version}"
        try:
            ticket = await self.run(span, PIXELS, Priority.BULK, None, checking=True)
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
        slots=settings.instances or (usable_cores() if provider == "cpu" else CUDA_INSTANCES),
        watchdog_s=settings.watchdog_s,
    )

    def load() -> Runner:
        engine = make_engine(bundle.model, manifest, engine_options(settings, provider), limits.max_batch_size)
        try:
            engine.check_golden()
            captures = engine.warm()
        except EngineError as error:  # CUDA finds out at the first run that cuDNN or a kernel is missing
            raise ProviderError(f"{error}; use --provider cpu, or mend CUDA") from None
        for captured in captures.values():
            model_metrics.graph_capture("captured" if captured else "failed")
        return engine

    make_runner = load
    if provider == "cpu":
        shared = load()  # one session for all slots: its weights and its arena exist once
        make_runner = lambda: shared  # noqa: E731  # a named function cannot replace the one above

    batcher = Batcher(limits, make_runner, wake_callers, model_metrics)
    batcher.start()
    return Model(bundle, provider, batcher, model_metrics)


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


def wake_callers(tickets: Sequence[Ticket]) -> None:
    """Tell the callers of tickets that these have come back, or have failed."""
    for first in range(0, len(tickets), TOGETHER):
        with deferred:
            for ticket in tickets[first : first + TOGETHER]:
                ticket.caller()
