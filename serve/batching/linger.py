"""How long a batch that is not full still waits for company, and when there is none to be expected."""

from __future__ import annotations

from serve.batching.queue import FairQueue

CROWD_CALLERS = 5


class Linger:
    """The window: while another slot works, or after a batch that a crowd has shared, until as many callers are back.

    Never longer than ``linger_s``, and never for a lone caller. All times are on ``time.monotonic()``.
    """

    def __init__(self, linger_s: float, max_batch_size: int) -> None:
        self._linger_s = linger_s
        self._max_batch_size = max_batch_size
        self._crowd = 0  # callers of the last batch that a crowd has shared
        self._crowd_until = 0.0

    def note_batch(self, callers: int, now: float) -> None:
        """A batch of so many callers has ended: a crowd's are about to ask again."""
        if callers >= CROWD_CALLERS:
            self._crowd, self._crowd_until = callers, now + self._linger_s

    def left_s(self, queue: FairQueue, working: int, now: float) -> float | None:
        """How long the next batch should still wait: 0 to take it now, None to wait for something to be queued.

        ``working`` is how many slots run a batch.
        """
        if queue.images >= self._max_batch_size:
            return 0.0
        if not queue.images:
            return self._crowd_until - now if self._crowd_until > now else None
        until = queue.waiting_since + self._linger_s
        if not working:
            if queue.callers >= self._crowd:
                return 0.0  # all of the crowd are back
            until = min(until, self._crowd_until)
        return max(0.0, until - now)
