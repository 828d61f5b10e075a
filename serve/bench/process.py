"""A server under test as a process: started with its own command line, stopped at the end of the ``with`` block."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

START_LIMIT_S = 300.0
TAIL = 2000  # characters of a log


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
    """Run ``python -m module`` until the block is left, of another ``checkout`` if one is named.

    Raises RuntimeError with the last of what it said when it does not start in time.
    """
    command = [sys.executable, "-m", module, *arguments]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=checkout) as process,
    ):
        too_late = threading.Timer(START_LIMIT_S, process.kill)
        too_late.start()
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if line.startswith("next"):
                    break
            address = re.search(r"^gRPC +(\S+)$", said, re.MULTILINE)
            http = re.search(r"^HTTP +http://(\S+)/metrics", said, re.MULTILINE)
            too_late.cancel()
            if address is None:
                process.wait()
                errors.seek(0)
                raise RuntimeError(f"{' '.join(command)} did not start: {errors.read()[-TAIL:].strip()}")
            yield Started(address[1], http[1] if http else "", psutil.Process(process.pid))
        finally:
            too_late.cancel()
            process.terminate()
