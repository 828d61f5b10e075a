"""The core over a stand-in engine: what is refused before anything is held or run, and what is given back."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from serve.core.generate import MOST_STREAM_LABELS, Completed
from serve.core.request import IMAGES, PIXELS, Addresses, Digits, DigitsRequest, Interpolation, Latents
from serve.errors import CallerLeftError, EngineError, OverloadedError, RequestError
from serve.latents import INDEX_LIMIT, Span, draw_span
from tests.fake_engine import LATENT_SIZE, TIMEOUT_S, Gate
from tests.fake_service import MAX_COUNT, MAX_COUNT_FLOAT32, FakeService, Holder, Untouchable
from tests.waiting import wait_until

ROW_BYTES = 7


def request(rows: Any, **more: Any) -> DigitsRequest:
    return DigitsRequest(rows=rows, row_bytes=ROW_BYTES, **more)


def answer(service: FakeService, asked: DigitsRequest, holder: Holder | None = None) -> Digits:
    """Begin a request and wait for it. Raises what it failed with."""
    results: list[Digits | Exception] = []
    ended = threading.Event()

    def completed(result: Digits | Exception) -> None:
        results.append(result)
        ended.set()

    service.core.begin(asked, holder or Holder(), completed)
    assert ended.wait(TIMEOUT_S), "a request hangs"
    [result] = results
    if isinstance(result, Exception):
        raise result
    return result


def never(result: Digits | Exception) -> None:
    raise AssertionError("what was refused is not completed")


def latents(*values: float) -> Latents:
    return Latents(np.array(values, np.float32))


ROW = (0.5,) * LATENT_SIZE


@pytest.mark.parametrize(
    ("rows", "outputs", "count"),
    [
        (Addresses(7, 0, MAX_COUNT), PIXELS, MAX_COUNT),
        (Addresses(7, 0, MAX_COUNT_FLOAT32), IMAGES, MAX_COUNT_FLOAT32),
        (Addresses(7, INDEX_LIMIT - 2, 2), PIXELS, 2),
        (Interpolation((7, 0), (8, 0), MAX_COUNT), PIXELS, MAX_COUNT),
        (latents(*ROW, *ROW), PIXELS, 2),
    ],
)
def test_as_many_digits_as_are_allowed_come_and_are_held(rows: Any, outputs: Any, count: int) -> None:
    with FakeService() as service:
        digits = answer(service, request(rows, outputs=outputs), holder := Holder())
        assert (digits.count, sum(len(piece) for piece in digits.pixels or digits.images)) == (count, count)
        assert holder.taken == [(count, count * ROW_BYTES)]
        assert service.model.in_use.calls == 0


@pytest.mark.parametrize(
    ("rows", "outputs", "named"),
    [
        (Addresses(7, 0, 0), PIXELS, "count"),
        (Addresses(7, 0, MAX_COUNT + 1), PIXELS, "count"),
        (Addresses(7, 0, MAX_COUNT_FLOAT32 + 1), IMAGES, "count"),
        (Addresses(7, INDEX_LIMIT - 2, 3), PIXELS, "start"),
        (Addresses(7, INDEX_LIMIT, 0), PIXELS, "start"),
        (Addresses(7, 0, 1, 1e-9), PIXELS, "truncation"),
        (Interpolation((7, 0), (8, 0), MAX_COUNT + 1), PIXELS, "steps"),
        (Interpolation((7, 0), (8, INDEX_LIMIT), 2), PIXELS, "start"),
        (latents(*ROW[1:]), PIXELS, "latents"),
        (latents(*ROW[1:], float("nan")), PIXELS, "latents"),
        (Latents(np.zeros((1, LATENT_SIZE + 1), np.float32)), PIXELS, "latents"),
    ],
)
def test_what_is_refused_leaves_the_model_alone(rows: Any, outputs: Any, named: str) -> None:
    with FakeService() as service:
        with pytest.raises(RequestError, match=named):
            service.core.begin(request(rows, outputs=outputs), Holder(), never)
        assert service.model.in_use.calls == 0
        assert service.batcher.queued_images == 0


def test_what_may_not_be_held_is_not_run() -> None:
    class Full(Holder):
        def take(self, images: int, size: int) -> None:
            raise OverloadedError("full", 0.1)

    with FakeService() as service:
        with pytest.raises(OverloadedError):
            service.core.begin(request(Addresses(7, 0, 1)), Full(), never)
        assert service.model.in_use.calls == 0


def test_truncation_reaches_the_latents() -> None:
    with FakeService() as service:
        digits = answer(service, request(Addresses(7, 3, 2, 0.5)))
        rows, _ = draw_span(Span(7, 3, 2, truncation=0.5), LATENT_SIZE, 0)
        assert np.concatenate(digits.pixels).tobytes() == rows.tobytes()


@pytest.mark.parametrize("number", [2, 4_000_000])
def test_labels_are_not_looked_at_before_their_number_is_right(number: int) -> None:
    """Issue: millions of labels for one digit were copied in the thread that receives."""
    with FakeService(labels=10) as service, pytest.raises(RequestError, match=f"labels.*{number}"):
        service.core.begin(request(Addresses(7, 0, 3), labels=Untouchable(number)), Holder(), never)


def test_a_streams_labels_are_bounded_before_they_are_looked_at() -> None:
    async def ask(service: FakeService, labels: Any) -> int:
        stream = service.core.stream(request(Addresses(7, 0, 3), labels=labels), 3, Holder())
        return sum([digits.count async for digits in stream])

    with FakeService(labels=10) as service:
        with pytest.raises(RequestError, match=f"labels.*{MOST_STREAM_LABELS}"):
            asyncio.run(ask(service, Untouchable(MOST_STREAM_LABELS + 1)))
        assert asyncio.run(ask(service, [1] * MOST_STREAM_LABELS)) == 3
        assert service.model.in_use.calls == 0


def test_a_run_that_raises_is_no_answer() -> None:
    def broken(latents: Any) -> None:
        raise RuntimeError("planted")

    with FakeService(broken) as service:
        with pytest.raises(EngineError):
            answer(service, request(Addresses(7, 0, 1)))
        with pytest.raises(EngineError):
            asyncio.run(service.core.generate(request(Addresses(7, 0, 1)), Holder()))
        assert service.model.in_use.calls == 0


def test_what_is_given_up_is_completed_as_left_and_its_rows_do_not_run() -> None:
    gate = Gate()
    with FakeService(gate) as service:
        results: list[Digits | Exception] = []
        keep: Completed = results.append  # type: ignore[assignment]
        service.core.begin(request(Addresses(7, 0, 1)), Holder(), keep)
        assert gate.reached.wait(TIMEOUT_S)
        give_up = service.core.begin(request(Addresses(7, 0, 5)), Holder(), keep)
        assert (service.batcher.queued_images, service.model.in_use.calls) == (5, 2)
        give_up()
        assert [type(result) for result in results] == [CallerLeftError]
        assert (service.batcher.queued_images, service.model.in_use.calls) == (0, 1)
        gate.open()
        wait_until(lambda: len(results) == 2)


async def _until(holds: Any) -> None:
    await asyncio.to_thread(wait_until, holds)


def test_a_waiter_who_is_cancelled_takes_the_rows_along() -> None:
    gate = Gate()
    with FakeService(gate) as service:

        async def scenario() -> None:
            first = asyncio.ensure_future(service.core.generate(request(Addresses(7, 0, 1)), Holder()))
            await _until(gate.reached.is_set)
            second = asyncio.ensure_future(service.core.generate(request(Addresses(7, 0, 5)), Holder()))
            await _until(lambda: service.batcher.queued_images == 5)
            second.cancel()
            await _until(lambda: service.batcher.queued_images == 0)
            gate.open()
            assert (await first).count == 1

        asyncio.run(scenario())
        assert service.model.in_use.calls == 0


@pytest.mark.parametrize(("images_limit", "ahead"), [(0, 3), (100, 3), (25, 2), (5, 1)])
def test_a_stream_holds_the_chunks_that_are_under_way_and_gives_them_up_when_it_ends(images_limit: int, ahead: int) -> None:
    first_run, others = Gate(), Gate()

    def before(latents: Any) -> None:
        (others if first_run.passed else first_run)(latents)

    with FakeService(before, max_batch_size=10) as service:
        holder = Holder(images_limit)

        def under_way() -> int:
            return service.batcher.queued_images + service.batcher.running_images

        async def scenario() -> None:
            stream = service.core.stream(request(Addresses(7, 0, 1000)), 10, holder)
            first = asyncio.ensure_future(anext(stream))
            await _until(lambda: under_way() == 10 * ahead)
            first_run.open()
            assert (await first).count == 10
            assert service.model.in_use.calls == 1
            second = asyncio.ensure_future(anext(stream))
            await _until(lambda: under_way() == 10 * ahead)
            await _until(others.reached.is_set)
            second.cancel()
            await asyncio.wait([second])
            await _until(lambda: service.batcher.queued_images == 0)

        asyncio.run(scenario())
        others.open()
        assert holder.taken == [(10 * ahead, 10 * ahead * ROW_BYTES)]
        assert service.model.in_use.calls == 0
