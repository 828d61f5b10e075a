"""Waiting for what happens in another thread or process: polled, under a deadline, never a bare sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WAIT_S = 30
POLL_S = 0.01
MOST_A_POLL_S = 0.1  # of a poll's time that counts: a machine that is paused for a minute has not waited for one


def wait_until(condition: Callable[[], Any], instead: Callable[[], Any] = lambda: "") -> None:
    """Return once the condition holds; fails after about ``WAIT_S``, and says what there was ``instead``."""
    waited_s = 0.0
    while not condition():
        assert waited_s < WAIT_S, f"it does not happen {instead()}"
        begun = time.monotonic()
        time.sleep(POLL_S)
        waited_s += min(time.monotonic() - begun, MOST_A_POLL_S)
