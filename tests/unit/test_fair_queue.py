"""Who goes next, and what the queue's bound counts."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from serve.batching.queue import BULK_TURN, FEW_DEAD, FairQueue
from serve.batching.ticket import Priority, Ticket
from serve.errors import QueueFullError
from serve.latents import Span
from tests.fake_engine import make_ticket

BATCH = 16


def shares(queue: FairQueue, limit: int, now: float = 0.0) -> list[tuple[Ticket, int, int]]:
    return [(chunk.ticket, chunk.first, chunk.count) for chunk in queue.take(limit, now)[0]]


def test_a_batch_is_filled_with_images_of_many_tickets() -> None:
    queue = FairQueue(1000, BATCH)
    first, second, third = make_ticket(3), make_ticket(5), make_ticket(100)
    for ticket in (first, second, third):
        queue.push(ticket)
    assert shares(queue, BATCH) == [(first, 0, 3), (second, 0, 5), (third, 0, 8)]
    assert queue.images == 92


def test_a_long_request_is_cut_and_its_parts_follow_each_other() -> None:
    queue = FairQueue(1000, BATCH)
    ticket = make_ticket(40)
    queue.push(ticket)
    assert [shares(queue, BATCH)[0][1:] for _ in range(3)] == [(0, 16), (16, 16), (32, 8)]
    assert queue.images == 0
    assert shares(queue, BATCH) == []


def test_one_digit_behind_thousands_goes_into_the_next_batch() -> None:
    queue = FairQueue(100_000, BATCH)
    for _ in range(16):
        queue.push(make_ticket(4096))
    for _ in range(16 * 3):
        queue.take(BATCH, 0.0)
    single = make_ticket(1)
    queue.push(single)
    assert shares(queue, BATCH)[0] == (single, 0, 1)


def test_one_digit_goes_into_the_next_batch_at_any_time() -> None:
    """Of long requests in steady state, some are always about to finish a chunk: a digit is not to wait for those."""
    queue = FairQueue(100_000, BATCH)
    for batch in range(300):
        while queue.waiting < 16:
            queue.push(make_ticket(150))
        single = make_ticket(1)
        queue.push(single)
        assert shares(queue, BATCH)[0] == (single, 0, 1), f"batch {batch}"


def test_small_requests_take_no_more_than_their_share_from_a_long_one() -> None:
    queue = FairQueue(100_000, BATCH)
    long = make_ticket(4096)
    queue.push(long)
    batches = 2000
    for _ in range(batches):
        while queue.waiting < 1 + 24:
            queue.push(make_ticket(4))
        queue.take(BATCH, 0.0)
    assert long.taken >= batches * BATCH // 25 - 2 * BATCH


def test_a_long_request_is_not_starved_by_a_stream_of_single_digits() -> None:
    queue = FairQueue(100_000, BATCH)
    long = make_ticket(64)
    queue.push(long)
    batches = 0
    while long.waiting:
        while queue.images < 32 + long.waiting:  # more singles than fit are always there
            queue.push(make_ticket(1))
        queue.take(BATCH, 0.0)
        batches += 1
        assert batches < 200


def test_equal_requests_share_evenly() -> None:
    queue = FairQueue(1000, BATCH)
    tickets = [make_ticket(64) for _ in range(4)]
    for ticket in tickets:
        queue.push(ticket)
    for _ in range(8):
        queue.take(BATCH, 0.0)
    assert {ticket.taken for ticket in tickets} == {32}


def test_interactive_goes_before_bulk_and_bulk_takes_what_is_left() -> None:
    queue = FairQueue(1000, BATCH)
    bulk, interactive = make_ticket(100, priority=Priority.BULK), make_ticket(10)
    queue.push(bulk)
    queue.push(interactive)
    assert shares(queue, BATCH) == [(interactive, 0, 10), (bulk, 0, 6)]


def test_bulk_is_never_starved_for_good() -> None:
    queue = FairQueue(100_000, BATCH)
    bulk = make_ticket(16, priority=Priority.BULK)
    queue.push(bulk)
    queue.push(make_ticket(16 * 100))
    for _ in range(BULK_TURN - 1):
        queue.take(BATCH, 0.0)
        assert bulk.taken == 0
    queue.take(BATCH, 0.0)
    assert bulk.taken == 16


def test_the_bound_counts_images_and_refuses_whole_requests() -> None:
    queue = FairQueue(10, BATCH)
    queue.push(make_ticket(8))
    with pytest.raises(QueueFullError, match=r"^queue is full: 8 of 10 images wait, 3 more do not fit$") as refused:
        queue.push(make_ticket(3), seconds_per_image=0.25)
    assert refused.value.retry_after_s == 8 * 0.25
    queue.push(make_ticket(2))
    assert queue.images == 10


def test_discarding_frees_room_and_the_rows_never_come_up() -> None:
    queue = FairQueue(10, BATCH)
    gone, stays = make_ticket(8), make_ticket(2)
    queue.push(gone)
    queue.push(stays)
    assert queue.discard(gone) == 8
    assert queue.images == 2
    assert shares(queue, BATCH) == [(stays, 0, 2)]


def test_each_priority_has_the_whole_bound_for_itself() -> None:
    queue = FairQueue(10, BATCH)
    queue.push(make_ticket(10, priority=Priority.BULK))
    queue.push(make_ticket(10))
    assert queue.images == 20
    with pytest.raises(QueueFullError) as refused:
        queue.push(make_ticket(1))
    assert refused.value.retry_after_s > 0


def test_bulk_that_waits_for_room_is_not_before_what_the_other_priority_has_room_for() -> None:
    queue = FairQueue(10, BATCH)
    for _ in range(2):
        queue.push(make_ticket(10, priority=Priority.BULK, waits_for_room=True))
    stream = make_ticket(5, waits_for_room=True)
    queue.push(stream)
    assert queue.images == 15
    assert shares(queue, 5) == [(stream, 0, 5)]
    assert [queue.take(BATCH, 0.0)[0][0].count for _ in range(2)] == [10, 10]


def test_tickets_that_left_are_not_kept_nor_their_latents() -> None:
    """Issue: 2,000 pairs of submit and cancel left 2,000 entries alive, up to 4 MB each."""
    queue = FairQueue(1 << 20, BATCH)
    stays = make_ticket(1)
    queue.push(stays)
    latents = []
    for _ in range(2000):
        rows = np.zeros((2, 8), np.float32)
        latents.append(weakref.ref(rows))
        gone = Ticket(Span(0, 0, 2, rows), ("pixels",), Priority.INTERACTIVE, None, None)
        queue.push(gone)
        assert queue.discard(gone) == 2
        del gone, rows
    assert not any(reference() is not None for reference in latents)
    assert sum(len(level.heap) for level in queue._levels) <= 1 + FEW_DEAD + 1
    assert shares(queue, BATCH) == [(stays, 0, 1)]
    assert queue.images == 0


def test_an_expired_ticket_is_handed_back_instead_of_run() -> None:
    queue = FairQueue(10, BATCH)
    late, fresh = make_ticket(3, deadline=5.0), make_ticket(2, deadline=5.1)
    queue.push(late)
    queue.push(fresh)
    chunks, expired = queue.take(BATCH, now=5.0)
    assert [chunk.ticket for chunk in chunks] == [fresh]
    assert expired == [late]
