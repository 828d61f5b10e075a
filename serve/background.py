"""What runs beside requests: background tasks, which are logged, counted and run again when they raise; and waiting for them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from prometheus_client import Counter

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")

LOOK_S = 0.02


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


async def until(holds: Callable[[], bool], deadline: float) -> None:
    """Wait until something holds, or ``deadline`` (monotonic). For stopping: it is found out up to ``LOOK_S`` late."""
    while not holds() and time.monotonic() < deadline:  # noqa: ASYNC110  # what changes it is in threads without an event loop
        await asyncio.sleep(LOOK_S)


def settle(future: asyncio.Future[ItemT], result: ItemT | Exception) -> None:
    """Give a future its result or its error, unless its waiter has been cancelled. On the event loop."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
