"""Our histogram shows what prometheus_client's own would, to the last character."""

from __future__ import annotations

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from serve.observability.histogram import Histogram

BOUNDS = (0.5, 1, 2.5)
LABELS = ("model", "version")


def of_the_library(observed: list[tuple[str, list[float]]]) -> str:
    registry = CollectorRegistry()
    histogram = prometheus_client.Histogram("taken_seconds", "Time", LABELS, buckets=BOUNDS, registry=registry)
    for model, values in observed:
        child = histogram.labels(model, "1")
        for value in values:
            child.observe(value)
    return "".join(line for line in generate_latest(registry).decode().splitlines(keepends=True) if "_created" not in line)


# Eighths, so that no order of adding them up rounds otherwise.
@given(st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 40).map(lambda eighths: eighths / 8), min_size=1))))
def test_it_shows_what_the_librarys_would(observed: list[tuple[str, list[float]]]) -> None:
    registry = CollectorRegistry()
    histogram = Histogram("taken_seconds", "Time", LABELS, BOUNDS, registry)
    for model, values in observed:
        histogram.labels(model, "1").observe(values)
    assert generate_latest(registry).decode() == of_the_library(observed)


def test_a_histogram_is_born_at_zero() -> None:
    registry = CollectorRegistry()
    Histogram("taken_seconds", "Time", LABELS, BOUNDS, registry).labels("mlp", "1")
    assert registry.get_sample_value("taken_seconds_count", {"model": "mlp", "version": "1"}) == 0
    assert registry.get_sample_value("taken_seconds_bucket", {"model": "mlp", "version": "1", "le": "+Inf"}) == 0
