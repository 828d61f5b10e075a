"""The slots of one model: started together; slots that hang or die are replaced, with a back-off."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from serve.batching.slot import Slot

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 120.0  # longer than any bound on being without slots: a model that keeps hanging exceeds that bound too


class SlotPool:
    """Keeps ``count`` slots alive. ``live`` is changed under the batcher's lock only."""

    def __init__(self, count: int, start_slot: Callable[[int], Slot], note_stuck: Callable[[], None]) -> None:
        """``note_stuck`` is called when there is no slot and the next is not tried at once."""
        self._count = count
        self._start_slot = start_slot
        self._note_stuck = note_stuck
        self._numbers = 0
        self._losses = 0  # in a row, without a batch that was run between them
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._empty_since: float | None = None
        self.live: list[Slot] = []

    def start(self) -> None:
        """Start every slot and wait until each has its engine. Raises what making an engine raised."""
        starting = [self._start_one() for _ in range(self._count)]
        for slot in starting:
            slot.wait_started()

    @property
    def empty_s(self) -> float:
        """How long there has been no slot; 0 while there is one. In seconds."""
        since = self._empty_since
        return 0.0 if since is None else time.monotonic() - since

    def busy_since_before(self, moment: float) -> list[Slot]:
        """The slots that have run one batch since before ``moment`` (monotonic). The batcher's lock is held."""
        return [slot for slot in self.live if slot.busy_since is not None and slot.busy_since < moment]

    def add(self, slot: Slot) -> None:
        """A slot has its engine. The batcher's lock is held."""
        self.live.append(slot)
        self._empty_since = None

    def remove(self, slot: Slot) -> None:
        """A slot is evicted. The batcher's lock is held."""
        self.live.remove(slot)
        self._losses += 1
        if not self.live:
            self._empty_since = time.monotonic()

    def note_success(self) -> None:
        """A batch has been run: the next replacement need not wait."""
        self._losses = 0

    def replace(self) -> None:
        """Start a new slot in the background: at once after a first loss, then later and later, until it works."""
        if not self._closed.is_set():
            threading.Thread(target=self._replace, name="slot-replacement", daemon=True).start()

    def close(self) -> None:
        """Replace no more slots."""
        self._closed.set()

    def join(self, timeout_s: float) -> int:
        """Wait for the slots' threads to end; returns how many have not.

        A thread that is inside a model's native code when the interpreter ends takes the process down with it.
        """
        deadline = time.monotonic() + timeout_s
        threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return sum(thread.is_alive() for thread in threads)

    def _replace(self) -> None:
        while True:
            backoff_s = self._backoff_s()
            if backoff_s and not self.live:
                self._note_stuck()
            if self._closed.wait(backoff_s):
                return
            slot = self._start_one()
            try:
                slot.wait_started()
            except Exception:
                self._losses += 1
                log.exception("a slot could not be replaced; trying again in %g s", self._backoff_s())
            else:
                log.warning("an evicted slot has been replaced by slot %d", slot.number)
                return

    def _backoff_s(self) -> float:
        losses = self._losses
        return 0.0 if losses <= 1 else float(min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(losses - 2, 20)))

    def _start_one(self) -> Slot:
        slot = self._start_slot(self._numbers)
        self._numbers += 1
        self._threads = [thread for thread in self._threads if thread.is_alive()] + [slot.thread]
        return slot
