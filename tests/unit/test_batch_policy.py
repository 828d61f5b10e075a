"""How many images a slot takes of what a lone caller asks for."""

from __future__ import annotations

import pytest

from serve.batching.policy import BatchPolicy
from serve.batching.queue import FairQueue
from tests.fake_engine import make_ticket

MOST = 8


@pytest.mark.parametrize(
    ("rows", "idle", "row_ms", "taken"),
    [
        (64, 32, 0.6, [2] * 32),  # many cores: each a little
        (64, 2, 0.6, [MOST] * 8),  # no more than a batch
        (10, 2, 0.6, [5, 5]),
        (10, 3, 0.6, [4, 3, 3]),
        (10, 32, 0.2, [5, 5]),  # of two milliseconds no more than two shares
        (4, 32, 0.1, [4]),
        (4, 1, 10.0, [4]),  # the others work
        (4, 2, 0.0, [4]),  # nothing is known yet
    ],
)
def test_a_lone_callers_shares_are_alike_and_worth_a_run(rows: int, idle: int, row_ms: float, taken: list[int]) -> None:
    policy, queue = BatchPolicy(0.005, MOST), FairQueue(1000, MOST)
    policy.note_run(1, row_ms / 1e3)
    queue.push(make_ticket(rows))
    seen = []
    while queue.images:
        chunks, _ = queue.take(policy.images(queue, max(1, idle - len(seen))), 0.0)
        seen.append(chunks[0].count)
    assert seen == taken


def test_a_running_mean_of_what_a_row_takes_begins_with_the_first_run() -> None:
    policy = BatchPolicy(0.005, MOST)
    policy.note_run(8, 0.008)
    assert policy.seconds_per_image == pytest.approx(0.001)
    policy.note_run(4, 0.008)
    assert policy.seconds_per_image == pytest.approx(0.0011)
