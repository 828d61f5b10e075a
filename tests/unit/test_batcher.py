"""What the batcher promises: whose rows come back, who is not disturbed, what a failure costs whom."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.batching import slots as slots_module
from serve.batching.batcher import Batcher
from serve.batching.policy import CROWD_CALLERS, LEAST_SHARE_S
from serve.batching.ticket import Priority, Ticket
from serve.errors import EngineError, ExpiredError, QueueFullError, UnavailableError
from serve.latents import Span, draw, draw_span
from tests.fake_runner import (
    LATENT_SIZE,
    TIMEOUT_S,
    FakeRunner,
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
    batcher, _, observer = start_batcher()
    batcher.submit(ticket := make_ticket())
    wait_for(ticket)
    assert rows_of(ticket) == expected_rows(ticket)
    batcher.close()
    assert observer.batches == [1]


def test_labels_outlive_the_memory_that_the_next_batch_is_assembled_in() -> None:
    class OneMemory(FakeRunner):
        """As the CUDA engine: every batch is assembled in the same arrays."""

        def __init__(self) -> None:
            super().__init__(labelled=True)
            self._feeds = super().allocate(16)

        def allocate(self, count: int) -> dict[str, NDArray[Any]]:
            return {name: array[:count] for name, array in self._feeds.items()}

    batcher, _, _ = start_batcher(OneMemory, labels=10)
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
    batcher, _, observer = start_batcher(lambda: FakeRunner(gate))
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
    batcher, _, observer = start_batcher(slots=instances)
    batcher.submit(ticket := make_ticket(1000, seed=3, start=77))
    wait_for(ticket)
    assert rows_of(ticket) == expected_rows(ticket)
    assert drain(batcher) == 0
    assert observer.splits == 1
    assert max(observer.batches) <= 16


def test_a_lone_caller_never_lingers() -> None:
    batcher, _, observer = start_batcher(slots=2, linger_s=TIMEOUT_S)
    for seed in range(3):
        batcher.submit(ticket := make_ticket(1, seed))
        assert wait_for(ticket).queue_seconds < TIMEOUT_S / 2
    batcher.close()
    assert observer.batches == [1, 1, 1]


def test_while_a_slot_works_a_batch_waits_for_company_but_at_most_the_linger() -> None:
    gate = Gate()
    batcher, _, observer = start_batcher(
        lambda: FakeRunner(lambda latents: gate(latents) if len(latents) == 1 else None), slots=2, linger_s=0.2
    )
    first = occupy(batcher, gate)
    batcher.submit(lone := make_ticket(2, 1))
    batcher.submit(mate := make_ticket(3, 2))
    wait_for(lone)
    assert lone.queue_seconds >= 0.19
    wait_for(mate)
    gate.open()
    wait_for(first)
    assert drain(batcher) == 0
    assert sorted(observer.batches) == [1, 5]


def test_a_full_batch_does_not_linger() -> None:
    gate = Gate()
    runner = lambda: FakeRunner(lambda latents: gate(latents) if len(latents) == 1 else None)  # noqa: E731
    batcher, _, observer = start_batcher(runner, slots=2, linger_s=TIMEOUT_S, max_batch_size=4)
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

    def make_runner() -> FakeRunner:
        made.append(1)
        return FakeRunner(lambda latents: gate(latents) if latents[0, 0] == HUNG else None)

    batcher, _, _ = start_batcher(make_runner, slots=4, linger_s=0.001)
    hung = make_ticket(1)
    hung.span = Span(0, 0, 1, np.full((1, LATENT_SIZE), HUNG, np.float32))
    batcher.submit(hung)
    assert gate.reached.wait(TIMEOUT_S)
    singles = [make_ticket(1, seed) for seed in range(49)]
    for ticket in singles:
        batcher.submit(ticket)
    for ticket in singles:
        assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    assert not hung.caller.is_set()  # type: ignore[attr-defined]
    assert batcher.busy_slots == 1
    gate.open()
    wait_for(hung)
    batcher.close()


def test_a_lone_callers_rows_are_shared_out_to_the_idle_slots_where_that_is_worth_a_run() -> None:
    together = threading.Barrier(1)

    def before(latents: NDArray[np.float32]) -> None:
        time.sleep(2 * len(latents) * LEAST_SHARE_S)
        together.wait(TIMEOUT_S)

    batcher, _, observer = start_batcher(lambda: FakeRunner(before), slots=3, linger_s=TIMEOUT_S)
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


def test_a_quick_models_rows_are_not_shared_out() -> None:
    batcher, _, observer = start_batcher(slots=3)
    for _ in range(2):
        batcher.submit(ticket := make_ticket(16))
        wait_for(ticket)
    batcher.close()
    assert observer.batches == [16, 16]


def test_what_several_wait_for_is_not_shared_out() -> None:
    gate = Gate()
    batcher, _, observer = start_batcher(lambda: FakeRunner(gate), slots=2, linger_s=TIMEOUT_S)
    held = [make_ticket(16, seed) for seed in range(2)]
    for ticket in held:
        batcher.submit(ticket)
    wait_until(lambda: batcher.busy_slots == 2)
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
    batcher, _, _ = start_batcher(lambda: FakeRunner(gate), slots=2, linger_s=TIMEOUT_S)
    batcher.submit(ticket := make_ticket(20))
    wait_until(lambda: batcher.busy_slots == 2)
    assert batcher.running_images == 20
    gate.open()
    assert rows_of(wait_for(ticket)) == expected_rows(ticket)
    batcher.close()


def test_bulk_work_that_may_wait_for_room_is_queued_when_there_is_some() -> None:
    """Issue: a lone stream on an idle server was refused when its chunks were as large as the queue."""
    gate = Gate()
    batcher, _, _ = start_batcher(lambda: FakeRunner(gate), max_queue_images=10, max_batch_size=4)
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
    batcher, _, _ = start_batcher(lambda: FakeRunner(gate), max_queue_images=10)
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
    batcher, _, _ = start_batcher(lambda: FakeRunner(gate), max_queue_images=10)
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

    batcher, _, observer = start_batcher(lambda: FakeRunner(before))
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

    batcher, delivery, observer = start_batcher(lambda: FakeRunner(before))
    first = occupy(batcher, gate)
    gone, neighbour = make_ticket(5), make_ticket(3, seed=8)
    batcher.submit(gone)
    batcher.submit(neighbour)
    assert batcher.cancel(gone)
    assert batcher.queued_images == 3
    gate.open()
    wait_for(first)
    assert rows_of(wait_for(neighbour)) == expected_rows(neighbour)
    assert seen == [1, 3]
    assert observer.drops == {"cancelled": 5}
    assert gone not in delivery.order
    assert not batcher.cancel(neighbour), "it has been delivered"


def test_what_is_cancelled_before_it_is_submitted_is_never_queued() -> None:
    """Another thread may cancel a call that this one is about to submit."""
    batcher, _, observer = start_batcher()
    ticket = make_ticket(3)
    assert batcher.cancel(ticket)
    batcher.submit(ticket)
    assert drain(batcher) == 0
    assert batcher.queued_images == 0
    batcher.submit(other := make_ticket())
    wait_for(other)
    batcher.close()
    assert observer.batches == [1]


def test_cancelling_a_running_request_leaves_its_batch_mates_untouched() -> None:
    gate = Gate()
    batcher, delivery, _ = start_batcher(lambda: FakeRunner(gate))
    running = occupy(batcher, gate)
    batcher.submit(other := make_ticket(2, seed=1))
    assert batcher.cancel(running)
    gate.open()
    assert rows_of(wait_for(other)) == expected_rows(other)
    assert running not in delivery.order


def test_a_run_that_raises_fails_its_own_batch_and_no_other() -> None:
    gate = Gate()
    runs: list[int] = []

    def before(latents: NDArray[np.float32]) -> None:
        gate(latents)
        runs.append(len(latents))
        if len(runs) == 2:
            raise RuntimeError("no memory")

    batcher, _, observer = start_batcher(lambda: FakeRunner(before))
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
    assert batcher.live_slots == 1


def test_a_failed_part_fails_its_request_once_and_drops_the_rest() -> None:
    def before(latents: NDArray[np.float32]) -> None:
        raise RuntimeError("broken")

    batcher, delivery, observer = start_batcher(lambda: FakeRunner(before))
    batcher.submit(ticket := make_ticket(100))
    with pytest.raises(EngineError):
        wait_for(ticket)
    assert drain(batcher) == 0
    assert delivery.order == [ticket]
    assert observer.drops == {"failed": 84}


def test_a_hanging_slot_is_given_up_and_replaced() -> None:
    gate = Gate()
    made: list[int] = []

    def make_runner() -> FakeRunner:
        made.append(1)
        return FakeRunner(gate) if len(made) == 1 else FakeRunner()

    batcher, _, observer = start_batcher(make_runner, watchdog_s=0.05)
    stuck = occupy(batcher, gate)
    batcher.submit(waiting := make_ticket(3, seed=5))
    while not stuck.caller.wait(0.02):  # type: ignore[attr-defined]
        batcher.check_stalled()
    with pytest.raises(EngineError):
        wait_for(stuck)
    assert rows_of(wait_for(waiting)) == expected_rows(waiting)
    assert batcher.live_slots == 1
    assert observer.failures == ["hung"]
    gate.open()  # the old run comes back: nobody may be answered twice, which Delivery asserts
    batcher.submit(after := make_ticket())
    wait_for(after)
    batcher.close()


def test_a_dying_thread_fails_its_batch_and_is_replaced() -> None:
    died = threading.Event()

    def before(latents: NDArray[np.float32]) -> None:
        if not died.is_set():
            died.set()
            raise SystemExit  # not an Exception: it ends the thread

    batcher, _, observer = start_batcher(lambda: FakeRunner(before))
    batcher.submit(hit := make_ticket())
    with pytest.raises(EngineError):
        wait_for(hit)
    after = make_ticket(2, seed=4)
    wait_until(lambda: batcher.live_slots)
    batcher.submit(after)
    assert rows_of(wait_for(after)) == expected_rows(after)
    assert observer.failures == ["died"]


def test_without_a_slot_left_callers_are_refused_and_nobody_hangs() -> None:
    gate = Gate()
    made: list[int] = []

    def make_runner() -> FakeRunner:
        made.append(1)
        if len(made) > 1:
            raise RuntimeError("the model cannot be loaded again")
        return FakeRunner(gate)

    batcher, _, _ = start_batcher(make_runner, watchdog_s=0.05)
    stuck = occupy(batcher, gate)
    batcher.submit(waiting := make_ticket(3))
    while not stuck.caller.wait(0.02):  # type: ignore[attr-defined]
        batcher.check_stalled()
    with pytest.raises(UnavailableError):
        wait_for(waiting)
    assert batcher.live_slots == 0
    with pytest.raises(UnavailableError):
        batcher.submit(make_ticket())
    batcher.close()
    gate.open()


def test_a_batch_that_a_crowd_shared_is_followed_by_a_linger_so_that_the_next_is_larger() -> None:
    gate = Gate()
    # A linger long enough for this test to be no race.
    batcher, _, observer = start_batcher(lambda: FakeRunner(gate), slots=1, linger_s=0.5)
    first = occupy(batcher, gate)
    crowd = [make_ticket(1, seed) for seed in range(CROWD_CALLERS)]
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
    assert observer.batches == [1, CROWD_CALLERS, 2]


def test_a_replacement_that_fails_is_tried_again_until_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: a replacement that failed was never tried again, and after eight losses a model refused for good."""
    monkeypatch.setattr(slots_module, "BACKOFF_FIRST_S", 0.001)
    made: list[int] = []
    failures = 12

    def before(latents: NDArray[np.float32]) -> None:
        if len(made) == 1:
            raise SystemExit  # ends the first slot's thread

    def make_runner() -> FakeRunner:
        made.append(1)
        if 1 < len(made) <= failures:
            raise RuntimeError("not yet")
        return FakeRunner(before)

    monkeypatch.setattr(slots_module, "BACKOFF_MOST_S", 0.01)
    batcher, _, _ = start_batcher(make_runner)
    batcher.submit(hit := make_ticket())
    with pytest.raises(EngineError):
        wait_for(hit)
    wait_until(lambda: batcher.live_slots == 1)
    assert batcher.without_slots_s == 0
    assert len(made) == failures + 1
    batcher.submit(after := make_ticket(2, seed=4))
    assert rows_of(wait_for(after)) == expected_rows(after)
    batcher.close()


def test_the_time_without_slots_is_told_and_closing_ends_the_replacing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def die(latents: NDArray[np.float32]) -> None:
        raise SystemExit

    def make_runner() -> FakeRunner:
        made.append(1)
        if len(made) > 1:
            raise RuntimeError("never again")
        return FakeRunner(die)

    batcher, _, _ = start_batcher(make_runner)
    assert batcher.without_slots_s == 0
    batcher.submit(hit := make_ticket())
    with pytest.raises(EngineError):
        wait_for(hit)
    wait_until(lambda: batcher.without_slots_s > 0.05)
    batcher.close(TIMEOUT_S)
    tries = len(made)
    replacing = [thread for thread in threading.enumerate() if thread.name == "slot-replacement"]
    for thread in replacing:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert len(made) <= tries + 1


def test_losses_in_a_row_are_replaced_later_and_later_and_a_batch_that_is_run_begins_anew() -> None:
    pool = slots_module.SlotPool(1, lambda number: None, lambda: None)  # type: ignore[arg-type,return-value]
    waits = []
    for _ in range(14):
        waits.append(pool._backoff_s())
        pool._losses += 1
    assert waits[:6] == [0.0, 0.0, 0.5, 1.0, 2.0, 4.0]
    assert waits == sorted(waits)
    assert waits[-1] == slots_module.BACKOFF_MOST_S
    pool.note_success()
    assert pool._backoff_s() == 0.0


def test_drain_finishes_what_was_accepted() -> None:
    batcher, _, _ = start_batcher()
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
    batcher, _, _ = start_batcher(lambda: FakeRunner(gate))
    running = occupy(batcher, gate)
    batcher.submit(waiting := make_ticket(20))
    assert drain(batcher, 0.05) == 2
    for ticket in (running, waiting):
        with pytest.raises(UnavailableError):
            wait_for(ticket)
    gate.open()
    batcher.close()


def test_start_raises_what_making_a_model_raised() -> None:
    def make_runner() -> FakeRunner:
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        start_batcher(make_runner, slots=2)


def test_a_hundred_thousand_images_with_cancels_and_hopeless_deadlines_all_end_right() -> None:  # noqa: PLR0915  # one story
    """Every completed row is the row of its own seed and index, none is lost, none comes twice, no call hangs."""
    chance = random.Random(20261122)
    batcher, delivery, observer = start_batcher(slots=3, max_queue_images=1_000_000)
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
                ticket.caller.wait(TIMEOUT_S)  # type: ignore[attr-defined]

    threads = [threading.Thread(target=caller, args=(chance.getrandbits(32),)) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "a call hangs"
    assert drain(batcher) == 0
    batcher.close()

    delivered = {id(ticket) for ticket in delivery.order}
    assert len(delivered) == len(delivery.order)
    completed = expired = 0
    for ticket in tickets:
        if ticket.cancelled:
            assert id(ticket) in cancelled
            assert id(ticket) not in delivered
            continue
        assert id(ticket) in delivered
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
