"""All metrics of the server, on an injected registry. Histograms, never summaries, because their buckets can be added up over
replicas.

gRPC's and HTTP's metrics have the ecosystem's usual names; the service's own begin with ``digits_``. Children are looked up once,
not per request: a look-up costs more than the increment. ``call_metrics`` and ``model_metrics`` have them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    Metric,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Sample

from serve.observability.later import Later

SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHORT_SECONDS_BUCKETS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.1, 0.3, 1.0, 3.0)
IMAGES_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MODEL = ("model", "version")
BUCKET = (*MODEL, "bucket")
RPC = ("grpc_type", "grpc_service", "grpc_method")
HTTP = ("method", "route", "status")
# What asks for digits; a stream's time is its caller's affair.
MEASURED_METHODS = {"Generate", "Interpolate", "ModelInfer"}
MEASURED_ROUTES = re.compile(r"/v1/(digits|interpolation)|/v2/.*/infer")

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
    "model_batch_invariant": "1 when a digit's bits do not depend on its batch",
    "model_traffic_share": "Share of requests naming no version it answers",
}


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
        self.http_seconds = self._histogram(
            "http_server_request_duration_seconds",
            "Time from the request until its answer is made",
            HTTP,
            SECONDS_BUCKETS,
        )
        self.queue_wait = self._histogram(
            "digits_queue_wait_seconds", "Time from acceptance until the last row goes into a batch"
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
            "digits_expected_provider_info", "1 for what --provider asks for", ("provider",), registry=registry
        )
        self.padding = Counter("digits_padding_images", "Rows computed to fill a batch bucket", MODEL, registry=registry)
        self.dropped = Counter(
            "digits_dropped_images", "Rows that never reached the model, by reason", (*MODEL, "reason"), registry=registry
        )
        self.splits = Counter("digits_split_requests", "Requests cut over more than one batch", MODEL, registry=registry)
        self.run_failures = Counter(
            "digits_run_failures", "Runs that failed, and rows of them (repeated)", (*MODEL, "reason"), registry=registry
        )
        self.self_checks = Counter(
            "digits_self_checks", "Golden checks through the live batcher, by result", (*MODEL, "result"), registry=registry
        )
        self.drain_refusals = Counter(
            "digits_drain_refusals", "Calls refused because the process stops: another replica takes them", registry=registry
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
            "digits_provider_info", "1 for the execution provider in use", labels=(*MODEL, "provider", "digest")
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
        images = sum(sample.value for sample in _samples(self.images) if sample.name.endswith("_total"))
        calls = seconds = 0.0
        for sample in (each for histogram in (self.rpc_seconds, self.http_seconds) for each in _samples(histogram)):
            method, route = sample.labels.get("grpc_method"), sample.labels.get("route", "")
            if method in MEASURED_METHODS or MEASURED_ROUTES.fullmatch(route):
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


def _samples(metric: Counter | Histogram) -> Iterable[Sample]:
    return (sample for family in metric.collect() for sample in family.samples)


def new_registry() -> CollectorRegistry:
    """With the process's own metrics."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    collectors: list[Any] = [ProcessCollector, PlatformCollector, GCCollector]
    for collector in collectors:
        collector(registry=registry)
    return registry
