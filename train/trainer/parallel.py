"""Training by several processes, one per GPU, started by ``torchrun``: each takes its part of every batch.

    torchrun --nproc-per-node 4 -m train dcgan

``batch_size`` is that of each process. The losses equal those of one process with the whole batch:
gradients are averaged (DistributedDataParallel), BatchNorm's statistics are taken over all processes, and every process
draws the whole batch's noise and uses its own rows.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process's rank among all processes. A single process does not communicate."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def mine(self, rows: Tensor) -> Tensor:
        """This process's rows of a whole batch; what does not divide evenly is left out."""
        if self.world == 1:
            return rows
        share = len(rows) // self.world
        return rows[self.rank * share : (self.rank + 1) * share]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.world > 1:
            distributed.all_reduce(values)
            values /= self.world
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true in any process."""
        flags = torch.tensor(float(flag), device=device)
        distributed.all_reduce(flags)
        return bool(flags > 0)

    def agree(self, value: Any) -> Any:
        """The first process's value, in all processes."""
        if self.world == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as it is to be trained: its gradients are averaged over the processes."""
        if self.world == 1:
            return network
        # Every process computes the same running statistics: there is nothing to broadcast, and doing so between two
        # forward passes would break the backward pass.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is not known to PyTorch 2.11
            return DistributedDataParallel(network, broadcast_buffers=False)

    def sync_batch_norm(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network with BatchNorm over all processes; parameters, buffers and their names stay."""
        if self.world == 1:
            return network
        if device.type == "cuda":
            synced: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
            return synced
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = SyncedBatchNorm  # PyTorch's own is for CUDA alone
        return network


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes if torchrun started this one; leave them at the end."""
    if "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    if device.type == "cuda":
        distributed.init_process_group("nccl", device_id=device)  # or NCCL guesses the device at its first call
    else:
        distributed.init_process_group("gloo")
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def leave(code: int) -> None:
    """End this process with ``code``, if it is one of several.

    DistributedDataParallel keeps its group, and so gloo's threads, beyond ``destroy_process_group``; one of them at work
    while Python winds down aborts the process, with all that it had to do done. One of several ends without winding down.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def own_device(device: torch.device) -> torch.device:
    """Of several GPUs, the one that belongs to this process by torchrun's count."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


class _Sum(torch.autograd.Function):
    """The sum over all processes, and as its gradient the sum of theirs."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm (Ioffe & Szegedy 2015) whose mean and variance are taken over all processes; all have as many rows."""

    def _check_input_dim(self, input: Tensor) -> None:  # the parent's name
        pass

    def forward(self, input: Tensor) -> Tensor:  # the parent's name
        """(batch, channels) or (batch, channels, height, width), and the same out."""
        if not self.training:
            result: Tensor = super().forward(input)
            return result
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        world = distributed.get_world_size()
        count = input.numel() // input.size(1) * world
        mean = _Sum.apply(input.mean(axes)) / world
        centred = input - mean.view(shape)
        variance = _Sum.apply(centred.square().mean(axes)) / world
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        normal: Tensor = centred * torch.rsqrt(variance + self.eps).view(shape)
        return normal * self.weight.view(shape) + self.bias.view(shape) if self.affine else normal
