"""The address rule: golden vectors, and the properties that make an address mean the same everywhere."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.latents import (
    BLOCK_ROWS,
    INDEX_LIMIT,
    SEED_LIMIT,
    LatentReader,
    Span,
    blocks_per_row,
    draw,
    draw_span,
    slerp,
    tail_beyond,
    to_normal,
)

GOLDEN_LABELS = [7, 8, 2, 5, 0, 3, 9, 4, 4, 9, 8, 3]  # of (7, 1000 …), z = 100

seeds = st.integers(0, SEED_LIMIT - 1)
EXAMPLES = settings(max_examples=60)

# The bits of the first values of some rows, so that no change of library, processor or code can move the stream unseen.
GOLDEN = {
    (0, 0, 64): [1072192134, 1074882191, 3214650667, 1060342345, 1051724957, 1067190163],
    (7, 1000, 100): [1056568277, 1061207948, 1065255123, 1073812561, 3205430523, 3200514888],
    (SEED_LIMIT - 1, INDEX_LIMIT - 1, 100): [1042276630, 1064690705, 1065886406, 1051986869, 1073764827, 1064542452],
}


GOLDEN_TRUNCATED = {
    (7, 5, 64, 0.5): [1045953239, 1052971980, 1037276301, 1041149912, 3196357945, 3200380979],
    (SEED_LIMIT - 1, 1 << 62, 100, 1.0): [1063713361, 3206008563, 3211666051, 1037363843, 1045982784, 1037575294],
}


@pytest.mark.parametrize("address", GOLDEN_TRUNCATED)
def test_golden_vectors_of_truncated_rows_never_move(address: tuple[int, int, int, float]) -> None:
    seed, index, latent_size, truncation = address
    rows, _ = draw_span(Span(seed, index, 1, truncation=truncation), latent_size, 0)
    assert rows[0].view(np.uint32)[:6].tolist() == GOLDEN_TRUNCATED[address]


@pytest.mark.parametrize("address", GOLDEN)
def test_golden_vectors_never_move(address: tuple[int, int, int]) -> None:
    seed, index, latent_size = address
    row = draw(seed, index, 1, latent_size)[0]
    assert row.view(np.uint32)[:6].tolist() == GOLDEN[address]


def test_bits_are_numpys_philox_at_the_documented_counter() -> None:
    seed, index, latent_size = 12345, 678, 100
    block = index * blocks_per_row(latent_size)
    words = np.random.Philox(key=seed, counter=block).random_raw(blocks_per_row(latent_size) * 4).view(np.uint32)
    expected = np.empty((1, latent_size), np.float32)
    to_normal(words[None, :latent_size], expected)
    assert draw(seed, index, 1, latent_size).tobytes() == expected.tobytes()


@given(seed=seeds, start=st.integers(0, INDEX_LIMIT - 700), sizes=st.lists(st.integers(1, 200), min_size=1, max_size=3))
@EXAMPLES
def test_any_chunking_gives_the_same_rows(seed: int, start: int, sizes: list[int]) -> None:
    whole = draw(seed, start, sum(sizes), 64)
    first = 0
    for size in sizes:
        assert draw(seed, start + first, size, 64).tobytes() == whole[first : first + size].tobytes()
        first += size


@given(data=st.data(), latent_size=st.sampled_from([1, 7, 8, 64, 100]))
@EXAMPLES
def test_any_batch_mates_give_the_same_rows(data: st.DataObject, latent_size: int) -> None:
    spans = []
    for _ in range(data.draw(st.integers(1, 6))):
        count = data.draw(st.sampled_from([1, 2, 5, BLOCK_ROWS, BLOCK_ROWS + 3]))
        explicit = None
        start = data.draw(st.integers(0, 1000))
        if data.draw(st.booleans()):
            explicit = np.arange((start + count) * latent_size, dtype=np.float32).reshape(-1, latent_size)
        spans.append(Span(data.draw(seeds), start, count, explicit))
    batch = np.full((sum(span.count for span in spans), latent_size), np.nan, np.float32)
    LatentReader(latent_size).fill(batch, spans)
    row = 0
    for span in spans:
        expected = (
            draw(span.seed, span.start, span.count, latent_size)
            if span.explicit is None
            else span.explicit[span.start : span.start + span.count]
        )
        assert batch[row : row + span.count].tobytes() == expected.tobytes()
        row += span.count


def test_a_row_has_the_same_latents_whether_or_not_it_has_a_label() -> None:
    rows, labels = draw_span(Span(7, 1000, 50), 100, 10)
    assert rows.tobytes() == draw(7, 1000, 50, 100).tobytes(), "z = 100 leaves words to spare in its last block"
    assert labels is not None
    assert labels[:12].tolist() == GOLDEN_LABELS
    assert draw_span(Span(7, 1020, 1), 100, 10)[1] == labels[20]


def test_labels_are_the_documented_word_of_the_row() -> None:
    for latent_size in (64, 100):
        blocks = blocks_per_row(latent_size + 1)
        words = np.random.Philox(key=5, counter=3 * blocks).random_raw(blocks * 4).view(np.uint32)
        _, labels = draw_span(Span(5, 3, 1), latent_size, 10)
        assert labels is not None
        assert labels.tolist() == [int(words[latent_size]) * 10 >> 32]


def test_labels_come_up_equally_often() -> None:
    _, labels = draw_span(Span(1, 0, 20_000), 100, 10)
    assert labels is not None
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000) ** 2 / 2000).sum() < 40  # chi-squared of 9 degrees is above it once in 130,000 times


def test_labels_that_are_given_take_the_place_of_the_tapes() -> None:
    own = np.array([7, 7, 2], np.int64)
    spans = [Span(1, 0, 2), Span(1, 2, 3, labels=own), Span(9, 0, BLOCK_ROWS)]
    batch, labels = np.empty((5 + BLOCK_ROWS, 100), np.float32), np.empty(5 + BLOCK_ROWS, np.int64)
    LatentReader(100, 10).fill(batch, spans, labels)
    assert labels[2:5].tolist() == [7, 7, 2]
    assert batch[:5].tobytes() == draw(1, 0, 5, 100).tobytes()
    assert labels[:2].tolist() == draw_span(Span(1, 0, 2), 100, 10)[1].tolist()
    assert labels[5:].tolist() == draw_span(Span(9, 0, BLOCK_ROWS), 100, 10)[1].tolist()
    assert Span(1, 2, 3, labels=own).part(1, 2).labels.tolist() == [7, 2]


@pytest.mark.parametrize("truncation", [0.584, 0.798, 1.223, 2.539])
def test_truncation_is_the_same_as_text_and_as_protobufs_float(truncation: float) -> None:
    """Over HTTP it comes with 64 bits, over gRPC with 32: of these values the tails differed."""
    assert tail_beyond(truncation) == tail_beyond(float(np.float32(truncation)))


@pytest.mark.parametrize("truncation", [0.01, 0.5, 1.0, 2.0])
def test_truncation_is_the_normal_distribution_cut_off_there(truncation: float) -> None:
    whole = draw(3, 0, 4000, 64)
    cut, _ = draw_span(Span(3, 0, 4000, truncation=truncation), 64, 0)
    assert np.abs(cut).max() <= truncation + 2e-4, "p_t lies on a grid of 2**-20"
    assert (np.signbit(cut) == np.signbit(whole)).all()
    normal = NormalDist()
    inside = 1 - 2 * normal.cdf(-truncation)
    for value in (0.25, 0.5, 0.9):
        share = (2 * normal.cdf(value * truncation) - 1) / inside
        assert abs(float((np.abs(cut) < value * truncation).mean()) - share) < 0.005


def test_truncation_of_one_caller_leaves_the_batch_mates_alone() -> None:
    spans = [Span(1, 0, BLOCK_ROWS - 3), Span(2, 0, 7, truncation=0.5), Span(3, 0, 4)]
    batch = np.empty((BLOCK_ROWS + 8, 64), np.float32)
    LatentReader(64).fill(batch, spans)
    row = 0
    for span in spans:
        assert batch[row : row + span.count].tobytes() == draw_span(span, 64, 0)[0].tobytes()
        row += span.count
    assert batch[: BLOCK_ROWS - 3].tobytes() == draw(1, 0, BLOCK_ROWS - 3, 64).tobytes()


def test_a_truncation_far_out_changes_nothing_worth_a_name() -> None:
    assert np.abs(draw_span(Span(3, 0, 1000, truncation=6.0), 64, 0)[0] - draw(3, 0, 1000, 64)).max() == 0


def test_slerp_goes_from_end_to_end_on_the_sphere() -> None:
    begin, end = draw(1, 0, 1, 100)[0], draw(2, 0, 1, 100)[0]
    rows = slerp(begin, end, 9)
    assert np.abs(rows[0] - begin).max() < 1e-6
    assert np.abs(rows[-1] - end).max() < 1e-6
    lengths = np.linalg.norm(rows, axis=1)
    assert np.abs(lengths - np.linspace(lengths[0], lengths[-1], 9)).max() < 1e-4
    angles = [float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for a, b in itertools.pairwise(rows)]
    assert max(angles) - min(angles) < 1e-5, "even steps"


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
def test_slerp_between_vectors_on_one_line_is_straight_and_finite(factor: float) -> None:
    begin = draw(1, 0, 1, 8)[0]
    rows = slerp(begin, begin * np.float32(factor), 5)
    assert np.isfinite(rows).all()
    assert np.abs(rows[2] - begin * (1 + factor) / 2).max() < 1e-6


def test_part_of_a_span_is_the_same_rows() -> None:
    span = Span(5, 100, 50)
    assert draw(5, 100, 50, 8)[20:30].tobytes() == draw(*_address(span.part(20, 10)), 8).tobytes()


def test_transform_follows_the_normal_distribution_function() -> None:
    magnitudes = np.unique(np.geomspace(1, 2**31 - 1, 4000).astype(np.uint32))
    words = np.concatenate([[0], magnitudes, magnitudes | np.uint32(1 << 31)]).astype(np.uint32)[None]
    out = np.empty(words.shape, np.float32)
    to_normal(words, out)
    for word, value in zip(words[0].tolist(), out[0].tolist(), strict=True):
        exact = -NormalDist().inv_cdf(((word & 0x7FFFFFFF) + 0.5) / 2**32)
        assert abs(abs(value) - exact) < 4e-6
        assert math.copysign(1, value) == (-1 if word >> 31 else 1)


def test_moments_are_those_of_the_normal_distribution() -> None:
    values = draw(3, 0, 20_000, 64).astype(np.float64).ravel()
    deviation = 1 / math.sqrt(len(values))  # of the mean
    assert abs(values.mean()) < 5 * deviation
    assert abs(values.var() - 1) < 5 * math.sqrt(2) * deviation
    assert abs((values**3).mean()) < 5 * math.sqrt(15) * deviation
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96) * deviation


def test_neighbouring_rows_and_seeds_are_uncorrelated() -> None:
    rows = draw(9, 0, 4000, 64)
    others = draw(10, 0, 4000, 64)
    bound = 5 / math.sqrt(rows[1:].size)
    assert abs(float((rows[1:] * rows[:-1]).mean())) < bound
    assert abs(float((rows * others).mean())) < bound


def _address(span: Span) -> tuple[int, int, int]:
    return span.seed, span.start, span.count


def test_truncations_that_callers_choose_fill_no_memory() -> None:
    """Issue: 155 bytes for each, without an end."""
    for number in range(1000):
        tail_beyond(1 + number / 1000)
    assert tail_beyond.cache_info().currsize <= 256
