"""Background tasks. A task that raises is logged, counted and run again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from prometheus_client import Counter

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")


async def repeat(name: str, interval_s: float, action: Callable[[], Awaitable[None]], failures: Counter) -> None:
    """Run an action every so often, until cancelled. ``failures`` has the label ``task``."""
    failures.labels(name)  # born at 0: what Prometheus first sees at 1 has not increased
    while True:
        await asyncio.sleep(interval_s)
        try:
            await action()
        except Exception:
            log.exception("the background task %r failed; it goes on", name)
            failures.labels(name).inc()


async def for_each(items: Iterable[ItemT], action: Callable[[ItemT], Awaitable[None]]) -> None:
    """Run an action for every item, also after one that raised; then raise what they raised, as an ExceptionGroup."""
    errors: list[Exception] = []
    for item in items:
        try:
            await action(item)
        except Exception as error:
            errors.append(error)
    if errors:
        raise ExceptionGroup(f"{len(errors)} rounds failed", errors)
