"""Dynamic batching: slots take waiting tickets, run them as a batch, and return the rows. Knows no transport and no ONNX Runtime.

``serve.batching.policy`` decides when a slot takes a batch and how large it is, ``serve.batching.queue`` in which order.

A failure affects only its batch: if a run raises, hangs for longer than ``watchdog_s``, or its thread dies, the callers of that
batch fail and no others. After a hang or a dead thread the slot is replaced.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from serve.batching.limits import Limits
from serve.batching.policy import BatchPolicy
from serve.batching.queue import FairQueue
from serve.batching.slot import Observer, Runner, Slot
from serve.batching.slots import SlotPool
from serve.batching.ticket import Arrays, Chunk, Ticket, scatter
from serve.errors import DeviceLostError, EngineError, ExpiredError, UnavailableError
from serve.latents import LatentReader

log = logging.getLogger(__name__)


class Batcher:
    """Runs tickets through ``limits.slots`` engines made by ``make_runner``. Safe to call from any thread.

    ``deliver`` is called from a slot's thread with tickets that are complete or have failed. Each ticket is delivered
    exactly once, unless it was cancelled.
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
        self._queue = FairQueue(limits.max_queue_images, limits.max_batch_size)
        self._slots = SlotPool(limits.slots, self._start_slot, self._fail_waiting)
        self._idle: list[Slot] = []
        self._lingering: Slot | None = None  # the one idle slot that waits for a batch to fill
        self._working = 0
        self._running_images = 0
        self._busy_s = 0.0
        self._policy = BatchPolicy(limits.linger_s, limits.max_batch_size)
        self._closed = False
        self.device_lost: str | None = None  # why nothing can be run in this process any more

    def start(self) -> None:
        """Start every slot and wait until each has its engine. Raises what making an engine raised."""
        try:
            self._slots.start()
        except BaseException:
            self.close()
            raise

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket, unless it is cancelled. Raises QueueFullError or UnavailableError; then nothing was queued."""
        ticket.queued_at = now = time.monotonic()
        with self._lock:
            if ticket.cancelled:  # by another thread, just now
                return
            if self._closed:
                raise UnavailableError("the model is being released")
            if not self._slots.live or self.device_lost:
                raise UnavailableError("the model has no working slot")
            self._queue.push(ticket, self._policy.seconds_per_image / len(self._slots.live))
            self._wake_a_slot(now)

    def cancel(self, ticket: Ticket) -> bool:
        """The caller left: waiting rows are dropped, running ones are thrown away when they come back.

        False when it was too late: the ticket has been delivered, or is about to be.
        """
        with self._lock:
            if ticket.dead or ticket.done == ticket.span.count:
                return False
            ticket.cancelled = True
            dropped = self._queue.discard(ticket)
            self._wake_a_slot(time.monotonic())  # for what has waited for the room
        if dropped:
            self._observer.dropped(dropped, "cancelled")
        return True

    def cut_off(self) -> int:
        """Fail what waits and what runs; returns how many tickets those were."""
        with self._lock:
            running = [chunk.ticket for slot in self._slots.live for chunk in slot.batch]
            failed = self._fail([*self._queue.tickets(), *running], UnavailableError("the server stopped first"), "drain")
        self._deliver(failed)
        return len(failed)

    def close(self, timeout_s: float = 0.0) -> int:
        """Let the slots end after their running batch; waiting tickets fail. Returns how many did not end in time."""
        self._slots.close()
        with self._lock:
            self._closed = True
            failed = self._fail(self._queue.tickets(), UnavailableError("the model is being released"), "drain")
            for slot in self._slots.live:
                slot.wake.notify()
        self._deliver(failed)
        stuck = self._slots.join(timeout_s)
        # The pool and this object hold each other: without these two lines the engine would live until a garbage collection.
        self._make_runner = _no_runner
        self._slots.live.clear()
        return stuck

    def check_stalled(self) -> None:
        """Evict slots that have run one batch for longer than ``watchdog_s``, and replace them."""
        now = time.monotonic()
        with self._lock:
            stalled = self._slots.busy_since_before(now - self.limits.watchdog_s)
        for slot in stalled:
            log.error("slot %d has run one batch for over %g s: evicted", slot.number, self.limits.watchdog_s)
            self.evict(slot, EngineError("a run of the model hung"), "hung")

    @property
    def quiet(self) -> bool:
        """Whether nothing waits and nothing runs."""
        with self._lock:  # a batch is for a moment neither
            return not self._queue.images and not self._running_images

    @property
    def live_slots(self) -> int:
        return len(self._slots.live)

    @property
    def busy_slots(self) -> int:
        return self._working

    @property
    def busy_s(self) -> float:
        """What ended runs have taken since the start, assembly included, in seconds."""
        return self._busy_s

    @property
    def without_slots_s(self) -> float:
        """How long no slot has been able to run a batch, in seconds; 0 while one is."""
        return self._slots.empty_s

    @property
    def queued_images(self) -> int:
        return self._queue.images

    @property
    def running_images(self) -> int:
        return self._running_images

    # What the slots call.

    def add(self, slot: Slot) -> None:
        """A slot has its engine and can take batches."""
        with self._lock:
            self._slots.add(slot)

    def next_batch(self, slot: Slot) -> list[Chunk] | None:
        """Wait for work. None when the batcher is closed or this slot has been evicted."""
        while True:
            expired: list[Ticket] = []
            with self._lock:
                now = self._wait_for_work(slot)
                if slot.evicted or (self._closed and not self._queue.images):
                    return None
                chunks, late = self._queue.take(self._policy.images(self._queue, len(self._slots.live) - self._working), now)
                if late:
                    error = ExpiredError("the deadline passed while the request waited")
                    expired = self._fail(late, error, "expired")
                if chunks:
                    slot.batch = chunks
                    slot.busy_since = now
                    self._working += 1
                    for ticket, first, count in chunks:
                        self._running_images += count
                        if first == 0:
                            ticket.queue_seconds = now - ticket.queued_at
                self._wake_a_slot(now)
            if expired:
                self._deliver(expired)
            if chunks:
                return chunks

    def end_batch(self, slot: Slot, rows: Arrays | None, compute_s: float) -> None:
        """Scatter a batch's rows to its tickets (None: the run failed) and deliver those that are complete."""
        finished: list[Ticket] = []
        with self._lock:
            if slot.evicted:  # evicted meanwhile: its tickets have been answered
                return
            chunks, now = slot.batch, time.monotonic()
            if slot.busy_since is not None:
                self._busy_s += now - slot.busy_since
            images = self._release(slot)
            self._policy.note_batch(len(chunks), now)
            if rows is None:
                tickets = [chunk.ticket for chunk in chunks]
                finished = self._fail(tickets, EngineError("a run of the model failed"), "failed")
            else:
                finished = scatter(chunks, rows, compute_s)
                self._policy.note_run(images, compute_s)
                self._slots.note_success()
        if finished:
            self._deliver(finished)

    def evict(self, slot: Slot, error: EngineError, reason: str) -> None:
        """Evict a slot: the callers of its batch fail, and another slot takes its place."""
        with self._lock:
            if slot.evicted or slot not in self._slots.live:
                return
            slot.evicted = True
            self._slots.remove(slot)
            failed = self._fail([chunk.ticket for chunk in slot.batch], error, "failed")
            if slot.busy_since is not None:
                self._release(slot)
            self._wake_a_slot(time.monotonic())
        self._observer.failed(reason)
        self._deliver(failed)
        self._slots.replace()

    def lose_device(self, error: DeviceLostError) -> None:
        """The device has failed, and with it every run to come: callers that wait are told so now."""
        with self._lock:
            self.device_lost = str(error)
        self._fail_waiting()

    # What the pool calls.

    def _fail_waiting(self) -> None:
        """There is no slot, and there may be none for a while."""
        with self._lock:
            failed = self._fail(self._queue.tickets(), UnavailableError("the model has no working slot"), "failed")
        self._deliver(failed)

    def _start_slot(self, number: int) -> Slot:
        reader = LatentReader(self.limits.latent_size, self.limits.labels)
        slot = Slot(number, self._lock, reader, self._make_runner, self._observer)
        slot.start(self)
        return slot

    # All below: the lock is held.

    def _wait_for_work(self, slot: Slot) -> float:
        """Wait until there is a batch for this slot, or it is evicted, or the batcher is closed. Returns the time."""
        while True:
            now = time.monotonic()
            if slot.evicted or self._closed:
                return now
            wait_s = self._policy.left_s(self._queue, self._working, now)
            if wait_s is not None and wait_s <= 0:
                return now
            if wait_s is not None and self._lingering is None:
                self._lingering = slot
            self._idle.append(slot)
            slot.wake.wait(wait_s if self._lingering is slot else None)
            self._idle.remove(slot)
            if self._lingering is slot:
                self._lingering = None

    def _wake_a_slot(self, now: float) -> None:
        """Wake a slot if there may be something for it to do, or to linger for."""
        if not self._queue.images:
            return
        if self._lingering is None:
            if self._idle:
                self._idle[-1].wake.notify()
        elif self._policy.left_s(self._queue, self._working, now) == 0:
            self._lingering.wake.notify()

    def _release(self, slot: Slot) -> int:
        """Take a slot's batch from it; returns its images."""
        images = sum(chunk.count for chunk in slot.batch)
        self._running_images -= images
        self._working -= 1
        slot.batch = []
        slot.busy_since = None
        return images

    def _fail(self, tickets: Iterable[Ticket], error: Exception, reason: str) -> list[Ticket]:
        """Mark tickets failed and drop their waiting rows; returns those that were not dead already."""
        failed = [ticket for ticket in dict.fromkeys(tickets) if not ticket.dead]
        for ticket in failed:
            ticket.error = error
            if dropped := self._queue.discard(ticket):
                self._observer.dropped(dropped, reason)
        return failed


def _no_runner() -> Runner:
    raise UnavailableError("the model has been released")
