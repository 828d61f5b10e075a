"""Dynamic batching: instances take waiting tickets, run them as a batch, and return the rows.

Knows no transport and no ONNX Runtime. ``serve.batching.policy`` decides when an instance takes a batch and how large it is,
``serve.batching.queue`` in which order.

If a run raises, the requests of that batch fail and no others. Some such runs of one instance in a row, a run that hangs for
longer than ``watchdog_s``, a thread that has ended or a lost device cannot be mended in this process: ``broken`` says so, and
whoever supervises it ends the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from serve.batching.instance import Engine, Instance, Observer
from serve.batching.policy import BatchPolicy
from serve.batching.queue import FairQueue
from serve.batching.ticket import Arrays, Batch, Ticket, complete, scatter
from serve.errors import CallerLeftError, DeviceLostError, EngineError, ExpiredError, UnavailableError
from serve.latents import LatentReader

log = logging.getLogger(__name__)

MOST_FAILED_RUNS = 8  # in a row, of one instance: the others' may succeed


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The batcher's bounds; images, seconds."""

    latent_size: int
    labels: int  # how many there are to choose from; 0 for an unconditional model
    max_batch_size: int
    max_queue_images: int
    linger_s: float
    instances: int
    watchdog_s: float


class Batcher:
    """Runs tickets through ``limits.instances`` engines made by ``make_engine``. Safe to call from any thread.

    A ticket is completed exactly once: with its rows, or with an error.
    """

    def __init__(self, limits: Limits, make_engine: Callable[[], Engine], observer: Observer) -> None:
        self.limits = limits
        self._observer = observer
        self._lock = threading.Lock()
        self._queue = FairQueue(limits.max_queue_images, limits.max_batch_size)
        self._policy = BatchPolicy(limits.linger_s, limits.max_batch_size)
        self._instances = [
            Instance(number, self._lock, LatentReader(limits.latent_size, limits.labels), make_engine, observer)
            for number in range(limits.instances)
        ]
        self._threads: list[threading.Thread] = []
        self._idle: list[Instance] = []
        self._lingering: Instance | None = None  # the one idle instance that waits for a batch to fill
        self._working = self._running_images = 0
        self._busy_s = 0.0
        self._closed = False
        self.broken: str | None = None  # why this process is to be ended

    def start(self) -> None:
        """Start every instance and wait until each has its engine. Raises what making an engine raised."""
        for instance in self._instances:
            instance.start(self)
            self._threads.append(instance.thread)
        try:
            for instance in self._instances:
                instance.wait_started()
        except BaseException:
            self.close()
            raise

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket, unless it has failed already. Raises QueueFullError or UnavailableError; then nothing was queued."""
        ticket.queued_at = now = time.monotonic()
        with self._lock:
            if ticket.error is not None:  # cancelled by another thread, just now
                return
            if self._closed or self.broken:
                raise UnavailableError(self.broken or "the model is being released")
            self._queue.push(ticket, self._policy.seconds_per_image / len(self._instances))
            self._wake_an_instance(now)

    def cancel(self, ticket: Ticket) -> None:
        """The caller has left: waiting rows are dropped, running ones are thrown away when they come back."""
        with self._lock:
            if ticket.error is not None or ticket.done == ticket.span.count:
                return
            ticket.error = CallerLeftError("the caller has left")
            dropped = self._queue.discard(ticket)
            self._wake_an_instance(time.monotonic())  # for what has waited for the room
        if dropped:
            self._observer.dropped(dropped, "cancelled")
        complete((ticket,))

    def cut_off(self) -> int:
        """Fail what waits and what runs; returns how many tickets those were."""
        with self._lock:
            running = [ticket for instance in self._instances for ticket in instance.tickets]
            failed = self._fail([*self._queue.tickets(), *running], UnavailableError("the server stopped first"), "drain")
        complete(failed)
        return len(failed)

    def close(self, timeout_s: float = 0.0) -> int:
        """Let the instances end after their running batch; waiting tickets fail. Returns how many did not end in time.

        A thread that is inside a model's native code when the interpreter ends takes the process down with it.
        """
        with self._lock:
            self._closed = True
            failed = self._fail(self._queue.tickets(), UnavailableError("the model is being released"), "drain")
            for instance in self._instances:
                instance.wake.notify()
        complete(failed)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = sum(thread.is_alive() for thread in self._threads)
        # Instances and this object hold each other: without this line the engines would live until a garbage collection.
        self._instances = []
        return stuck

    def watch(self, seen_s: float) -> None:
        """Fail an instance that has run one batch for longer than ``watchdog_s``.

        ``seen_s``: the time since the last call, as far as the process was running: while it is stopped nothing hangs.
        """
        with self._lock:
            busy = [instance for instance in self._instances if instance.batches]
            for instance in busy:
                instance.watched_s += seen_s
            hung = [instance for instance in busy if instance.watched_s > self.limits.watchdog_s]
        for instance in hung:
            self.fail(instance, "hung", f"a run of the model has taken more than {self.limits.watchdog_s:g} s")

    @property
    def busy_instances(self) -> int:
        return self._working

    @property
    def live_instances(self) -> int:
        return len(self._instances)

    @property
    def busy_s(self) -> float:
        """What ended runs have taken since the start, assembly included, in seconds."""
        return self._busy_s

    @property
    def queued_images(self) -> int:
        return self._queue.images

    @property
    def running_images(self) -> int:
        return self._running_images

    # What the instances call.

    def next_batch(self, instance: Instance, *, wait: bool = True) -> Batch | None:
        """Wait for work; without ``wait``, of an instance whose run is not delivered yet, take what there is now, if anything.
        None when the batcher is closed or the instance has been given up."""
        while True:
            expired: list[Ticket] = []
            batch: Batch | None = None
            with self._lock:
                now = self._wait_for_work(instance) if wait else time.monotonic()
                if instance not in self._instances or (self._closed and not self._queue.images):
                    return None
                working = self._working - (not wait)  # but for itself
                if not wait and (not self._queue.images or self._policy.left_s(self._queue, working, now) != 0):
                    return None
                chunks, late = self._queue.take(self._policy.images(self._queue, len(self._instances) - working), now)
                if late:
                    expired = self._fail(late, ExpiredError("the deadline passed while the request waited"), "expired")
                if chunks:
                    images = 0
                    for ticket, first, count in chunks:
                        images += count
                        ticket.wait_seconds = now - ticket.queued_at
                        if first == 0:
                            ticket.queue_seconds = ticket.wait_seconds
                    batch = Batch(chunks, images)
                    self._hand_out(instance, batch, now)
                self._wake_an_instance(now)
            complete(expired)
            if batch is not None:
                return batch

    def end_batch(self, instance: Instance, batch: Batch, rows: Arrays | None, compute_s: float) -> None:
        """Scatter a batch's rows to its tickets (None: the run failed) and complete those that have all of theirs."""
        with self._lock:
            if instance not in self._instances:  # given up meanwhile: its tickets have been failed
                return
            chunks, now = batch.chunks, self._take_back(instance, batch)
            self._policy.note_batch(len(chunks), now)
            if rows is None:
                finished = self._fail([chunk.ticket for chunk in chunks], EngineError("a run of the model failed"), "failed")
                instance.failed_runs += 1
                if instance.failed_runs == MOST_FAILED_RUNS:
                    self._observer.failed("repeated")
                    finished += self._break(f"{MOST_FAILED_RUNS} runs in a row have failed on instance {instance.number}")
            else:
                instance.failed_runs = 0
                finished = scatter(chunks, rows, compute_s)
                self._policy.note_run(batch.images, compute_s)
        complete(finished)

    def fail(self, instance: Instance, reason: str, why: str) -> None:
        """Give an instance up: the tickets of its batch fail, and the process is to be ended."""
        with self._lock:
            if instance not in self._instances:
                return
            self._instances.remove(instance)
            self.broken = self.broken or why
            failed = self._fail(instance.tickets, EngineError(why), "failed")
            for batch in [*instance.batches]:
                self._take_back(instance, batch)
            if not self._instances:
                failed += self._fail(self._queue.tickets(), UnavailableError(why), "failed")
            self._wake_an_instance(time.monotonic())
        log.critical("%s; the process is to be ended and started again", why)
        self._observer.failed(reason)
        complete(failed)

    def lose_device(self, error: DeviceLostError) -> None:
        """The device has failed, and with it every run to come: what waits is told so now."""
        with self._lock:
            failed = self._break(str(error))
        complete(failed)

    # All below: the lock is held.

    def _wait_for_work(self, instance: Instance) -> float:
        """Wait until there is a batch for this instance, or it is given up, or the batcher is closed. Returns the time."""
        while True:
            now = time.monotonic()
            if self._closed or instance not in self._instances:
                return now
            wait_s = self._policy.left_s(self._queue, self._working, now)
            if wait_s is not None and wait_s <= 0:
                return now
            if wait_s is not None and self._lingering is None:
                self._lingering = instance
            self._idle.append(instance)
            instance.wake.wait(wait_s if self._lingering is instance else None)
            self._idle.remove(instance)
            if self._lingering is instance:
                self._lingering = None

    def _wake_an_instance(self, now: float) -> None:
        """Wake an instance if there may be something for it to do, or to linger for."""
        if not self._queue.images:
            return
        if self._lingering is None:
            if self._idle:
                self._idle[-1].wake.notify()
        elif self._policy.left_s(self._queue, self._working, now) == 0:
            self._lingering.wake.notify()

    def _hand_out(self, instance: Instance, batch: Batch, now: float) -> None:
        """Give an instance a batch, its first or one ahead."""
        if not instance.batches:
            self._working += 1
            instance.busy_since = now
        instance.batches.append(batch)
        self._running_images += batch.images

    def _take_back(self, instance: Instance, batch: Batch) -> float:
        """Take a batch from an instance. Returns the time."""
        now = time.monotonic()
        instance.batches.remove(batch)
        self._busy_s += now - instance.busy_since
        instance.busy_since, instance.watched_s = now, 0.0
        if not instance.batches:
            self._working -= 1
        self._running_images -= batch.images
        return now

    def _break(self, why: str) -> list[Ticket]:
        """No run to come can be trusted: nothing is accepted any more, and what waits fails. Returns that."""
        log.critical("%s; the process is to be ended and started again", why)
        self.broken = self.broken or why
        return self._fail(self._queue.tickets(), UnavailableError(self.broken), "failed")

    def _fail(self, tickets: Iterable[Ticket], error: Exception, reason: str) -> list[Ticket]:
        """Mark tickets failed and drop their waiting rows; returns those that had not failed already."""
        failed = [ticket for ticket in dict.fromkeys(tickets) if ticket.error is None]
        for ticket in failed:
            ticket.error = error
            if dropped := self._queue.discard(ticket):
                self._observer.dropped(dropped, reason)
        return failed
