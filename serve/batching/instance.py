"""An instance: a thread that runs batches through an engine of its own until there are no more.

A CUDA session must stay in one thread, so the thread creates, uses and drops its engine. The batcher decides which batch is next
and what happens with the rows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from serve.batching.ticket import Arrays, Chunk
from serve.errors import DeviceLostError
from serve.latents import LatentReader, Span

log = logging.getLogger(__name__)

INSTANCE_THREAD = "instance"  # how the threads' names begin


class Engine(Protocol):
    """A loaded model, as an instance uses it (``serve.engine.session.Engine``)."""

    def assemble(self, reader: LatentReader, spans: Sequence[Span], count: int) -> dict[str, NDArray[Any]]: ...
    def run(self, feeds: Arrays, outputs: Sequence[str]) -> Arrays: ...
    def bucket(self, count: int) -> int: ...
    def close(self) -> None: ...


class Observer(Protocol):
    """Receives the figures; called from the instances' threads, once per batch or drop."""

    def batch(self, images: int, bucket: int, assembly_s: float, compute_s: float) -> None: ...
    def split(self, chunks: int) -> None: ...
    def dropped(self, images: int, reason: str) -> None: ...
    def failed(self, reason: str) -> None: ...


class Dispatcher(Protocol):
    """The batcher, as an instance knows it."""

    def next_batch(self, instance: Instance) -> list[Chunk] | None: ...
    def end_batch(self, instance: Instance, rows: Arrays | None, compute_s: float) -> None: ...
    def fail(self, instance: Instance, reason: str, why: str) -> None: ...
    def lose_device(self, error: DeviceLostError) -> None: ...


class Instance:
    """A thread and its place in the batcher. What both sides use is under the batcher's ``lock``."""

    def __init__(
        self, number: int, lock: threading.Lock, reader: LatentReader, make_engine: Callable[[], Engine], observer: Observer
    ) -> None:
        self.number = number
        self.wake = threading.Condition(lock)
        self.batch: list[Chunk] = []
        self.images = 0  # of the batch
        self.busy_since: float | None = None  # time.monotonic()
        self.watched_s = 0.0  # for how long the batcher's watchdog has seen it run this batch
        self._make_engine = make_engine
        self._observer = observer
        self._reader = reader
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self.thread: threading.Thread

    def start(self, dispatcher: Dispatcher) -> None:
        """Start the thread; ``wait_started`` tells how it went."""
        name = f"{INSTANCE_THREAD}-{self.number}"
        self.thread = threading.Thread(target=self._work, args=(dispatcher,), name=name, daemon=True)
        self.thread.start()

    def wait_started(self) -> None:
        """Wait until the engine is there. Raises what making it raised."""
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def _work(self, dispatcher: Dispatcher) -> None:
        with suppress(OSError):  # for top and ps, on Linux
            Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_bytes(threading.current_thread().name.encode())
        try:
            engine = self._make_engine()
        except BaseException as error:
            self._failure = error
            self._started.set()
            return
        self._started.set()
        try:
            while (chunks := dispatcher.next_batch(self)) is not None:
                self._run(dispatcher, engine, chunks)
            engine.close()
        except BaseException:  # a thread must not die in silence with its callers waiting
            log.exception("the thread of instance %d has ended", self.number)
            dispatcher.fail(self, "died", f"the thread of instance {self.number} has ended")

    def _run(self, dispatcher: Dispatcher, engine: Engine, chunks: list[Chunk]) -> None:
        started = time.perf_counter()
        images, splits = self.images, 0
        spans = []
        outputs: Sequence[str] = chunks[0].ticket.outputs
        for ticket, first, count in chunks:
            splits += first == 0 and count < ticket.span.count
            spans.append(ticket.span.part(first, count))
            if ticket.outputs is not outputs and not set(ticket.outputs) <= set(outputs):
                outputs = tuple(dict.fromkeys((*outputs, *ticket.outputs)))
        feeds = engine.assemble(self._reader, spans, images)
        assembled = time.perf_counter()
        try:
            rows = dict(engine.run(feeds, outputs))
        except Exception as error:
            self._observer.failed("raised")
            if isinstance(error, DeviceLostError):
                dispatcher.lose_device(error)
            else:
                log.exception("a run of %d images failed", images)
            dispatcher.end_batch(self, None, 0.0)
            return
        compute_s = time.perf_counter() - assembled
        if "labels" in feeds:
            rows["labels"] = feeds["labels"].copy()  # the next batch may be assembled in the same memory
        # Before the answers are: who has one finds its batch in the metrics.
        self._observer.batch(images, engine.bucket(images), assembled - started, compute_s)
        if splits:
            self._observer.split(splits)
        dispatcher.end_batch(self, rows, compute_s)
