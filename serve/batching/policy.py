"""Decides when an instance takes its next batch, and how many images. Not thread-safe; the batcher holds the lock.

Waiting images are taken at once, up to ``max_batch_size``. A batch that is not full lingers for more while another instance
works; after a batch shared by many requests, it lingers until as many are back. It never lingers for longer than ``linger_s``,
and never for a lone request, whose rows are split over the idle instances.
"""

from __future__ import annotations

import math

from serve.batching.queue import FairQueue

CROWD = 5
LEAST_SHARE_S = 0.001  # of computing: a run costs some 0.1 ms beside that, and the waking of its instance as much
WEIGHT_OF_A_RUN = 0.1  # in the running mean of what an image takes


class BatchPolicy:
    """All times are on ``time.monotonic()``, in seconds."""

    def __init__(self, linger_s: float, max_batch_size: int) -> None:
        self.seconds_per_image = 0.0  # of computing, a running mean; 0 before the first run
        self._linger_s = linger_s
        self._max_batch_size = max_batch_size
        self._crowd = 0  # requests in the last batch that many have shared
        self._crowd_until = 0.0

    def note_batch(self, requests: int, now: float) -> None:
        """A batch of so many requests has ended: a crowd's are about to ask again."""
        if requests >= CROWD:
            self._crowd, self._crowd_until = requests, now + self._linger_s

    def note_run(self, images: int, compute_s: float) -> None:
        """A run of so many images has taken so long."""
        weight = WEIGHT_OF_A_RUN if self.seconds_per_image else 1.0
        self.seconds_per_image += weight * (compute_s / images - self.seconds_per_image)

    def left_s(self, queue: FairQueue, working: int, now: float) -> float | None:
        """How long the next batch should still wait: 0 to take it now, None to wait for something to be queued.

        ``working`` is how many instances run a batch.
        """
        if queue.images >= self._max_batch_size:
            return 0.0
        if not queue.images:
            return self._crowd_until - now if self._crowd_until > now else None
        until = queue.waiting_since + self._linger_s
        if not working:
            if queue.waiting >= self._crowd:
                return 0.0  # all of the crowd are back
            until = min(until, self._crowd_until)
        elif (lone := queue.lone) is not None and lone.taken:
            return 0.0  # the rest of what runs already
        return max(0.0, until - now)

    def images(self, queue: FairQueue, idle: int) -> int:
        """The most images of the next batch: of a lone request's what makes the ``idle`` instances' alike, if worth a run."""
        if queue.waiting != 1:
            return self._max_batch_size
        worth_a_run = int(queue.images * self.seconds_per_image / LEAST_SHARE_S)
        return min(self._max_batch_size, math.ceil(queue.images / max(1, min(idle, worth_a_run))))
