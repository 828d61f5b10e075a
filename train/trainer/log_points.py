"""The losses of a run: summed from step to step, reported at log points, written as ``losses.npy`` and drawn."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.checkpoint import Run
from train.pictures import plot_losses, save_losses

PLOT_EVERY_S = 10.0

Point = tuple[int, float, float]  # a batch's number counted from 0, the generator's and the discriminator's loss


class LogPoints:
    """A run's log points so far, and what has been summed since the last one."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run = run
        self._device = device
        self._plotted_at = 0.0  # time.monotonic()
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # generator, discriminator since the last log point
        self.latest: Tensor | None = None  # the last step's
        self.points: list[Point] = []

    def count(self, latest: Tensor) -> None:
        """Add a step's losses, float64 (2,), to the sum."""
        self.latest = latest
        self.sums += latest

    def add(self, number: int) -> Point:
        """Make batch ``number``, the last that was counted, a log point."""
        self.points.append(self._reported(number))
        self.sums.zero_()
        return self.points[-1]

    def closing(self, step: int) -> list[Point]:
        """The last of ``step`` batches as a log point, unless it is one.

        It is no part of the state: a run that is made longer goes on as if it had been so from the beginning.
        """
        if step == 0 or (self.points and self.points[-1][0] == step - 1):
            return []
        return [self._reported(step - 1)]

    def write(self, plot: bool = False, closing: list[Point] | None = None) -> None:
        """Write the losses so far, and draw them if that is not too long ago: a plot takes as long as several steps."""
        points = [*self.points, *(closing or [])]
        if not points:
            return
        losses = np.array(points, dtype=np.float64)
        save_losses(losses, self._run.folder)
        if plot or time.monotonic() - self._plotted_at > PLOT_EVERY_S:
            plot_losses(losses, self._run.folder)
            self._plotted_at = time.monotonic()

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint."""
        latest = {} if self.latest is None else {"latest": self.latest}
        return {"sums": self.sums, **latest, "marks": torch.tensor(self.points, dtype=torch.float64).reshape(-1, 3)}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.sums = state["sums"].to(self._device)
        self.latest = state["latest"].to(self._device) if "latest" in state else None  # checkpoints of before 2026-12
        self.points = [(int(step), generator, discriminator) for step, generator, discriminator in state["marks"].tolist()]

    def _reported(self, number: int) -> Point:
        """Batch ``number``'s own losses, or their mean over the batches after the last log point's."""
        batches = number - (self.points[-1][0] if self.points else -1)
        own = self.latest if self._run.config.reported_loss == "last" else None
        generator, discriminator = (self.sums / max(1, batches) if own is None else own).tolist()
        return number, generator, discriminator
