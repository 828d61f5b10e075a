"""Dynamic batching: instances that take what waits, run it, and hand the rows back. Knows no gRPC and no ONNX Runtime.

An idle instance takes what is queued at once, up to ``max_batch_size`` images. A second instance is woken only when a
full batch waits: on few cores a lone busy instance serves single digits best, all of them serve large requests best.
While there is a crowd, ``REST_CALLERS`` callers or more in one batch not longer than ``CROWD_S`` ago, an instance rests
``crowd_rest_s`` after each batch before it takes one that is not full: the next of the crowd are on their way, and a run
costs nearly the same for three as for twelve. A few callers never meet a resting instance.

What becomes of a batch is its own affair: a run that raises fails the callers of that batch and nobody else; one that
hangs past ``watchdog_s`` or whose thread dies does so too, and is replaced, at most ``MAX_REPLACEMENTS`` times.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve.errors import EngineError, ExpiredError, UnavailableError
from serve.fair_queue import Chunk, FairQueue, Part, Ticket
from serve.instance import Instance, Observer, Rows, Runner
from serve.latents import LatentReader

log = logging.getLogger(__name__)

MAX_REPLACEMENTS = 8

# With 64 single digits of the mlp in flight, resting made batches 13 images large instead of 3 and the server half as
# fast again; a longer rest gained nothing more, and with fewer callers than this it only cost them time.
REST_CALLERS = 5
CROWD_S = 0.1
LEAST_RETRY_S = 0.005


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The batcher's bounds; images, seconds."""

    latent_size: int
    labels: int  # how many there are to choose from; 0 for an unconditional model
    max_batch_size: int
    max_queue_images: int
    max_queue_delay_s: float
    crowd_rest_s: float
    instances: int
    watchdog_s: float


class Batcher:
    """Runs tickets through ``instances`` models made by ``make_runner``. Safe to call from any thread.

    ``deliver`` is called from an instance's thread with tickets that are complete or have failed. Each ticket is
    delivered exactly once, unless it was cancelled.
    """

    def __init__(
        self,
        limits: Limits,
        make_runner: Callable[[], Runner],
        deliver: Callable[[Sequence[Ticket]], None],
        observer: Observer,
    ) -> None:
        self.limits = limits
        self._make_runner = make_runner
        self._deliver = deliver
        self._observer = observer
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)  # nothing waits and nothing runs
        self._queue = FairQueue(limits.max_queue_images, limits.max_batch_size)
        self._instances: list[Instance] = []
        self._idle: deque[Instance] = deque()
        self._running_images = 0
        self._seconds_per_image = 0.0
        self._replacements = 0
        self._crowd_until = 0.0
        self._closed = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start every instance and wait until each has its model. Raises what making a model raised."""
        starting = [self._start_instance() for _ in range(self.limits.instances)]
        try:
            for instance in starting:
                instance.wait_started()
        except BaseException:
            self.close()
            raise

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket. Raises QueueFullError or UnavailableError, and then nothing was queued."""
        ticket.queued_at = time.monotonic()
        with self._lock:
            if self._closed:
                raise UnavailableError("the model is being released")
            if not self._instances:
                raise UnavailableError("the model has no working instance")
            self._queue.push(ticket, self._retry_after_s())
            self._wake_for_queue()

    def cancel(self, ticket: Ticket) -> None:
        """The caller left: waiting rows are dropped, running ones are thrown away when they come back."""
        with self._lock:
            if ticket.dead or ticket.done == ticket.span.count:
                return
            ticket.cancelled = True
            dropped = self._queue.discard(ticket)
            self._note_quiet()
        if dropped:
            self._observer.dropped(dropped, "cancelled")

    def drain(self, deadline: float) -> int:
        """Wait until nothing waits or runs, or ``deadline`` (monotonic); leftovers fail and their number is returned."""
        with self._lock:
            if self._quiet.wait_for(self._is_quiet, deadline - time.monotonic()):
                return 0
            left = self._queue.tickets() + [chunk.ticket for instance in self._instances for chunk in instance.batch]
            unique = list(dict.fromkeys(left))
            failed = [ticket for ticket in unique if self._fail(ticket, UnavailableError("the server stopped first"), "drain")]
        self._deliver(failed)
        return len(failed)

    def close(self, timeout_s: float = 0.0) -> int:
        """Let the instances end after their running batch; waiting tickets fail. Returns how many did not end in time.

        A thread that is inside a model's native code when the interpreter ends takes the process down with it.
        """
        with self._lock:
            self._closed = True
            failed = [t for t in self._queue.tickets() if self._fail(t, UnavailableError("the model is being released"), "drain")]
            for instance in self._instances:
                instance.wake.notify()
        self._deliver(failed)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    def check_stalled(self) -> None:
        """Give up instances that have run one batch for longer than ``watchdog_s``, and replace them."""
        now = time.monotonic()
        with self._lock:
            stalled = [
                instance
                for instance in self._instances
                if instance.busy_since is not None and now - instance.busy_since > self.limits.watchdog_s
            ]
        for instance in stalled:
            log.error("instance %d has run one batch for over %g s: given up", instance.number, self.limits.watchdog_s)
            self.lose(instance, EngineError("a run of the model hung"), "hung")

    @property
    def live_instances(self) -> int:
        return len(self._instances)

    @property
    def busy_instances(self) -> int:
        return sum(instance.busy_since is not None for instance in list(self._instances))

    @property
    def queued_images(self) -> int:
        return self._queue.images

    @property
    def running_images(self) -> int:
        return self._running_images

    def _start_instance(self) -> Instance:
        number = len(self._instances) + self._replacements
        reader = LatentReader(self.limits.latent_size, self.limits.labels)
        instance = Instance(number, self._lock, reader, self._make_runner, self._observer)
        instance.start(self)
        self._threads = [known for known in self._threads if known.is_alive()] + [instance.thread]
        return instance

    def add(self, instance: Instance) -> None:
        """An instance has its model and can take batches."""
        with self._lock:
            self._instances.append(instance)

    def next_batch(self, instance: Instance) -> list[Chunk] | None:
        """Wait for work. None when the batcher is closed or this instance has been given up."""
        while True:
            expired: list[Ticket] = []
            with self._lock:
                while not (instance.lost or self._closed) and not self._may_take(instance):
                    if instance not in self._idle:
                        self._idle.append(instance)
                    instance.wake.wait(self._wait_left_s(instance))
                if instance in self._idle:
                    self._idle.remove(instance)
                if instance.lost or (self._closed and not self._queue.images):
                    return None
                now = time.monotonic()
                chunks, late = self._queue.take(self.limits.max_batch_size, now)
                for ticket in late:
                    if self._fail(ticket, ExpiredError("the deadline passed while the request waited"), "expired"):
                        expired.append(ticket)
                for chunk in chunks:
                    if chunk.first == 0:
                        chunk.ticket.queue_seconds = now - chunk.ticket.queued_at
                if chunks:
                    instance.batch = chunks
                    instance.busy_since = now
                    self._running_images += sum(chunk.count for chunk in chunks)
                    self._wake_for_queue()
            if expired:
                self._deliver(expired)
            if chunks:
                return chunks

    def end_batch(self, instance: Instance, chunks: Sequence[Chunk], rows: Rows | None, compute_s: float) -> None:
        """Scatter a batch's rows to its tickets (None: the run failed) and deliver those that are complete."""
        finished: list[Ticket] = []
        with self._lock:
            if instance.lost:  # given up meanwhile: its tickets have been answered
                return
            self._release(instance)
            now = time.monotonic()
            if len(chunks) >= REST_CALLERS:
                self._crowd_until = now + CROWD_S
            if now < self._crowd_until:
                instance.rests_until = now + self.limits.crowd_rest_s
            offset = 0
            for chunk in chunks:
                ticket = chunk.ticket
                first, offset = offset, offset + chunk.count
                if ticket.dead:
                    continue
                if rows is None:
                    self._fail(ticket, EngineError("a run of the model failed"), "failed")
                    finished.append(ticket)
                    continue
                source = rows.images if ticket.want_images else rows.pixels
                assert source is not None
                own_labels = None if rows.labels is None else rows.labels[first:offset]
                ticket.parts.append(Part(chunk.first, source[first:offset], own_labels))
                ticket.compute_seconds += compute_s
                ticket.done += chunk.count
                if ticket.done == ticket.span.count:
                    finished.append(ticket)
            if rows is not None:
                self._seconds_per_image += 0.1 * (compute_s / offset - self._seconds_per_image)
        if finished:
            self._deliver(finished)

    def lose(self, instance: Instance, error: EngineError, reason: str) -> None:
        """Give an instance up: its callers fail, and another takes its place."""
        with self._lock:
            if instance.lost or instance not in self._instances:
                return
            instance.lost = True
            self._instances.remove(instance)
            tickets = dict.fromkeys(chunk.ticket for chunk in instance.batch)
            failed = [ticket for ticket in tickets if self._fail(ticket, error, "failed")]
            self._release(instance)
            replace = not self._closed and self._replacements < MAX_REPLACEMENTS
            self._replacements += 1
            self._wake_for_queue()
        self._observer.failed(reason)
        self._deliver(failed)
        if replace:
            self._replace(instance)
        elif not self._instances:
            self._fail_waiting()

    def _replace(self, instance: Instance) -> None:
        replacement = self._start_instance()

        def report() -> None:
            try:
                replacement.wait_started()
            except Exception:
                log.exception("instance %d could not be replaced", instance.number)
                if not self._instances:
                    self._fail_waiting()
                return
            with self._lock:
                self._wake_for_queue()
            log.warning("instance %d has been replaced", instance.number)

        threading.Thread(target=report, name="replacement", daemon=True).start()

    def _fail_waiting(self) -> None:
        with self._lock:
            error = UnavailableError("the model has no working instance")
            failed = [ticket for ticket in self._queue.tickets() if self._fail(ticket, error, "failed")]
        self._deliver(failed)

    def _release(self, instance: Instance) -> None:
        self._running_images -= sum(chunk.count for chunk in instance.batch)
        instance.batch = []
        instance.busy_since = None
        self._note_quiet()

    def _is_quiet(self) -> bool:
        return not self._queue.images and not self._running_images

    def _note_quiet(self) -> None:
        if self._is_quiet():
            self._quiet.notify_all()

    def _fail(self, ticket: Ticket, error: Exception, reason: str) -> bool:
        """Mark a ticket failed and drop its waiting rows; False when it was dead already. The lock is held."""
        if ticket.dead:
            return False
        ticket.error = error
        if dropped := self._queue.discard(ticket):
            self._observer.dropped(dropped, reason)
        self._note_quiet()
        return True

    def _may_take(self, instance: Instance) -> bool:
        waiting = self._queue.images
        return waiting > 0 and (waiting >= self.limits.max_batch_size or self._wait_left_s(instance) is None)

    def _wait_left_s(self, instance: Instance) -> float | None:
        """How long this instance leaves a batch that is not full where it is; None when it need not."""
        rest = instance.rests_until - time.monotonic() if instance.rests_until else 0.0
        if rest > 0:
            return rest
        instance.rests_until = 0.0
        return self._delay_left_s()

    def _delay_left_s(self) -> float | None:
        """How long a batch that is not full may still wait for company; None when it need not."""
        if not self.limits.max_queue_delay_s or not self._queue.images or self._closed:
            return None
        oldest = min(ticket.queued_at for ticket in self._queue.tickets())
        left = oldest + self.limits.max_queue_delay_s - time.monotonic()
        return left if left > 0 else None

    def _wake_for_queue(self) -> None:
        """Wake the instance that fell idle last: for a full batch, or if no other will come for it. The lock is held."""
        if not self._idle or not self._queue.images:
            return
        another_comes = len(self._idle) < len(self._instances) or any(instance.rests_until for instance in self._idle)
        if self._queue.images >= self.limits.max_batch_size or not another_comes:
            self._idle.pop().wake.notify()

    def _retry_after_s(self) -> float:
        """When the queue will probably have been worked off; never so short that a retry is a busy loop."""
        return max(LEAST_RETRY_S, self._queue.images * self._seconds_per_image / max(1, len(self._instances)))
