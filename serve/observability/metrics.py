"""All metrics of the server, on an injected registry. Histograms, never summaries, because their buckets can be added up over
replicas.

gRPC's metrics have the ecosystem's usual names; the service's own begin with ``digits_``. Children are looked up once,
not per request: a look-up costs more than the increment.
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric
from prometheus_client.core import GaugeMetricFamily

SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHORT_SECONDS_BUCKETS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.1, 0.3, 1.0, 3.0)
IMAGES_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MODEL = ("model", "version")
BUCKET = (*MODEL, "bucket")
# What asks for digits, by whichever protocol; a stream's time is its caller's affair.
MEASURED_METHODS = {"Generate", "Interpolate", "ModelInfer", "/v1/digits", "/v1/interpolation"}
RPC = ("grpc_type", "grpc_service", "grpc_method")
MOST_LATER = 256
RUN_FAILURES = ("raised", "hung", "died")
SELF_CHECKS = ("passed", "breach", "failed", "skipped")

# Of a served version, each with digits_ before its name.
GAUGES = {
    "queue_images": "Images that wait",
    "queue_limit_images": "Images that may wait",
    "running_images": "Images in running batches",
    "instances_busy": "Instances running a batch",
    "instances_live": "Instances that can run a batch",
    "instances_wanted": "Instances that there should be",
    "model_ready": "1 when the model answers requests",
    "device_latents": "1 when the CUDA device draws the latents, and not the host",
    "model_traffic_share": "Share of requests naming no version it answers",
}

RecordT = TypeVar("RecordT")


class Served(NamedTuple):
    """A served version, with the values of ``GAUGES``."""

    model: str
    version: str
    provider: str
    digest: str
    gauges: Mapping[str, float]


class Metrics:
    """The server's metrics. Make one per registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.later: dict[tuple[str, ...], Later[Any]] = {}  # as many as there are children that they observe
        # Whoever knows them sets these: the served versions, and those that could not be loaded.
        self.read_served: Callable[[], Iterable[Served]] = tuple
        self.read_failed: Callable[[], Iterable[tuple[str, int]]] = tuple
        registry.register(self)  # the first to be asked, so that the others are up to date
        self.rpc_started = Counter("grpc_server_started", "RPCs started", RPC, registry=registry)
        self.rpc_handled = Counter("grpc_server_handled", "RPCs ended, by code", (*RPC, "grpc_code"), registry=registry)
        self.rpc_seconds = self._histogram(
            "grpc_server_handling_seconds", "Time from the RPC's start to its end", RPC, SECONDS_BUCKETS
        )
        self.queue_wait = self._histogram(
            "digits_queue_wait_seconds", "Time from acceptance until the first row goes into a batch"
        )
        self.assembly = self._histogram("digits_assembly_seconds", "Time to write one batch's latents")
        self.compute = self._histogram("digits_compute_seconds", "Time of one run of the model")
        self.encode = self._histogram("digits_encode_seconds", "Time to turn rows into the response's bytes")
        self.batch_images = self._histogram("digits_batch_images", "Images in one run of the model", buckets=IMAGES_BUCKETS)
        self.images = Counter("digits_images", "Images returned, by format", (*MODEL, "format"), registry=registry)
        self.bucket_runs = Counter("digits_bucket_runs", "Runs of the model, by rows computed", BUCKET, registry=registry)
        self.bucket_seconds = Counter(
            "digits_bucket_run_seconds", "Time of those runs, by rows up to a power of two", BUCKET, registry=registry
        )
        self.graph_captures = Counter(
            "digits_cuda_graph_captures", "CUDA graphs captured and checked, by result", (*MODEL, "result"), registry=registry
        )
        self.gpu_memory = Gauge("digits_gpu_memory_used_bytes", "Memory in use on the GPU, by all processes", registry=registry)
        self.gpu_memory_total = Gauge("digits_gpu_memory_total_bytes", "Memory of the GPU", registry=registry)
        self.expected_provider = Gauge(
            "digits_expected_provider", "1 for what --provider asks for", ("provider",), registry=registry
        )
        self.padding = Counter("digits_padding_images", "Rows computed to fill a batch bucket", MODEL, registry=registry)
        self.dropped = Counter(
            "digits_dropped_images", "Rows that never reached the model, by reason", (*MODEL, "reason"), registry=registry
        )
        self.splits = Counter("digits_split_requests", "Requests cut over more than one batch", MODEL, registry=registry)
        self.run_failures = Counter(
            "digits_run_failures", "Runs that raised, hung or lost their thread", (*MODEL, "reason"), registry=registry
        )
        self.self_checks = Counter(
            "digits_self_checks", "Golden checks through the live batcher, by result", (*MODEL, "result"), registry=registry
        )
        self.drain_refusals = Counter(
            "digits_drain_refusals", "Calls refused because the process stops: another replica takes them", registry=registry
        )
        self.drained = Counter(
            "digits_drain_leftover_requests", "Requests cancelled because a drain ran out of time", registry=registry
        )
        self.model_loads = Counter(
            "digits_model_loads", "Attempts to load a version, by result", ("model", "result"), registry=registry
        )
        self.access_denied = Counter("digits_access_denied", "Calls kept out, by reason", ("reason",), registry=registry)
        self.access_reloads = Counter(
            "digits_access_reloads", "Certificates and tokens read anew, by result", ("what", "result"), registry=registry
        )
        self.serving_file_reads = Counter(
            "digits_serving_file_reads", "Changes of the desired state's file taken up, by result", ("result",), registry=registry
        )
        self.background_failures = Counter(
            "digits_background_failures", "Rounds of a background task that raised", ("task",), registry=registry
        )
        self.device = Info("digits_device", "What models run on: the CUDA device, or the CPU", registry=registry)
        self.build = Info("digits_build", "Versions of the server and its runtime", registry=registry)
        self.serving_file_reads.labels("failed")  # born at 0: what Prometheus first sees at 1 has not increased

    def collect(self) -> list[Metric]:
        """The models' gauges, for the registry; before it asks the others, what was kept for later is observed."""
        for records in self.later.values():
            records.flush()
        gauges = {name: GaugeMetricFamily(f"digits_{name}", text, labels=MODEL) for name, text in GAUGES.items()}
        provider = GaugeMetricFamily(
            "digits_provider", "1 for the execution provider in use", labels=(*MODEL, "provider", "digest")
        )
        for each in self.read_served():
            for name, gauge in gauges.items():
                gauge.add_metric(each[:2], float(each.gauges[name]))
            provider.add_metric(each[:4], 1.0)
        failed = GaugeMetricFamily(
            "digits_model_failed", "1 for a version that should be served and could not be loaded", labels=MODEL
        )
        for model, version in self.read_failed():
            failed.add_metric((model, str(version)), 1.0)
        loaded = GaugeMetricFamily("digits_models_loaded", "Model versions loaded", len(provider.samples))
        return [*gauges.values(), provider, loaded, failed]

    def totals(self) -> dict[str, float]:
        """Counters since the start, from whose differences a reader has rates: images, and answered calls with their time."""
        self.collect()
        images = sum(
            sample.value for family in self.images.collect() for sample in family.samples if sample.name.endswith("_total")
        )
        calls = seconds = 0.0
        for family in self.rpc_seconds.collect():
            for sample in family.samples:
                if sample.labels["grpc_method"] in MEASURED_METHODS:
                    calls += sample.value if sample.name.endswith("_count") else 0
                    seconds += sample.value if sample.name.endswith("_sum") else 0
        return {"images_total": images, "calls_total": calls, "seconds_total": seconds}

    def by_model(self) -> dict[tuple[str, str], dict[str, float]]:
        """(model, version) → its samples, summed over their further labels, histograms' buckets left out."""
        sums: dict[tuple[str, str], dict[str, float]] = {}
        for family in self.registry.collect():
            for sample in family.samples:
                labels = sample.labels
                if "model" in labels and "version" in labels and "le" not in labels:
                    own = sums.setdefault((labels["model"], labels["version"]), {})
                    own[sample.name] = own.get(sample.name, 0.0) + sample.value
        return sums

    def _histogram(
        self, name: str, text: str, labels: Sequence[str] = MODEL, buckets: Sequence[float] = SHORT_SECONDS_BUCKETS
    ) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class Later(Generic[RecordT]):
    """Records kept until somebody reads the metrics, or there are many: then they are observed together.

    Right after a request the code that observes is cold: there it costs three times what it costs in a row of hundreds.
    Safe to call from any thread.
    """

    def __init__(self, observe: Callable[[Sequence[RecordT]], None]) -> None:
        self._records: deque[RecordT] = deque()
        self._flushing = threading.Lock()
        self._observe = observe

    def add(self, record: RecordT) -> None:
        self._records.append(record)
        if len(self._records) >= MOST_LATER:
            self.flush()

    def flush(self) -> None:
        """Observe what is kept."""
        with self._flushing:
            records = [self._records.popleft() for _ in range(len(self._records))]
        if records:
            self._observe(records)


class RpcMetrics:
    """One method's children: ``started`` and ``ended`` once for each call."""

    def __init__(self, metrics: Metrics, kind: str, service: str, method: str) -> None:
        labels = (kind, service, method)
        self.name = f"{service}/{method}"
        seconds = metrics.rpc_seconds.labels(*labels).observe
        begun = metrics.rpc_started.labels(*labels).inc
        handled = cache(lambda code: metrics.rpc_handled.labels(*labels, code).inc)

        def observe(records: Sequence[tuple[str, float]]) -> None:
            for code, calls in Tally(code for code, _ in records).items():
                handled(code)(calls)
            for _, taken_s in records:
                seconds(taken_s)

        def count(records: Sequence[None]) -> None:
            begun(len(records))

        self._started = metrics.later.setdefault(("started", *labels), Later(count))
        self._ended = metrics.later.setdefault(("ended", *labels), Later(observe))

    def started(self) -> None:
        self._started.add(None)

    def ended(self, code: str, seconds: float) -> None:
        self._ended.add((code, seconds))


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
