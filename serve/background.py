"""Background work: repeated tasks, daemon threads, and waiting for their results with a timeout."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from contextvars import copy_context
from typing import TypeVar

from prometheus_client import Counter

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

LOOK_S = 0.02

DAEMON_THREAD = "daemon"  # how the threads' names begin


def in_daemon_thread(name: str, action: Callable[[], ResultT]) -> Future[ResultT]:
    """Run an action in a thread of its own, which ends with the process if it hangs. It cannot be cancelled."""
    future: Future[ResultT] = Future()
    future.set_running_or_notify_cancel()

    def run(inside: Callable[..., ResultT]) -> None:
        try:
            result = inside(action)
        except BaseException as error:  # whoever waits gets it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, args=(copy_context().run,), name=f"{DAEMON_THREAD}-{name}", daemon=True).start()
    return future


def keep_looking(
    name: str, interval_s: Callable[[], float], look: Callable[[], object], note_failure: Callable[[], object]
) -> None:
    """Look again every so often until the process ends, in a thread that nobody waits for: a disk may hang."""

    def go_on() -> None:
        while True:
            time.sleep(interval_s())
            try:
                look()
            except Exception:  # the next look may go well, and what was revoked must not stay for want of one
                log.exception("looking at the %s has failed", name)
                note_failure()

    threading.Thread(target=go_on, name=name, daemon=True).start()


async def finished(future: Future[ResultT], limit_s: float, what: str) -> ResultT:
    """A thread's result. Raises what it raised, or TimeoutError naming ``what`` when it takes too long; it goes on then."""
    try:
        async with asyncio.timeout(limit_s):
            return await asyncio.wrap_future(future)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"{what} takes longer than {limit_s:g} s and is given up") from None


async def repeat(name: str, interval_s: float, action: Callable[[], Awaitable[None]], failures: Counter) -> None:
    """Run an action every so often, until cancelled; one that raises is logged, counted and run again.

    ``failures`` has the label ``task``.
    """
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
