"""Measures the time of a training step, beside the notebook's own times: ``make bench-train``.

It runs the training loop's own step on random images and needs no data set.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import create_run
from train.config import TrainConfig
from train.device import describe
from train.presets import PRESETS
from train.trainer.capture import Batch, CudaRecording
from train.trainer.loop import Trainer

WARM_UP_STEPS = 5
STEPS_BETWEEN_LOOKS = 5  # a look waits for the device
NOTEBOOK = "the notebook: 15 s per 500 mlp steps on its GPU, 90 s on its CPU"


def milliseconds_per_step(
    config: TrainConfig,
    device: torch.device,
    seconds: float,
    capture: bool = False,
    compiled: Mapping[str, Any] | None = None,
) -> float:
    """Mean time of a step over at least ``seconds`` on batches of the config's size; ``capture``: as a CUDA graph.

    ``compiled``: with both networks by ``torch.compile`` and these options.
    """
    low, high = config.pixel_range
    examples: Batch = (torch.rand(config.batch_size, 1, 28, 28, device=device) * (high - low) + low,)
    if config.conditional:
        examples += (torch.arange(config.batch_size, device=device) % config.labels,)
    with tempfile.TemporaryDirectory() as scratch:
        recording = CudaRecording if capture else None
        trainer = Trainer(create_run(Path(scratch), config, {}), examples, device, recording=recording)
        if compiled is not None:
            trainer.update.compile_networks(**compiled)

        def steps_taken(count: int) -> torch.Tensor:
            for _ in range(count):
                torch.compiler.cudagraph_mark_step_begin()  # or a compiled network's graphs take this step for part of the last
                losses = trainer.take_step(examples)
                trainer.step += 1  # penalties come every few steps
            return losses

        steps_taken(WARM_UP_STEPS)
        steps = 0
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            losses = steps_taken(STEPS_BETWEEN_LOOKS)
            losses.sum().item()  # waits for the device
            steps += STEPS_BETWEEN_LOOKS
        return (time.perf_counter() - started) / steps * 1000


def measure(device: torch.device, seconds: float) -> dict[str, float]:
    """Milliseconds per step of each preset; on CUDA also captured, and in the other precisions."""
    figures = {}
    for name, config in PRESETS.items():
        figures[name] = milliseconds_per_step(config, device, seconds)
        if device.type == "cuda":
            for precision in ("fp32", "tf32", "bf16"):
                changed = config.replace({"precision": precision})
                figures[f"{name} captured {precision}"] = milliseconds_per_step(changed, device, seconds, capture=True)
    return figures


def table(device: torch.device, seconds: float) -> str:
    machine = describe(device)
    lines = [
        f"{machine['device']} ({machine['device_name']}), {machine['cpu_threads']} CPU threads, torch {machine['torch']}",
        "preset                ms per step  s per 50 steps  s per 500 steps",
    ]
    for name, per_step in measure(device, seconds).items():
        lines.append(f"{name:20s} {per_step:12.3f}  {per_step * 0.05:14.3f}  {per_step * 0.5:15.3f}")
    return "\n".join([*lines, NOTEBOOK])
