"""A budget in bytes for what calls hold in memory: their requests, queued latents and labels, rows, and answers not yet sent.

Safe to call from any thread.
"""

from __future__ import annotations

import threading

from serve.access.identity import Account, Caller
from serve.errors import BusyError, CallerLimitError, OverloadedError

LARGE_BYTES = 64 << 10  # what holds more is counted for its caller too; asking for a caller's address takes a while
RETRY_S = 0.1


class Budget:
    """Bytes that all calls may hold together, half of them for any one caller."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._held_by: dict[str, int] = {}  # callers whose large calls are open
        self._lock = threading.Lock()

    def take(self, size: int, caller: str) -> None:
        """Count ``size`` bytes, for ``caller`` if it is not empty. Raises OverloadedError or CallerLimitError."""
        with self._lock:
            if self.held_bytes + size > self.limit_bytes:
                text = f"the server's calls hold {self.held_bytes >> 20} MiB of --max-inflight-mib {self.limit_bytes >> 20}"
                raise OverloadedError(f"{text}, this one needs {size / 1048576:.1f} more", RETRY_S, self.limit_bytes)
            if caller:
                own = self._held_by.get(caller, 0) + size
                if own > self.limit_bytes // 2:
                    text = f"{caller} would hold {own / 1048576:.1f} MiB: more than half of --max-inflight-mib"
                    raise CallerLimitError(f"{text} {self.limit_bytes >> 20}", RETRY_S, "memory", self.limit_bytes // 2)
                self._held_by[caller] = own
            self.held_bytes += size

    def give_back(self, size: int, caller: str) -> None:
        """The bytes of ``take`` are held no longer."""
        with self._lock:
            self.held_bytes -= size
            if caller:
                left = self._held_by.pop(caller) - size
                if left:
                    self._held_by[caller] = left


class Hold:
    """What one call holds, of its caller's limits and of the budget, until its answer has been sent."""

    __slots__ = ("_budget", "_taken", "account", "caller")

    def __init__(self, account: Account, caller: Caller, budget: Budget) -> None:
        self.account = account
        self.caller = caller
        self._budget = budget
        self._taken: list[tuple[int, int, str]] = []  # images, bytes, whom the bytes are counted for

    @property
    def images_limit(self) -> int:
        """Of the caller, in flight; 0: none."""
        return self.account.images_limit

    def take(self, images: int, size: int) -> None:
        """Hold so many images in flight and bytes more. Raises CallerLimitError or OverloadedError, and then nothing is added."""
        caller = ""
        if size > LARGE_BYTES:
            caller = self.caller.address if self.account.everyone else self.account.name
        images = self.account.take(images)
        try:
            self._budget.take(size, caller)
        except BusyError:
            self.account.give_back(images)
            raise
        self._taken.append((images, size, caller))

    def give_back(self) -> None:
        """Hold nothing any more; may be called again."""
        while self._taken:
            images, size, caller = self._taken.pop()
            if images:
                self.account.give_back(images)
            self._budget.give_back(size, caller)
