"""TensorBoard's events of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

DESCRIPTORS = Path("/proc/self/fd")


@contextmanager
def events_of(folder: Path, step: int) -> Iterator[SummaryWriter]:
    """Writes events into ``folder``; what is there of ``step`` and later steps is void."""
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        # TensorBoard encodes every name as UTF-8, whatever the path is in.
        by_handle = not str(folder).isascii() and DESCRIPTORS.is_dir()
        with SummaryWriter(str(DESCRIPTORS / str(handle) if by_handle else folder), purge_step=step) as board:
            yield board
    finally:
        os.close(handle)
