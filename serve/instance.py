"""One instance: a thread that makes its own model and runs batches through it until there are no more.

A CUDA session must stay with one thread, so the thread makes, uses and drops it. Which batch comes next and what becomes
of the rows is the batcher's affair.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serve.errors import EngineError
from serve.fair_queue import Chunk
from serve.latents import LatentReader

log = logging.getLogger(__name__)

INSTANCE_THREAD = "model-instance"  # how the threads' names begin


class Rows(Protocol):
    """What a run returns: rows of pixels, of images where they were asked for, of labels where the model takes them, and how
    many rows were computed."""

    @property
    def pixels(self) -> NDArray[np.uint8]: ...
    @property
    def images(self) -> NDArray[np.float32] | None: ...
    @property
    def labels(self) -> NDArray[np.int64] | None: ...
    @property
    def bucket(self) -> int: ...


class Runner(Protocol):
    """A loaded model, as an instance uses it: its inputs are written in place, then so many rows are run."""

    def latents(self, count: int) -> NDArray[np.float32]: ...
    def labels(self, count: int) -> NDArray[np.int64] | None: ...
    def run(self, count: int, want_images: bool = False) -> Rows: ...


class Observer(Protocol):
    """Where the figures go; called from the instances' threads, once per batch or drop."""

    def batch(self, images: int, bucket: int, assembly_s: float, compute_s: float) -> None: ...
    def split(self, chunks: int) -> None: ...
    def dropped(self, images: int, reason: str) -> None: ...
    def failed(self, reason: str) -> None: ...


class Dispatcher(Protocol):
    """The batcher, as an instance knows it."""

    def next_batch(self, instance: Instance) -> list[Chunk] | None: ...
    def end_batch(self, instance: Instance, chunks: Sequence[Chunk], rows: Rows | None, compute_s: float) -> None: ...
    def add(self, instance: Instance) -> None: ...
    def lose(self, instance: Instance, error: EngineError, reason: str) -> None: ...


class Instance:
    """A thread and its place in the batcher. All but the thread's own doings are under the batcher's ``lock``."""

    def __init__(
        self, number: int, lock: threading.Lock, reader: LatentReader, make_runner: Callable[[], Runner], observer: Observer
    ) -> None:
        self.number = number
        self.wake = threading.Condition(lock)
        self.batch: list[Chunk] = []
        self.busy_since: float | None = None
        self.rests_until = 0.0  # time.monotonic() before which it takes nothing but a full batch
        self.lost = False
        self._make_runner = make_runner
        self._observer = observer
        self._reader = reader
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self.thread: threading.Thread

    def start(self, dispatcher: Dispatcher) -> None:
        """Start the thread; ``wait_started`` tells how it went."""
        name = f"{INSTANCE_THREAD}-{self.number}"
        self.thread = threading.Thread(target=self._live, args=(dispatcher,), name=name, daemon=True)
        self.thread.start()

    def wait_started(self) -> None:
        """Wait until the model is there. Raises what making it raised."""
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def _live(self, dispatcher: Dispatcher) -> None:
        try:
            runner = self._make_runner()
        except BaseException as error:
            self._failure = error
            self._started.set()
            return
        dispatcher.add(self)
        self._started.set()
        try:
            while (chunks := dispatcher.next_batch(self)) is not None:
                self._run(dispatcher, runner, chunks)
        except BaseException:  # a thread must not die in silence with its callers waiting
            log.exception("instance %d died", self.number)
            dispatcher.lose(self, EngineError("an instance died"), "died")

    def _run(self, dispatcher: Dispatcher, runner: Runner, chunks: list[Chunk]) -> None:
        images = sum(chunk.count for chunk in chunks)
        started = time.perf_counter()
        spans = [chunk.ticket.span.part(chunk.first, chunk.count) for chunk in chunks]
        self._reader.fill(runner.latents(images), spans, runner.labels(images))
        assembled = time.perf_counter()
        try:
            rows = runner.run(images, any(chunk.ticket.want_images for chunk in chunks))
        except Exception:
            log.exception("a run of %d images failed", images)
            self._observer.failed("raised")
            dispatcher.end_batch(self, chunks, None, 0.0)
            return
        computed = time.perf_counter()
        dispatcher.end_batch(self, chunks, rows, computed - assembled)
        self._observer.batch(images, rows.bucket, assembled - started, computed - assembled)
        if splits := sum(chunk.count < chunk.ticket.span.count and chunk.first == 0 for chunk in chunks):
            self._observer.split(splits)
