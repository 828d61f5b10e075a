"""A training step as a CUDA graph: captured once, replayed for every batch of the usual size.

At these sizes a step is hundreds of kernels that take microseconds each, and launching them one by one takes longer than
they run. A smaller last batch of an epoch does not fit the graph and runs without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# PyTorch asks for a few steps before a capture, off the default stream: optimizers make their state, cuDNN its choices.
WARM_UP_STEPS = 3

Batch = tuple[Tensor, ...]  # images float32 (batch, 1, 28, 28), and for a conditional preset their labels int64 (batch,)
Step = Callable[[Batch], Tensor]


class Recording(Protocol):
    """Something that can record what a function does to the device, and do it again."""

    def warm_up(self, step: Step, real: Batch) -> Tensor: ...
    def record(self, step: Callable[[], None]) -> None: ...
    def replay(self) -> None: ...


class CudaRecording:
    """A CUDA graph. ``noise`` is the generator that the step draws from."""

    def __init__(self, noise: torch.Generator) -> None:
        self._graph = torch.cuda.CUDAGraph()
        if hasattr(self._graph, "register_generator_state"):  # elsewhere the default generator alone can be captured
            self._graph.register_generator_state(noise)
        self._side = torch.cuda.Stream()

    def warm_up(self, step: Step, real: Batch) -> Tensor:
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            losses = step(real)
        torch.cuda.current_stream().wait_stream(self._side)
        return losses

    def record(self, step: Callable[[], None]) -> None:
        with torch.cuda.graph(self._graph):
            step()

    def replay(self) -> None:
        self._graph.replay()


class CapturedStep:
    """``step`` on batches shaped like ``example``, by replay once it has been warmed up. The result is overwritten by
    the next call."""

    def __init__(self, step: Step, example: Batch, recording: Recording) -> None:
        self._step = step
        self._recording = recording
        self._real = tuple(torch.empty_like(part) for part in example)
        self._warm = 0
        self._losses: Tensor | None = None

    def __call__(self, real: Batch) -> Tensor:
        if real[0].shape != self._real[0].shape:
            return self._step(real)
        if self._warm < WARM_UP_STEPS:
            self._warm += 1
            return self._recording.warm_up(self._step, real)
        for own, given in zip(self._real, real, strict=True):
            own.copy_(given)
        if self._losses is None:
            self._recording.record(self._record)  # records and does not execute
        self._recording.replay()
        assert self._losses is not None
        return self._losses

    def _record(self) -> None:
        self._losses = self._step(self._real)
