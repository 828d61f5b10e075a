"""Prints measured figures beside their targets, and writes them as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serve.engine.onnx_runtime import ort
from serve.engine.resources import usable_cores

ENOUGH = 0.8  # the share of rounds that must meet a target: four of five


@dataclass(frozen=True)
class Target:
    """A figure, measured once or in rounds, and its bound; ``at_most`` says on which side of it the figure has to be."""

    name: str
    value: float | Sequence[float]
    bound: float
    at_most: bool = False

    @property
    def values(self) -> Sequence[float]:
        return (self.value,) if isinstance(self.value, float | int) else self.value

    @property
    def met(self) -> bool:
        """Whether four of five rounds meet it."""
        good = sum(value <= self.bound if self.at_most else value >= self.bound for value in self.values)
        return good >= ENOUGH * len(self.values)


def print_targets(targets: list[Target]) -> None:
    """A line for each."""
    print(f"{'target':60s} {'measured':>26s} {'bound':>8s}")
    for target in targets:
        sign = "≤" if target.at_most else "≥"
        print(f"{target.name:60s} {spread(target.values):>26s} {sign}{target.bound:7.2f}  {'met' if target.met else 'MISSED'}")


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and range where there are several."""
    median = f"{statistics.median(values):,.{digits}f}"
    return median if len(values) == 1 else f"{median} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def write(path: Path, figures: dict[str, Any], targets: list[Target]) -> None:
    """One JSON object: when, where, ``figures``, and how the targets stand."""
    listed = [asdict(target) | {"met": target.met} for target in targets]
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **figures,
        "targets": listed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=asdict) + "\n", encoding="utf-8")
    print(f"written: {path}")


def machine() -> dict[str, Any]:
    """Processor and versions."""
    cpu = "unknown CPU"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    packages = ("grpcio", "numpy", "uvloop")
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "python": platform.python_version(),
        # ONNX Runtime's distribution is called otherwise on some platforms.
        "versions": {"onnxruntime": ort.__version__} | {package: version(package) for package in packages},
    }


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)


def runs_per_second(run: Callable[[], Any], seconds: float = 1.0) -> float:
    """How often ``run`` can be called in a second, over ``seconds``."""
    runs, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        run()
        runs += 1
    return runs / (time.perf_counter() - begun)
