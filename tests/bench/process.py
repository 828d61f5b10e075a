"""A server under measurement: its process and its metrics."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from export import server_process


@dataclass(frozen=True)
class Started:
    """A running server's addresses and process."""

    target: str
    http: str
    process: psutil.Process

    def failed_calls(self) -> float:
        """Calls that the server failed (not those that their callers left); 0 of a server without metrics."""
        if not self.http:
            return 0.0
        text = self._metrics()  # once: calls go on ending
        good = sum(sample_sum(text, "grpc_server_handled_total", {"grpc_code": code}) for code in ("OK", "CANCELLED"))
        return sample_sum(text, "grpc_server_handled_total", {}) - good

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a sample over all children with these labels."""
        return sample_sum(self._metrics(), name, labels)

    def _metrics(self) -> str:
        with urllib.request.urlopen(f"http://{self.http}/metrics", timeout=10) as answer:
            return str(answer.read().decode())


def sample_sum(text: str, name: str, labels: Mapping[str, str]) -> float:
    """The sum of a sample's values in an exposition, over all children that have these labels."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


@contextmanager
def started(module: str, *arguments: str, checkout: Path | None = None) -> Iterator[Started]:
    """As ``export.server_process.started``, to be measured."""
    with server_process.started(module, *arguments, checkout=checkout) as server:
        yield Started(server.target, server.http, psutil.Process(server.pid))
