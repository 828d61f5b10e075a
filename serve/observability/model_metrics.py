"""The metrics of a model version, which its batcher and its calls report to."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Sequence
from functools import cache

from prometheus_client import Counter

from serve.observability.later import Later
from serve.observability.metrics import Metrics

RUN_FAILURES = ("raised", "hung", "died", "repeated")
SELF_CHECKS = ("passed", "breach", "failed", "skipped")


class ModelMetrics:
    """One model version's children, and the batcher's observer."""

    def __init__(self, metrics: Metrics, model: str, version: int) -> None:
        labels = (model, str(version))
        queue_wait = metrics.queue_wait.labels(*labels).observe
        encode = metrics.encode.labels(*labels).observe
        images_in = cache(lambda name: metrics.images.labels(*labels, name).inc)

        def observe_answers(records: Sequence[tuple[str, int, float, float]]) -> None:
            totals: Tally[str] = Tally()
            for encoding, images, queue_s, encode_s in records:
                queue_wait(queue_s)
                encode(encode_s)
                totals[encoding] += images
            for encoding, images in totals.items():
                images_in(encoding)(images)

        assembly = metrics.assembly.labels(*labels).observe
        compute = metrics.compute.labels(*labels).observe
        batch_images = metrics.batch_images.labels(*labels).observe
        padding = metrics.padding.labels(*labels).inc

        @cache
        def bucket_counters(bucket: int) -> tuple[Callable[[float], None], Callable[[float], None]]:
            name = str(1 << (bucket - 1).bit_length())
            return metrics.bucket_runs.labels(*labels, name).inc, metrics.bucket_seconds.labels(*labels, name).inc

        def observe_batches(records: Sequence[tuple[int, int, float, float]]) -> None:
            padding(sum(bucket - images for images, bucket, _, _ in records))
            for images, bucket, assembly_s, compute_s in records:
                batch_images(images)
                assembly(assembly_s)
                compute(compute_s)
                count, seconds = bucket_counters(bucket)
                count(1)
                seconds(compute_s)

        # A version that is loaded anew goes on with the records of the one before it, which may still be answering.
        self._answers = metrics.later.setdefault(("answers", *labels), Later(observe_answers))
        self._batches = metrics.later.setdefault(("batches", *labels), Later(observe_batches))
        self._metrics, self._labels = metrics, labels
        self._splits = metrics.splits.labels(*labels).inc
        for reason in RUN_FAILURES:
            metrics.run_failures.labels(*labels, reason)  # born at 0
        for result in SELF_CHECKS:
            self.self_checks(result)

    def answer(self, encoding: str, images: int, queue_s: float, encode_s: float) -> None:
        """Rows of a request are encoded."""
        self._answers.add((encoding, images, queue_s, encode_s))

    def batch(self, images: int, bucket: int, assembly_s: float, compute_s: float) -> None:
        self._batches.add((images, bucket, assembly_s, compute_s))

    def graph_capture(self, result: str) -> None:
        self._metrics.graph_captures.labels(*self._labels, result).inc()

    def split(self, chunks: int) -> None:
        self._splits(chunks)

    def dropped(self, images: int, reason: str) -> None:
        self._metrics.dropped.labels(*self._labels, reason).inc(images)

    def failed(self, reason: str) -> None:
        self._metrics.run_failures.labels(*self._labels, reason).inc()

    def self_checks(self, result: str) -> Counter:
        return self._metrics.self_checks.labels(*self._labels, result)
