"""Histograms that take many values at once: prometheus_client's own takes one at a time, at a microsecond each."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Histogram(Collector):
    """A histogram for each combination of its labels' values. Safe to use from any thread."""

    def __init__(
        self, name: str, text: str, label_names: Sequence[str], bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        """``bounds``: the buckets' upper ones, inclusive and ascending; what is above all of them is counted as well."""
        self._family = (name, text, label_names)
        self._bounds = (*bounds, math.inf)
        self._children: dict[tuple[str, ...], Child] = {}
        registry.register(self)

    def labels(self, *values: str) -> Child:
        """The histogram of these values of the labels."""
        return self._children.setdefault(values, Child(self._bounds))

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """For the registry, which wants to know the names before there are samples."""
        name, text, label_names = self._family
        return [HistogramMetricFamily(name, text, labels=label_names)]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        [family] = self.describe()
        for values, child in list(self._children.items()):
            family.add_metric(values, *child.seen())
        return [family]


class Child:
    """One histogram."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = np.array(bounds)
        self._counts = np.zeros(len(bounds), np.int64)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, values: Sequence[float]) -> None:
        """Count all of them."""
        counts = np.bincount(self._bounds.searchsorted(values), minlength=len(self._bounds))
        total = sum(values)
        with self._lock:
            self._counts += counts
            self._sum += total

    def seen(self) -> tuple[list[tuple[str, float]], float]:
        """Each bucket's bound, as Prometheus writes it, with how many values are not above it; and the sum of the values."""
        with self._lock:
            cumulative, total = self._counts.cumsum().tolist(), self._sum
        return list(zip(map(floatToGoString, self._bounds.tolist()), cumulative, strict=True)), total
