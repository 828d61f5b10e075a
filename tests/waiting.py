"""Waiting for what happens in another thread or process: polled, under a deadline, never a bare sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WAIT_S = 30


def wait_until(condition: Callable[[], Any], instead: Callable[[], Any] = lambda: "") -> None:
    """Return once the condition holds; fails after ``WAIT_S``, and says what there was ``instead``."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"it does not happen {instead()}"
        time.sleep(0.01)
