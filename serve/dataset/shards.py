"""Writes a shard of a data set: several threads generate its digits, and the file is written atomically."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.dataset.filter import Judge, filtered_digits
from serve.dataset.header import Dataset, agree
from serve.engine.cuda_engine import make_checked_engine
from serve.engine.provider import EngineOptions
from serve.engine.session import Engine
from serve.files import remove_abandoned, replacing
from serve.models.repository import Bundle

BATCH = 64  # rows of one run; index 0 of the stream begins one
TASK = 1024  # rows that a thread makes at once, and of one run on CUDA, which wants many
PROGRESS_EVERY_S = 5.0


class Digits(NamedTuple):
    """Pixels uint8 (n, height, width), and of a filtered data set the digits' indices in the stream, (n,)."""

    pixels: NDArray[np.uint8]
    indices: NDArray[np.int64] | None


@dataclass(frozen=True)
class Generator:
    """Makes the digits, by ``threads`` runs side by side: on one engine, or on CUDA on one each. ``judge`` filters them."""

    bundle: Bundle
    options: EngineOptions
    threads: int
    judge: Judge | None = None

    def engine(self) -> Engine:
        """An engine that has passed its golden check where it will run. Raises ProviderError or BundleError."""
        return make_checked_engine(self.bundle.model, self.bundle.manifest, self.options, self._rows_of_a_run)

    @property
    def _on_cuda(self) -> bool:
        return self.options.provider == "cuda"

    @property
    def _rows_of_a_run(self) -> int:
        return TASK if self._on_cuda else BATCH

    def digits(self, dataset: Dataset, first: int, count: int) -> Iterator[Digits]:
        """The digits ``first`` … of the data set's stream in order, some at a time."""
        own = threading.local()
        shared = self.engine()  # also before the first thread starts, so that a model that is off writes nothing
        engines = ExitStack()
        engines.callback(shared.close)

        def task(begin: int) -> Digits:
            if not hasattr(own, "engine"):
                own.engine = shared
                if self._on_cuda:  # an engine is run by the thread that made it
                    own.engine = self.engine()
                    engines.callback(own.engine.close)
            wanted = slice(max(0, first - begin), first + count - begin)
            if self.judge is None:
                return Digits(own.engine.compute(*dataset.rows(begin, TASK))["pixels"][wanted], None)
            pixels, indices = filtered_digits(dataset, own.engine, self.judge, range(begin, begin + TASK), BATCH)
            return Digits(pixels[wanted], indices[wanted])

        # What is refused in a block is made again together.
        aligned = self._rows_of_a_run if self.judge is None else TASK
        begins = range(first - first % aligned, first + count, TASK)
        with engines, ThreadPoolExecutor(self.threads) as pool:
            ahead = 2 * self.threads  # so much of the result is held in memory, whatever the shard's size
            for position in range(0, len(begins), ahead):
                yield from pool.map(task, begins[position : position + ahead])


def write_shard(folder: Path, dataset: Dataset, shard: int, generator: Generator) -> Path:
    """Write one shard, whole or not at all; raw uint8 pixels, row-major. Raises SettingsError when the folder is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    agree(folder, dataset)
    path = dataset.shard_file(folder, shard)
    first, count = dataset.shard_range(shard)
    # The pixels last: where they are, the shard is whole.
    targets = [dataset.indices_file(folder, shard), path] if dataset.filter else [path]
    if path.exists() and path.stat().st_size == count * dataset.height * dataset.width:
        for each in targets:
            remove_abandoned(each)
        return path
    with replacing(targets) as files:
        for digits in _with_progress(generator.digits(dataset, first, count), count):
            files[-1].write(digits.pixels.data)
            if digits.indices is not None:
                files[0].write(digits.indices.astype("<i8").data)
    return path


def _with_progress(digits: Iterator[Digits], count: int) -> Iterator[Digits]:
    """The same digits, ``count`` in all; a line on stderr says every few seconds how far they have come."""
    begun = said = time.monotonic()
    done = 0
    for some in digits:
        yield some
        done += len(some.pixels)
        now = time.monotonic()
        if now - said >= PROGRESS_EVERY_S and done < count:
            left_s = (now - begun) / done * (count - done)
            print(f"{done:,} of {count:,} digits, about {left_s:,.0f} s left", file=sys.stderr, flush=True)
            said = now
