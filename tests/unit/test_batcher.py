"""What the batcher promises: whose rows come back, who is not disturbed, what a failure costs whom."""

from __future__ import annotations

import gc
import random
import re
import threading
import time
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.batching.batcher import MOST_FAILED_RUNS, Batcher
from serve.batching.policy import CROWD, LEAST_SHARE_S
from serve.batching.ticket import Priority, Ticket
from serve.errors import CallerLeftError, DeviceLostError, EngineError, ExpiredError, QueueFullError, UnavailableError
from serve.latents import LatentReader, Span, draw, draw_span
from tests.fake_engine import (
    LATENT_SIZE,
    TIMEOUT_S,
    FakeEngine,
    FakeTicket,
    Gate,
    drain,
    make_ticket,
    start_batcher,
    wait_for,
)
from tests.waiting import wait_until

HUNG = 123.0  # latents of this value hang in the runner that looks for it


def rows_of(ticket: Ticket) -> bytes:
    return b"".join(part.rows["pixels"].tobytes() for part in sorted(ticket.parts, key=lambda part: part.first))


def expected_rows(ticket: Ticket) -> bytes:
    return draw(ticket.span.seed, ticket.span.start, ticket.span.count, LATENT_SIZE).tobytes()


def occupy(batcher: Batcher, gate: Gate) -> Ticket:
    """Keep the only instance busy until the gate is opened."""
    ticket = make_ticket()
    batcher.submit(ticket)
    assert gate.reached.wait(TIMEOUT_S)
    return ticket


def test_an_idle_slot_takes_a_single_digit_at_once() -> None:
    batcher, observer = start_batcher()
    batcher.submit(ticket := make_ticket())
    wait_for(ticket)
    assert rows_of(ticket) == expected_rows(ticket)
    batcher.close()
    assert observer.batches == [1]


def test_labels_outlive_the_memory_that_the_next_batch_is_assembled_in() -> None:
    class OneMemory(FakeEngine):
        """As the CUDA engine: every batch is assembled in the same arrays."""

        def __init__(self) -> None:
            super().__init__(labelled=True)
            self._feeds = super().allocate(16)

        def allocate(self, count: int) -> dict[str, NDArray[Any]]:
            return {name: array[:count] for name, array in self._feeds.items()}

    batcher, _ = start_batcher(OneMemory, labels=10)
    first, second = make_ticket(8, seed=1), make_ticket(8, seed=2)
    for ticket in (first, second):
        batcher.submit(ticket)
        wait_for(ticket)
    batcher.close()
    for ticket in (first, second):
        [part] = ticket.parts
        assert part.rows["labels"].tolist() == draw_span(ticket.span, LATENT_SIZE, 10)[1].tolist()  # type: ignore[union-attr]


def test_waiting_requests_share_the_next_batch() -> None:
    gate = Gate()
    batcher, observer = start_batcher(lambda: FakeEngine(gate))
    tickets = [occupy(batcher, gate)]
    for seed in range(10):
        tickets.append(make_ticket(1, seed))
        batcher.submit(tickets[-1])
    gate.open()
    for ticket in tickets:
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    assert drain(batcher) == 0
    assert observer.batches == [1, 10]


@pytest.mark.parametrize("instances", [1, 3])
def test_a_large_request_is_split_and_rejoined_in_order(instances: int) -> None:
    batcher, observer = start_batcher(instances=instances)
    batcher.submit(ticket := make_ticket(1000, seed=3, start=77))
    wait_for(ticket)
    assert rows_of(ticket) == expected_rows(ticket)
    assert drain(batcher) == 0
    assert observer.splits == 1
    assert max(observer.batches) <= 16


def test_a_lone_caller_never_lingers() -> None:
    batcher, observer = start_batcher(instances=2, linger_s=TIMEOUT_S)
    for seed in range(3):
        batcher.submit(ticket := make_ticket(1, seed))
        assert wait_for(ticket).queue_seconds < TIMEOUT_S / 2
    batcher.close()
    assert observer.batches == [1, 1, 1]


def test_while_a_slot_works_a_batch_waits_for_company_but_at_most_the_linger() -> None:
    gate = Gate()
    batcher, observer = start_batcher(
        lambda: FakeEngine(lambda latents: gate(latents) if len(latents) == 1 else None), instances=2, linger_s=2.0
    )
    first = occupy(batcher, gate)
    batcher.submit(lone := make_ticket(2, 1))
    batcher.submit(mate := make_ticket(3, 2))
    wait_for(lone)
    assert lone.queue_seconds >= 1.99
    wait_for(mate)
    gate.open()
    wait_for(first)
    assert drain(batcher) == 0
    assert sorted(observer.batches) == [1, 5]


def test_a_request_waits_until_its_last_row_is_in_a_batch_and_is_queued_until_its_first_is() -> None:
    batcher, observer = start_batcher(lambda: FakeEngine(lambda latents: time.sleep(0.05)), max_batch_size=4)
    batcher.submit(ticket := make_ticket(12))
    wait_for(ticket)
    assert ticket.wait_seconds >= ticket.queue_seconds + 2 * 0.05
    assert drain(batcher) == 0
    assert observer.batches == [4, 4, 4]


def test_a_full_batch_does_not_linger() -> None:
    gate = Gate()
    runner = lambda: FakeEngine(lambda latents: gate(latents) if len(latents) == 1 else None)  # noqa: E731
    batcher, observer = start_batcher(runner, instances=2, linger_s=TIMEOUT_S, max_batch_size=4)
    first = occupy(batcher, gate)
    batcher.submit(half := make_ticket(2, 1))
    batcher.submit(rest := make_ticket(2, 2))
    wait_for(half)
    wait_for(rest)
    assert rest.queue_seconds < TIMEOUT_S / 2
    gate.open()
    wait_for(first)
    assert drain(batcher) == 0
    assert sorted(observer.batches) == [1, 4]


def test_a_hung_slot_holds_nobody_up_while_others_are_idle() -> None:
    """Issue: a single digit waited behind one hung slot of four until the watchdog's 30 s were over."""
    gate = Gate()
    made: list[int] = []

    def make_engine() -> FakeEngine:
        made.append(1)
        return FakeEngine(lambda latents: gate(latents) if latents[0, 0] == HUNG else None)

    batcher, _ = start_batcher(make_engine, instances=4, linger_s=0.001)
    hung = make_ticket(1)
    hung.span = Span(0, 0, 1, np.full((1, LATENT_SIZE), HUNG, np.float32))
    batcher.submit(hung)
    assert gate.reached.wait(TIMEOUT_S)
    singles = [make_ticket(1, seed) for seed in range(49)]
    for ticket in singles:
        batcher.submit(ticket)
    for ticket in singles:
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    assert not hung.ended.is_set()
    assert batcher.busy_instances == 1
    gate.open()
    wait_for(hung)
    batcher.close()


def test_a_lone_callers_rows_are_shared_out_to_the_idle_slots_where_that_is_worth_a_run() -> None:
    together = threading.Barrier(1)

    def before(latents: NDArray[np.float32]) -> None:
        time.sleep(2 * len(latents) * LEAST_SHARE_S)
        together.wait(TIMEOUT_S)

    batcher, observer = start_batcher(lambda: FakeEngine(before), instances=3, linger_s=TIMEOUT_S)
    batcher.submit(first := make_ticket(16))
    wait_for(first)
    assert observer.batches == [16], "nothing is known of the model yet"
    for count, shares in ((2, [1, 1]), (9, [3, 3, 3]), (16, [5, 5, 6])):
        observer.batches.clear()
        together = threading.Barrier(len(shares))
        batcher.submit(ticket := make_ticket(count, seed=count))
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
        assert drain(batcher) == 0
        assert sorted(observer.batches) == shares
    batcher.close()


def test_a_quick_models_rows_are_not_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.batching.policy.LEAST_SHARE_S", TIMEOUT_S)  # what is quick, on a busy machine too
    batcher, observer = start_batcher(instances=3)
    for _ in range(2):
        batcher.submit(ticket := make_ticket(16))
        wait_for(ticket)
    batcher.close()
    assert observer.batches == [16, 16]


def test_what_several_wait_for_is_not_shared_out() -> None:
    gate = Gate()
    batcher, observer = start_batcher(lambda: FakeEngine(gate), instances=2, linger_s=TIMEOUT_S)
    held = [make_ticket(16, seed) for seed in range(2)]
    for ticket in held:
        batcher.submit(ticket)
    wait_until(lambda: batcher.busy_instances == 2)
    time.sleep(0.05)  # so that a row is worth a run
    tickets = [make_ticket(4, seed) for seed in range(3)]
    for ticket in tickets:
        batcher.submit(ticket)
    gate.open()
    for ticket in (*held, *tickets):
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    assert drain(batcher) == 0
    batcher.close()
    assert sorted(observer.batches) == [12, 16, 16]


def test_a_lone_callers_rest_does_not_wait_for_company() -> None:
    gate = Gate()
    batcher, _ = start_batcher(lambda: FakeEngine(gate), instances=2, linger_s=TIMEOUT_S)
    batcher.submit(ticket := make_ticket(20))
    wait_until(lambda: batcher.busy_instances == 2)
    assert batcher.running_images == 20
    gate.open()
    assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    batcher.close()


def test_bulk_work_that_may_wait_for_room_is_queued_when_there_is_some() -> None:
    """Issue: a lone stream on an idle server was refused when its chunks were as large as the queue."""
    gate = Gate()
    batcher, _ = start_batcher(lambda: FakeEngine(gate), max_queue_images=10, max_batch_size=4)
    first = occupy(batcher, gate)
    chunks = [make_ticket(10, seed, priority=Priority.BULK, waits_for_room=True) for seed in range(3)]
    for ticket in chunks:
        batcher.submit(ticket)
    assert batcher.queued_images == 10, "only one has room"
    interactive = make_ticket(10, 9)
    batcher.submit(interactive)  # its priority has the whole bound for itself
    gone = make_ticket(5, 5, priority=Priority.BULK, waits_for_room=True)
    batcher.submit(gone)
    batcher.cancel(gone)
    gate.open()
    for ticket in (first, *chunks, interactive):
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    assert drain(batcher) == 0
    assert not gone.parts


def test_draining_fails_the_bulk_work_that_still_waits_for_room() -> None:
    gate = Gate()
    batcher, _ = start_batcher(lambda: FakeEngine(gate), max_queue_images=10)
    first = occupy(batcher, gate)
    chunks = [make_ticket(10, seed, priority=Priority.BULK, waits_for_room=True) for seed in range(2)]
    for ticket in chunks:
        batcher.submit(ticket)
    assert drain(batcher, 0.05) == 3
    for ticket in (first, *chunks):
        with pytest.raises(UnavailableError):
            wait_for(ticket)
    gate.open()
    batcher.close()


def test_a_full_queue_refuses_at_once_and_says_when_to_return() -> None:
    gate = Gate()
    batcher, _ = start_batcher(lambda: FakeEngine(gate), max_queue_images=10)
    first = occupy(batcher, gate)
    batcher.submit(waiting := make_ticket(10))
    with pytest.raises(QueueFullError) as caught:
        batcher.submit(make_ticket())
    assert caught.value.retry_after_s > 0
    gate.open()
    wait_for(first)
    wait_for(waiting)


def test_an_expired_row_never_reaches_the_model() -> None:
    gate, seen = Gate(), []

    def before(latents: NDArray[np.float32]) -> None:
        seen.append(len(latents))
        gate(latents)

    batcher, observer = start_batcher(lambda: FakeEngine(before))
    first = occupy(batcher, gate)
    late = make_ticket(5, deadline=time.monotonic())
    fresh = make_ticket(2, deadline=time.monotonic() + TIMEOUT_S)
    batcher.submit(late)
    batcher.submit(fresh)
    gate.open()
    wait_for(first)
    wait_for(fresh)
    with pytest.raises(ExpiredError):
        wait_for(late)
    assert seen == [1, 2]
    assert observer.drops == {"expired": 5}


def test_a_cancelled_row_never_reaches_the_model_and_its_neighbours_do() -> None:
    gate, seen = Gate(), []

    def before(latents: NDArray[np.float32]) -> None:
        seen.append(len(latents))
        gate(latents)

    batcher, observer = start_batcher(lambda: FakeEngine(before))
    first = occupy(batcher, gate)
    gone, neighbour = make_ticket(5), make_ticket(3, seed=8)
    batcher.submit(gone)
    batcher.submit(neighbour)
    batcher.cancel(gone)
    assert batcher.queued_images == 3
    gate.open()
    wait_for(first)
    assert rows_of(wait_for(neighbour)) == expected_rows(neighbour)
    assert seen == [1, 3]
    assert observer.drops == {"cancelled": 5}
    assert isinstance(gone.error, CallerLeftError)
    assert gone.ended.is_set(), "what it holds is given back by its completion"
    batcher.cancel(neighbour)
    assert neighbour.error is None, "it has been completed"


def test_what_is_cancelled_before_it_is_submitted_is_never_queued() -> None:
    """Another thread may cancel a call that this one is about to submit."""
    batcher, observer = start_batcher()
    ticket = make_ticket(3)
    batcher.cancel(ticket)
    assert isinstance(ticket.error, CallerLeftError)
    batcher.submit(ticket)
    assert drain(batcher) == 0
    assert batcher.queued_images == 0
    batcher.submit(other := make_ticket())
    wait_for(other)
    batcher.close()
    assert observer.batches == [1]


def test_cancelling_a_running_request_leaves_its_batch_mates_untouched() -> None:
    gate = Gate()
    batcher, _ = start_batcher(lambda: FakeEngine(gate))
    running = occupy(batcher, gate)
    batcher.submit(other := make_ticket(2, seed=1))
    batcher.cancel(running)
    gate.open()
    assert rows_of(wait_for(other)) == expected_rows(other)
    assert isinstance(running.error, CallerLeftError)


def test_a_run_that_raises_fails_its_own_batch_and_no_other() -> None:
    gate = Gate()
    runs: list[int] = []

    def before(latents: NDArray[np.float32]) -> None:
        gate(latents)
        runs.append(len(latents))
        if len(runs) == 2:
            raise RuntimeError("no memory")

    batcher, observer = start_batcher(lambda: FakeEngine(before))
    first = occupy(batcher, gate)
    hit = [make_ticket(8, 1), make_ticket(8, 2)]
    spared = make_ticket(9, 3)  # the longest, so that it comes after the two
    for ticket in (*hit, spared):
        batcher.submit(ticket)
    gate.open()
    wait_for(first)
    for ticket in hit:
        with pytest.raises(EngineError):
            wait_for(ticket)
    assert rows_of(wait_for(spared)) == expected_rows(spared)
    assert observer.failures == ["raised"]
    assert batcher.live_instances == 1


def test_an_instance_whose_every_run_raises_breaks_the_process_though_the_others_succeed() -> None:
    both = threading.Barrier(2)  # each instance runs one of two batches
    made: list[FakeEngine] = []

    def succeed(latents: NDArray[np.float32]) -> None:
        both.wait(TIMEOUT_S)

    def fail(latents: NDArray[np.float32]) -> None:
        both.wait(TIMEOUT_S)
        raise RuntimeError("broken")

    def make_engine() -> FakeEngine:
        made.append(FakeEngine(succeed if made else fail))
        return made[-1]

    batcher, observer = start_batcher(make_engine, instances=2)
    for seed in range(MOST_FAILED_RUNS):
        assert batcher.broken is None
        together = [make_ticket(16, seed), make_ticket(16, seed)]
        for ticket in together:
            batcher.submit(ticket)
        assert all(ticket.ended.wait(TIMEOUT_S) for ticket in together)
        assert sorted(ticket.error is None for ticket in together) == [False, True]
    assert re.fullmatch(rf"{MOST_FAILED_RUNS} runs in a row have failed on instance \d", batcher.broken or "")
    assert observer.failures == ["raised"] * MOST_FAILED_RUNS + ["repeated"]


def test_a_failed_part_fails_its_request_once_and_drops_the_rest() -> None:
    def before(latents: NDArray[np.float32]) -> None:
        raise RuntimeError("broken")

    batcher, observer = start_batcher(lambda: FakeEngine(before))
    batcher.submit(ticket := make_ticket(100))
    with pytest.raises(EngineError):
        wait_for(ticket)
    assert drain(batcher) == 0
    assert observer.drops == {"failed": 84}


def test_a_run_that_hangs_fails_its_batch_alone_and_breaks_the_process() -> None:
    gate = Gate()
    batcher, observer = start_batcher(
        lambda: FakeEngine(lambda latents: gate(latents) if latents[0, 0] == HUNG else None), instances=2
    )
    hung = make_ticket(1)
    hung.span = Span(0, 0, 1, np.full((1, LATENT_SIZE), HUNG, np.float32))
    batcher.submit(hung)
    assert gate.reached.wait(TIMEOUT_S)
    batcher.watch(29.0)
    batcher.submit(before := make_ticket(3, seed=5))
    assert rows_of(wait_for(before)) == expected_rows(before)
    assert batcher.broken is None
    assert not hung.ended.is_set()
    batcher.watch(2.0)
    with pytest.raises(EngineError, match="30 s"):
        wait_for(hung)
    assert batcher.broken is not None
    assert observer.failures == ["hung"]
    with pytest.raises(UnavailableError, match="30 s"):
        batcher.submit(make_ticket())
    gate.open()  # the run comes back: nobody may be answered twice
    assert batcher.close(TIMEOUT_S) == 0


def test_what_waits_when_the_last_instance_hangs_is_failed() -> None:
    gate = Gate()
    batcher, observer = start_batcher(lambda: FakeEngine(gate))
    running = occupy(batcher, gate)
    batcher.submit(waiting := make_ticket(3))
    batcher.watch(31.0)
    assert waiting.ended.is_set(), "nobody is left to run it"
    with pytest.raises(EngineError):
        wait_for(running)
    with pytest.raises(UnavailableError):
        wait_for(waiting)
    assert observer.drops == {"failed": 3}
    gate.open()
    batcher.close()


def test_time_in_which_the_process_was_stopped_and_runs_that_end_do_not_count() -> None:
    """Issue: after SIGSTOP for longer than the watchdog's time healthy instances were evicted."""
    gate = Gate()
    batcher, _ = start_batcher(lambda: FakeEngine(gate), watchdog_s=0.05)
    batcher.watch(60.0)
    assert batcher.broken is None, "nothing runs"
    first = occupy(batcher, gate)
    time.sleep(0.1)
    batcher.watch(0.02)  # what the watchdog has seen of it
    gate.open()
    wait_for(first)
    gate.__init__()  # type: ignore[misc]  # closed again
    second = occupy(batcher, gate)
    batcher.watch(0.04)
    assert batcher.broken is None
    gate.open()
    wait_for(second)
    batcher.close()


def test_a_thread_that_ends_fails_its_batch_and_breaks_the_process() -> None:
    def before(latents: NDArray[np.float32]) -> None:
        raise SystemExit  # not an Exception: it ends the thread

    batcher, observer = start_batcher(lambda: FakeEngine(before))
    batcher.submit(hit := make_ticket())
    with pytest.raises(EngineError):
        wait_for(hit)
    assert observer.failures == ["died"]
    with pytest.raises(UnavailableError):
        batcher.submit(make_ticket())


def test_a_completion_that_raises_disturbs_no_other_and_answers_are_sent_after_all_are_made() -> None:
    gate = Gate()
    batcher, _ = start_batcher(lambda: FakeEngine(gate))
    first = occupy(batcher, gate)
    done: list[str] = []

    def completion(name: str) -> Any:
        def complete(ticket: Ticket) -> Any:
            done.append(f"{name} made")
            if name == "a":
                raise RuntimeError("planted")
            return lambda: done.append(f"{name} sent")

        return complete

    tickets = [make_ticket(1, seed) for seed in range(3)]
    for name, ticket in zip("abc", tickets, strict=True):
        ticket.completion = completion(name)
        batcher.submit(ticket)
    gate.open()
    wait_for(first)
    wait_until(lambda: len(done) == 5)
    assert done == ["a made", "b made", "c made", "b sent", "c sent"]
    batcher.close()


def test_a_completion_that_holds_its_ticket_is_dropped_before_it_is_called() -> None:
    """A ring of the two cost 1.23 to 1.31 of a call's processor time: only the garbage collector frees it."""
    batcher, _ = start_batcher()
    ticket, seen, called = make_ticket(), list[Any](), threading.Event()

    def completion(_: Ticket) -> None:
        seen.append(ticket.completion)
        called.set()

    ticket.completion = completion
    batcher.submit(ticket)
    assert called.wait(TIMEOUT_S)
    assert seen == [None]
    batcher.close()


def test_a_batch_that_a_crowd_shared_is_followed_by_a_linger_so_that_the_next_is_larger() -> None:
    gate = Gate()
    # A linger long enough for this test to be no race.
    batcher, observer = start_batcher(lambda: FakeEngine(gate), instances=1, linger_s=0.5)
    first = occupy(batcher, gate)
    crowd = [make_ticket(1, seed) for seed in range(CROWD)]
    for ticket in crowd:
        batcher.submit(ticket)
    gate.open()
    for ticket in (first, *crowd):
        wait_for(ticket)
    late = [make_ticket(1, 50), make_ticket(1, 51)]
    for ticket in late:
        batcher.submit(ticket)
    for ticket in late:
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    assert drain(batcher) == 0
    assert observer.batches == [1, CROWD, 2]


def test_drain_finishes_what_was_accepted() -> None:
    batcher, _ = start_batcher()
    tickets = [make_ticket(50, seed) for seed in range(20)]
    for ticket in tickets:
        batcher.submit(ticket)
    assert drain(batcher) == 0
    batcher.close()
    for ticket in tickets:
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    with pytest.raises(UnavailableError):
        batcher.submit(make_ticket())


def test_drain_out_of_time_fails_and_counts_what_is_left() -> None:
    gate = Gate()
    batcher, _ = start_batcher(lambda: FakeEngine(gate))
    running = occupy(batcher, gate)
    batcher.submit(waiting := make_ticket(20))
    assert drain(batcher, 0.05) == 2
    for ticket in (running, waiting):
        with pytest.raises(UnavailableError):
            wait_for(ticket)
    gate.open()
    batcher.close()


def test_start_raises_what_making_a_model_raised() -> None:
    def make_engine() -> FakeEngine:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        start_batcher(make_engine, instances=2)


def test_a_hundred_thousand_images_with_cancels_and_hopeless_deadlines_all_end_right() -> None:  # noqa: PLR0915  # one story
    """Every completed row is the row of its own seed and index, none is lost, none comes twice, no call hangs."""
    chance = random.Random(20261122)
    batcher, observer = start_batcher(instances=3, max_queue_images=1_000_000)
    sizes = [1, 1, 1, 2, 5, 16, 17, 64, 200, 1000]
    lock = threading.Lock()
    planned = [0]
    tickets: list[Ticket] = []
    cancelled: set[int] = set()

    def caller(number: int) -> None:
        mine = random.Random(number)
        while True:
            with lock:
                if planned[0] >= 100_000:
                    return
                size = mine.choice(sizes)
                planned[0] += size
            hopeless = mine.random() < 0.05
            ticket = make_ticket(
                size,
                seed=mine.getrandbits(64),
                start=mine.getrandbits(40),
                priority=mine.choice(list(Priority)),
                deadline=time.monotonic() - 1 if hopeless else time.monotonic() + TIMEOUT_S,
            )
            batcher.submit(ticket)
            with lock:
                tickets.append(ticket)
            if mine.random() < 0.2:
                for _ in range(mine.randrange(50)):
                    mine.random()  # a random moment
                batcher.cancel(ticket)
                cancelled.add(id(ticket))
            elif mine.random() < 0.5:
                ticket.ended.wait(TIMEOUT_S)

    threads = [threading.Thread(target=caller, args=(chance.getrandbits(32),)) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "a call hangs"
    assert drain(batcher) == 0
    batcher.close()

    completed = expired = 0
    for ticket in tickets:
        if isinstance(ticket.error, CallerLeftError):
            assert id(ticket) in cancelled
            assert ticket.ended.is_set()
            continue
        assert ticket.ended.is_set()
        if ticket.error is not None:
            assert isinstance(ticket.error, ExpiredError)
            expired += 1
            continue
        completed += 1
        assert rows_of(ticket) == expected_rows(ticket)
    assert planned[0] >= 100_000
    assert completed > 500
    assert expired > 10
    assert observer.drops["cancelled"] > 0
    ran = sum(observer.batches)
    assert ran == planned[0] - sum(observer.drops.values())
    assert batcher.queued_images == batcher.running_images == 0


class AheadEngine(FakeEngine):
    """Launches and waits apart, as a GPU does: ``story`` has what happened in which order, batches by their first seed."""

    launches_ahead = True

    def __init__(self, story: list[str], before_wait: Any = lambda seed: None, before_launch: Any = lambda seed: None) -> None:
        super().__init__()
        self._story, self._before_wait, self._before_launch = story, before_wait, before_launch
        self._seed = 0
        self._in_flight = 0

    def assemble(self, reader: LatentReader, spans: Any, count: int) -> dict[str, NDArray[Any]]:
        assert not self._in_flight, "the inputs of a run that goes on are written over"
        self._seed = spans[0].seed
        return super().assemble(reader, spans, count)

    def launch(self, feeds: Any, outputs: Any) -> Any:
        self._story.append(f"launch {self._seed}")
        self._before_launch(self._seed)
        self._in_flight += 1
        return partial(self._wait, self._seed, feeds, outputs)

    def _wait(self, seed: int, feeds: Any, outputs: Any) -> Any:
        self._in_flight -= 1
        self._before_wait(seed)
        self._story.append(f"wait {seed}")
        return super().run(feeds, outputs)


def told(story: list[str], seed: int, count: int = 16) -> FakeTicket:
    """A ticket whose delivery is part of the story."""
    ticket = make_ticket(count, seed)
    complete = ticket.completion
    assert complete is not None

    def completion(ticket: Ticket) -> None:
        story.append(f"deliver {seed}")
        complete(ticket)

    ticket.completion = completion
    return ticket


def holding(gate: Gate, seed: int) -> Any:
    """Hold what it is asked about for one seed."""
    return lambda asked: gate(np.zeros(0, np.float32)) if asked == seed else None


def test_the_next_batch_is_launched_before_the_last_one_is_delivered() -> None:
    """Issue: the device was idle while a batch was joined, copied and sent."""
    gate, story = Gate(), list[str]()
    batcher, _ = start_batcher(lambda: AheadEngine(story, holding(gate, 0)))
    tickets = [told(story, seed) for seed in range(3)]
    batcher.submit(tickets[0])
    assert gate.reached.wait(TIMEOUT_S)
    for ticket in tickets[1:]:
        batcher.submit(ticket)
    gate.open()
    for ticket in tickets:
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    assert drain(batcher) == 0
    assert story == [
        *("launch 0", "wait 0", "launch 1", "deliver 0", "wait 1", "launch 2", "deliver 1", "wait 2", "deliver 2"),
    ], "and with nothing left to launch it is delivered at once"
    assert batcher.close(TIMEOUT_S) == 0
    assert batcher.busy_instances == batcher.running_images == 0


def test_a_lone_digit_is_delivered_without_looking_for_company() -> None:
    story = list[str]()
    batcher, _ = start_batcher(lambda: AheadEngine(story), linger_s=TIMEOUT_S)
    for seed in range(3):
        batcher.submit(ticket := told(story, seed, 1))
        wait_for(ticket)
    assert batcher.close(TIMEOUT_S) == 0
    assert story == [f"{what} {seed}" for seed in range(3) for what in ("launch", "wait", "deliver")]


def test_a_batch_that_may_still_fill_is_not_launched_ahead() -> None:
    """It goes on waiting for company while another instance works, and what is computed is delivered at once."""
    gates, story = [Gate(), Gate()], list[str]()

    def hold(seed: int) -> None:
        if seed < 2:
            gates[seed](np.zeros(0, np.float32))

    batcher, observer = start_batcher(lambda: AheadEngine(story, hold), instances=2, linger_s=TIMEOUT_S)
    full = [told(story, seed) for seed in range(2)]
    for ticket, gate in zip(full, gates, strict=True):
        batcher.submit(ticket)
        assert gate.reached.wait(TIMEOUT_S)
    batcher.submit(half := told(story, 2, 8))
    gates[0].open()
    wait_for(full[0])
    assert "launch 2" not in story
    batcher.submit(mate := told(story, 3, 8))
    for ticket in (half, mate):
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    gates[1].open()
    wait_for(full[1])
    assert drain(batcher) == 0
    assert observer.batches == [16, 16, 16]
    batcher.close()


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_a_batch_launched_ahead_that_fails_takes_no_other_with_it(where: str) -> None:
    gate, story = Gate(), list[str]()

    def fail(seed: int) -> None:
        if seed == 1:
            raise RuntimeError("planted")

    def hold(seed: int) -> None:
        holding(gate, 0)(seed)
        if where == "wait":
            fail(seed)

    batcher, observer = start_batcher(lambda: AheadEngine(story, hold, fail if where == "launch" else lambda seed: None))
    tickets = [told(story, seed) for seed in range(3)]
    batcher.submit(tickets[0])
    assert gate.reached.wait(TIMEOUT_S)
    for ticket in tickets[1:]:
        batcher.submit(ticket)
    gate.open()
    for ticket in (tickets[0], tickets[2]):
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    with pytest.raises(EngineError):
        wait_for(tickets[1])
    assert observer.failures == ["raised"]
    assert drain(batcher) == 0
    assert batcher.running_images == batcher.busy_instances == 0
    assert batcher.close(TIMEOUT_S) == 0


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_what_a_failed_run_held_is_freed_without_a_garbage_collection(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []

    class PlantedError(Exception):
        def __init__(self) -> None:
            raised.append(weakref.ref(self))

    def fail(seed: int) -> None:
        raise PlantedError

    monkeypatch.setattr("serve.batching.instance.log.error", lambda *_, **__: None)  # a record would keep it
    hooks = (lambda seed: None, fail) if where == "launch" else (fail, lambda seed: None)
    batcher, _ = start_batcher(lambda: AheadEngine([], *hooks))
    gc.disable()
    try:
        batcher.submit(ticket := make_ticket())
        with pytest.raises(EngineError):
            wait_for(ticket)
        wait_until(lambda: not batcher.busy_instances)
        wait_until(lambda: raised[0]() is None)
    finally:
        gc.enable()
    batcher.close()


def test_a_device_lost_by_a_batch_launched_ahead_leaves_the_one_before_its_answer() -> None:
    gate, story = Gate(), list[str]()

    def lose(seed: int) -> None:
        if seed == 1:
            raise DeviceLostError("gone")

    batcher, _ = start_batcher(lambda: AheadEngine(story, holding(gate, 0), lose))
    tickets = [told(story, seed) for seed in range(3)]
    batcher.submit(tickets[0])
    assert gate.reached.wait(TIMEOUT_S)
    for ticket in tickets[1:]:
        batcher.submit(ticket)
    gate.open()
    assert rows_of(wait_for(tickets[0])) == expected_rows(tickets[0])
    with pytest.raises(EngineError):
        wait_for(tickets[1])
    with pytest.raises(UnavailableError, match="gone"):
        wait_for(tickets[2])
    assert batcher.broken == "gone"


def test_cancelled_between_the_run_and_its_delivery_only_that_caller_is_left_out() -> None:
    """Its batch has been computed, and the next one is being launched."""
    first, launching, story = Gate(), Gate(), list[str]()
    batcher, _ = start_batcher(lambda: AheadEngine(story, holding(first, 9), holding(launching, 2)))
    gone, mate, following = told(story, 0, 8), told(story, 1, 8), told(story, 2)
    batcher.submit(told(story, 9))
    assert first.reached.wait(TIMEOUT_S)
    for ticket in (gone, mate, following):
        batcher.submit(ticket)
    first.open()
    assert launching.reached.wait(TIMEOUT_S)
    assert batcher.running_images == 32, "one batch that is computed, and one ahead"
    batcher.cancel(gone)
    launching.open()
    for ticket in (mate, following):
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    with pytest.raises(CallerLeftError):
        wait_for(gone)
    assert drain(batcher) == 0
    assert batcher.close(TIMEOUT_S) == 0


@pytest.mark.parametrize("how", ["hangs", "is cut off"])
def test_both_batches_of_an_instance_fail_when_it(how: str) -> None:
    first, launching, story = Gate(), Gate(), list[str]()
    batcher, _ = start_batcher(lambda: AheadEngine(story, holding(first, 0), holding(launching, 1)))
    tickets = [told(story, seed) for seed in range(2)]
    batcher.submit(tickets[0])
    assert first.reached.wait(TIMEOUT_S)
    batcher.submit(tickets[1])
    first.open()
    assert launching.reached.wait(TIMEOUT_S)
    if how == "hangs":
        batcher.watch(31.0)
    else:
        assert batcher.cut_off() == 2
    for ticket in tickets:
        with pytest.raises(EngineError if how == "hangs" else UnavailableError):
            wait_for(ticket)
    launching.open()
    assert batcher.close(TIMEOUT_S) == 0
    assert [entry for entry in story if entry.startswith("deliver")] == ["deliver 0", "deliver 1"], "once each"
    assert batcher.running_images == batcher.busy_instances == 0
