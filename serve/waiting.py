"""How handlers wait: on the event loop, or without one, continued by the thread that ends what they wait for (``Steps``).

Handlers are coroutines in both cases. Without an event loop a call changes threads once inside the server instead of three times
(docs/decisions/0013-completion-queue.md).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context, ContextVar, copy_context
from functools import cache
from typing import Any, ParamSpec, Protocol, TypeVar

log = logging.getLogger(__name__)

LOOK_S = 0.02

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")

_stepped = ContextVar("stepped", default=False)  # whether the coroutine is run by ``Steps``


class Work(Protocol):
    """What is begun once its waiter waits for it, and ends in some thread."""

    def begin(self, ended: Callable[[], object]) -> None:
        """Begin; ``ended`` is called once, in any thread, unless it is cancelled before. Raises what refuses it."""
        ...

    def cancel(self) -> bool:
        """Give it up. False when it cannot be any more: then ``ended`` is called all the same."""
        ...


async def done(work: Work) -> None:
    """Begin work and wait until it has ended. It is given up when the waiter is cancelled."""
    if _stepped.get():
        await _Step(work)
        return
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    work.begin(lambda: loop.call_soon_threadsafe(_wake, waiter))
    try:
        await waiter
    except asyncio.CancelledError:
        work.cancel()
        raise


async def until(holds: Callable[[], bool], deadline: float) -> None:
    """Wait until something holds, or ``deadline`` (monotonic). For stopping: it is found out up to ``LOOK_S`` late."""
    while not holds() and time.monotonic() < deadline:  # noqa: ASYNC110  # what changes it is in threads without an event loop
        await asyncio.sleep(LOOK_S)


async def in_thread(function: Callable[ParamsT, ResultT], *arguments: ParamsT.args, **named: ParamsT.kwargs) -> ResultT:
    """Call what takes long, in a thread of its own: it would hold up others on the event loop, or in a slot's thread."""
    call = _ThreadCall(lambda: function(*arguments, **named))
    await done(call)
    result: ResultT = call.future.result()
    return result


class Steps:
    """Runs a coroutine to its end without an event loop: each step in the thread in which what it waited for has ended.

    It may wait for nothing but ``done`` and ``in_thread``.
    """

    __slots__ = ("_context", "_coroutine", "_work")

    def __init__(self, coroutine: Coroutine[Work, None, None]) -> None:
        self._context = _stepping().copy()
        self._coroutine = coroutine
        self._work: Work | None = None

    def begin(self) -> None:
        """Take the first step, in this thread."""
        self._step()

    def cancel(self) -> None:
        """Have CancelledError raised where the coroutine waits, unless what it waits for cannot be given up any more."""
        work = self._work
        if work is not None and work.cancel():
            self._step(asyncio.CancelledError())

    def _step(self, error: BaseException | None = None) -> None:
        while True:
            self._work = None  # it holds this object: the two would live until a garbage collection
            resume: Any = self._coroutine.send if error is None else self._coroutine.throw
            try:
                work: Work = self._context.run(resume, error)
            except StopIteration:
                return
            except Exception:  # the thread is another's
                log.exception("a handler has ended with an error that it should have answered")
                return
            self._work = work
            try:
                work.begin(self._step)
            except Exception as refused:
                error = refused
            else:
                return  # another thread may be taking the next step already


class RefCount:
    """Counts the calls that use something: until the last has left it is not to be released."""

    def __init__(self) -> None:
        self.calls = 0
        self._closed = False
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Count a call. False when it is closed."""
        with self._lock:
            if self._closed:
                return False
            self.calls += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self.calls -= 1

    def close(self) -> None:
        """Let no more calls in."""
        with self._lock:
            self._closed = True


class Deferred(threading.local):
    """What is put off to the end of a ``with`` block, in the block's thread: one step is done for many calls, then the next.

    A batch's answers are all made before the first is sent. By turns they cost half as much again: what is done once in a
    while is not in the processor's caches, and each sending lets another thread have the interpreter.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Callable[..., object], tuple[Any, ...]]] | None = None

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call the function at the end of the block, and of those put off before it; at once outside of a block."""
        if self._calls is None:
            function(*arguments)
        else:
            self._calls.append((function, arguments))

    def __enter__(self) -> None:
        if self._calls is None:
            self._calls = []

    def __exit__(self, *_: object) -> None:
        while self._calls:
            calls, self._calls = self._calls, []
            for function, arguments in calls:
                try:
                    function(*arguments)
                except Exception:  # the others are to be called as well
                    log.exception("what was put off has failed")
        self._calls = None


deferred = Deferred()


class _Step:
    """Hands work out of a coroutine, to ``Steps``."""

    __slots__ = ("_work",)

    def __init__(self, work: Work) -> None:
        self._work = work

    def __await__(self) -> Generator[Work, None, None]:
        yield self._work


class _ThreadCall:
    """A function's call in a thread of its own, in the context that it was made in."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._context = copy_context()
        self.future: Future[Any]

    def begin(self, ended: Callable[[], object]) -> None:
        self.future = _threads().submit(self._context.run, self._function)
        self.future.add_done_callback(lambda _: ended())

    def cancel(self) -> bool:
        return False


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="in-thread")


@cache
def _stepping() -> Context:
    context = Context()
    context.run(_stepped.set, True)
    return context


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():  # the waiter may have been cancelled in the meantime
        waiter.set_result(None)
