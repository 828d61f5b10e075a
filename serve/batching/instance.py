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

import msgspec
from numpy.typing import NDArray

from serve.batching.ticket import Arrays, Batch, Ticket
from serve.errors import DeviceLostError
from serve.latents import LatentReader, Span

log = logging.getLogger(__name__)

INSTANCE_THREAD = "instance"  # how the threads' names begin


class Engine(Protocol):
    """A loaded model, as an instance uses it (``serve.engine.session.Engine``)."""

    launches_ahead: bool  # whether a launched run goes on by itself, beside what this thread does meanwhile

    def assemble(self, reader: LatentReader, spans: Sequence[Span], count: int) -> dict[str, NDArray[Any]]: ...
    def launch(self, feeds: Arrays, outputs: Sequence[str]) -> Callable[[], Arrays]: ...
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

    def next_batch(self, instance: Instance, *, wait: bool = True) -> Batch | None: ...
    def end_batch(self, instance: Instance, batch: Batch, rows: Arrays | None, compute_s: float) -> None: ...
    def fail(self, instance: Instance, reason: str, why: str) -> None: ...
    def lose_device(self, error: DeviceLostError) -> None: ...


class Run(msgspec.Struct, eq=False):
    """A batch that was launched: ``finish`` waits for its rows, or ``error`` says why it was not. Times: ``perf_counter()``."""

    batch: Batch
    splits: int
    feeds: Arrays
    finish: Callable[[], Arrays] | None
    error: Exception | None
    assembly_s: float
    launched: float


class Instance:
    """A thread and its place in the batcher. What both sides use is under the batcher's ``lock``."""

    def __init__(
        self, number: int, lock: threading.Lock, reader: LatentReader, make_engine: Callable[[], Engine], observer: Observer
    ) -> None:
        self.number = number
        self.wake = threading.Condition(lock)
        self.batches: list[Batch] = []  # that it has: one, or one that is being delivered and one that runs
        self.busy_since = 0.0  # time.monotonic() when it got the first of them, or its last batch ended
        self.failed_runs = 0  # since the last one that succeeded
        self.watched_s = 0.0  # for how long the batcher's watchdog has seen it get no further
        self._make_engine = make_engine
        self._observer = observer
        self._reader = reader
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self.thread: threading.Thread

    @property
    def tickets(self) -> list[Ticket]:
        return [chunk.ticket for batch in self.batches for chunk in batch.chunks]

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
            run: Run | None = None  # while it waits for work the thread holds nothing of what it has delivered
            while run is not None or (run := self._next(dispatcher, engine)) is not None:
                run = self._finish(dispatcher, engine, run)
            engine.close()
        except BaseException:  # a thread must not die in silence with its callers waiting
            log.exception("the thread of instance %d has ended", self.number)
            dispatcher.fail(self, "died", f"the thread of instance {self.number} has ended")

    def _next(self, dispatcher: Dispatcher, engine: Engine, *, wait: bool = True) -> Run | None:
        """Take a batch and launch it; None if there is none, which without ``wait`` may be for now."""
        batch = dispatcher.next_batch(self, wait=wait)
        if batch is None:
            return None
        started = time.perf_counter()
        splits = 0
        spans = []
        outputs: Sequence[str] = batch.chunks[0].ticket.outputs
        for ticket, first, count in batch.chunks:
            splits += first == 0 and count < ticket.span.count
            spans.append(ticket.span.part(first, count))
            if ticket.outputs is not outputs and not set(ticket.outputs) <= set(outputs):
                outputs = tuple(dict.fromkeys((*outputs, *ticket.outputs)))
        feeds = engine.assemble(self._reader, spans, batch.images)
        assembled = time.perf_counter()
        try:
            finish = engine.launch(feeds, outputs)
        except Exception as error:  # told in its turn: the batch before it has not been delivered yet
            return Run(batch, splits, feeds, None, error, 0.0, assembled)
        return Run(batch, splits, feeds, finish, None, assembled - started, assembled)

    def _finish(self, dispatcher: Dispatcher, engine: Engine, run: Run) -> Run | None:
        """Wait for a run and deliver its rows. What waits already is launched in between, and returned: while the rows are packed
        and sent, the device works."""
        if run.finish is None:
            self._fail(dispatcher, run.batch, run.error)
            return None
        try:
            rows = dict(run.finish())
        except Exception as error:
            self._fail(dispatcher, run.batch, error)
            return None
        compute_s = time.perf_counter() - run.launched
        if "labels" in run.feeds:
            rows["labels"] = run.feeds["labels"].copy()  # the next batch may be assembled in the same memory
        # Before the answers are: who has one finds its batch in the metrics.
        images = run.batch.images
        self._observer.batch(images, engine.bucket(images), run.assembly_s, compute_s)
        if run.splits:
            self._observer.split(run.splits)
        following = self._next(dispatcher, engine, wait=False) if engine.launches_ahead else None
        dispatcher.end_batch(self, run.batch, rows, compute_s)
        return following

    def _fail(self, dispatcher: Dispatcher, batch: Batch, error: Exception | None) -> None:
        """A batch's run has failed, or could not be launched."""
        self._observer.failed("raised")
        if isinstance(error, DeviceLostError):
            dispatcher.lose_device(error)
        else:
            log.error("a run of %d images failed", batch.images, exc_info=error)
        dispatcher.end_batch(self, batch, None, 0.0)
