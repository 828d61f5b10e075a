"""What handlers wait for, on an event loop and without one."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

import pytest

from serve.waiting import Steps, deferred, done, in_thread

TIMEOUT_S = 20

name = ContextVar("name", default="")


class Manual:
    """Work that ends when the test says so; ``refuses`` it instead of beginning it."""

    def __init__(self, refuses: Exception | None = None) -> None:
        self.begun = threading.Event()
        self.ended: Callable[[], object]
        self.cancelled = False
        self._refuses = refuses

    def begin(self, ended: Callable[[], object]) -> None:
        if self._refuses is not None:
            raise self._refuses
        self.ended = ended
        self.begun.set()

    def cancel(self) -> bool:
        self.cancelled = True
        return True


class TooLate(Manual):
    """Work that cannot be given up any more."""

    def cancel(self) -> bool:
        super().cancel()
        return False


def on_a_loop(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


def stepped(coroutine: Coroutine[Any, Any, None]) -> None:
    ended = threading.Event()

    async def whole() -> None:
        try:
            await coroutine
        finally:
            ended.set()

    Steps(whole()).begin()
    assert ended.wait(TIMEOUT_S), "the coroutine did not end"


@pytest.fixture(params=[on_a_loop, stepped])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    chosen: Callable[[Coroutine[Any, Any, None]], None] = request.param
    return chosen


def end_later(*work: Manual) -> None:
    """End each once it is begun, in a thread of its own."""

    def end() -> None:
        for each in work:
            assert each.begun.wait(TIMEOUT_S)
            each.ended()

    threading.Thread(target=end, daemon=True).start()


def test_a_coroutine_goes_on_when_its_work_has_ended(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    first, second = Manual(), Manual()
    steps: list[str] = []

    async def handler() -> None:
        await done(first)
        steps.append("first")
        await done(second)
        steps.append("second")

    end_later(first, second)
    run(handler())
    assert steps == ["first", "second"]


def test_what_refuses_work_is_raised_where_it_is_waited_for(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    after = Manual()
    seen: list[str] = []

    async def handler() -> None:
        try:
            await done(Manual(refuses=ValueError("full")))
        except ValueError as error:
            seen.append(str(error))
        await done(after)
        seen.append("goes on")

    end_later(after)
    run(handler())
    assert seen == ["full", "goes on"]


def test_a_function_in_a_thread_returns_raises_and_keeps_its_context(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    seen: list[Any] = []

    def look(number: int, *, twice: bool) -> tuple[int, str, bool]:
        return number * (1 + twice), name.get(), threading.current_thread() is threading.main_thread()

    def fail() -> None:
        raise ValueError("no")

    async def handler() -> None:
        name.set("the caller")
        seen.append(await in_thread(look, 3, twice=True))
        try:
            await in_thread(fail)
        except ValueError as error:
            seen.append(str(error))

    run(handler())
    assert seen == [(6, "the caller", False), "no"]


def test_each_coroutine_without_a_loop_has_a_context_of_its_own() -> None:
    first, second = Manual(), Manual()
    seen: dict[str, str] = {}

    def handler(own: str, work: Manual) -> Steps:
        async def named() -> None:
            assert name.get() == ""
            name.set(own)
            await done(work)
            seen[own] = name.get()

        return Steps(named())

    for own, work in (("one", first), ("two", second)):
        handler(own, work).begin()
    first.ended()
    second.ended()
    assert seen == {"one": "one", "two": "two"}
    assert name.get() == ""


def test_nothing_is_left_of_a_coroutine_that_has_ended() -> None:
    """A cycle of references lived until a garbage collection, with the answers that it held: 11 % more memory."""
    work = Manual()

    async def handler() -> None:
        await done(work)
        await in_thread(list)
        ended.set()

    gc.disable()
    try:
        ended = threading.Event()
        steps = Steps(handler())
        steps.begin()
        seen = weakref.ref(steps._coroutine)
        del steps
        work.ended()
        assert ended.wait(TIMEOUT_S)
        del work.ended
        for _ in range(100):  # the other thread may be on its way out of it
            if seen() is None:
                break
            time.sleep(0.01)
        assert seen() is None
    finally:
        gc.enable()


def test_giving_up_raises_in_the_coroutine_unless_it_is_too_late() -> None:
    for work, expected in ((Manual(), "given up"), (TooLate(), "came")):
        seen: list[str] = []

        async def handler(work: Manual = work, seen: list[str] = seen) -> None:
            try:
                await done(work)
            except asyncio.CancelledError:
                seen.append("given up")
            else:
                seen.append("came")

        steps = Steps(handler())
        steps.begin()
        steps.cancel()
        assert work.cancelled
        if expected == "came":
            assert not seen
            work.ended()
        assert seen == [expected]


def test_a_waiter_that_is_cancelled_on_a_loop_gives_its_work_up_and_what_ends_later_harms_nobody() -> None:
    work = Manual()
    errors: list[Any] = []

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, error: errors.append(error))
        waiter = asyncio.ensure_future(done(work))
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert work.cancelled
        work.ended()
        await asyncio.sleep(0.01)

    on_a_loop(scenario())
    assert not errors


def test_an_error_that_no_handler_answers_stays_out_of_the_thread_it_is_in(caplog: pytest.LogCaptureFixture) -> None:
    work = Manual()

    async def handler() -> None:
        await done(work)
        raise RuntimeError("nobody's")

    Steps(handler()).begin()
    work.ended()  # a slot's thread, in the server
    assert "an error that it should have answered" in caplog.text


def test_what_is_put_off_is_called_step_by_step_in_its_own_thread_and_at_once_outside_of_a_block(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[str] = []

    def begin(who: str) -> None:
        seen.append(f"begin {who}")
        deferred.call(seen.append, f"end {who}")

    def fail() -> None:
        raise RuntimeError("broken")

    deferred.call(begin, "first")
    assert seen == ["begin first", "end first"]
    seen.clear()
    with deferred:
        for who in ("one", "two"):
            deferred.call(begin, who)
            deferred.call(fail)
        other = threading.Thread(target=deferred.call, args=(seen.append, "another thread"))
        other.start()
        other.join(TIMEOUT_S)
        assert seen == ["another thread"]
    assert seen == ["another thread", "begin one", "begin two", "end one", "end two"]
    assert "what was put off has failed" in caplog.text
