"""How fast a training step is here, beside the notebook's own times: ``make bench-train``.

The step is the loop's own, on random images: no data set is needed to time it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from train.checkpoint import create_run
from train.config import PRESETS, TrainConfig
from train.device import describe
from train.loop import Trainer

WARM_UP_STEPS = 5
NOTEBOOK = "the notebook: 15 s per 500 mlp steps on its GPU, 90 s on its CPU"


def milliseconds_per_step(config: TrainConfig, device: torch.device, seconds: float) -> float:
    """Mean time of ``train_step`` over at least ``seconds`` on batches of the config's size."""
    low, high = config.pixel_range
    images = torch.rand(config.batch_size, 1, 28, 28, device=device) * (high - low) + low
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(create_run(Path(scratch), config, {}), images, device)
        for _ in range(WARM_UP_STEPS):
            trainer.train_step(images)
        steps = 0
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            trainer.train_step(images).sum().item()  # waits for the device
            steps += 1
        return (time.perf_counter() - started) / steps * 1000


def table(device: torch.device, seconds: float) -> str:
    machine = describe(device)
    lines = [
        f"{machine['device']} ({machine['device_name']}), {machine['cpu_threads']} CPU threads, torch {machine['torch']}",
        "preset     ms per step  s per 50 steps  s per 500 steps",
    ]
    for name, config in PRESETS.items():
        per_step = milliseconds_per_step(config, device, seconds)
        lines.append(f"{name:10s} {per_step:11.2f}  {per_step * 0.05:14.2f}  {per_step * 0.5:15.2f}")
    return "\n".join([*lines, NOTEBOOK])
