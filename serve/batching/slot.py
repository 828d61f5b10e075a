"""A slot: a thread that runs batches through an engine until there are no more.

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
from serve.errors import DeviceLostError, EngineError
from serve.latents import LatentReader, Span

log = logging.getLogger(__name__)

SLOT_THREAD = "model-slot"  # how the threads' names begin


class Runner(Protocol):
    """A loaded model, as a slot uses it (``serve.engine.session.Engine``)."""

    def assemble(self, reader: LatentReader, spans: Sequence[Span], count: int) -> dict[str, NDArray[Any]]: ...
    def run(self, feeds: Arrays, outputs: Sequence[str]) -> Arrays: ...
    def bucket(self, count: int) -> int: ...
    def close(self) -> None: ...


class Observer(Protocol):
    """Receives the figures; called from the slots' threads, once per batch or drop."""

    def batch(self, images: int, bucket: int, assembly_s: float, compute_s: float) -> None: ...
    def split(self, chunks: int) -> None: ...
    def dropped(self, images: int, reason: str) -> None: ...
    def failed(self, reason: str) -> None: ...


class Dispatcher(Protocol):
    """The batcher, as a slot knows it."""

    def next_batch(self, slot: Slot) -> list[Chunk] | None: ...
    def end_batch(self, slot: Slot, rows: Arrays | None, compute_s: float) -> None: ...
    def add(self, slot: Slot) -> None: ...
    def evict(self, slot: Slot, error: EngineError, reason: str) -> None: ...
    def lose_device(self, error: DeviceLostError) -> None: ...


class Slot:
    """A thread and its place in the batcher. What both sides use is under the batcher's ``lock``."""

    def __init__(
        self, number: int, lock: threading.Lock, reader: LatentReader, make_runner: Callable[[], Runner], observer: Observer
    ) -> None:
        self.number = number
        self.wake = threading.Condition(lock)
        self.batch: list[Chunk] = []
        self.busy_since: float | None = None  # time.monotonic()
        self.evicted = False  # evicted: what it still returns is thrown away
        self._make_runner = make_runner
        self._observer = observer
        self._reader = reader
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self.thread: threading.Thread

    def start(self, dispatcher: Dispatcher) -> None:
        """Start the thread; ``wait_started`` tells how it went."""
        name = f"{SLOT_THREAD}-{self.number}"
        self.thread = threading.Thread(target=self._work, args=(dispatcher,), name=name, daemon=True)
        self.thread.start()

    def wait_started(self) -> None:
        """Wait until the engine is there. Raises what making it raised."""
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def _work(self, dispatcher: Dispatcher) -> None:
        with suppress(OSError):  # for top and ps, on Linux
            Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(threading.current_thread().name)
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
            runner.close()
        except BaseException:  # a thread must not die in silence with its callers waiting
            log.exception("slot %d died", self.number)
            dispatcher.evict(self, EngineError("a slot died"), "died")

    def _run(self, dispatcher: Dispatcher, runner: Runner, chunks: list[Chunk]) -> None:
        started = time.perf_counter()
        images = 0
        spans = []
        outputs: Sequence[str] = chunks[0].ticket.outputs
        for ticket, first, count in chunks:
            images += count
            spans.append(ticket.span.part(first, count))
            if ticket.outputs is not outputs and not set(ticket.outputs) <= set(outputs):
                outputs = tuple(dict.fromkeys((*outputs, *ticket.outputs)))
        feeds = runner.assemble(self._reader, spans, images)
        assembled = time.perf_counter()
        try:
            rows = dict(runner.run(feeds, outputs))
        except DeviceLostError as error:
            log.critical("%s; the process ends, for another to begin anew", error)
            self._observer.failed("raised")
            dispatcher.lose_device(error)
            dispatcher.end_batch(self, None, 0.0)
            return
        except Exception:
            log.exception("a run of %d images failed", images)
            self._observer.failed("raised")
            dispatcher.end_batch(self, None, 0.0)
            return
        compute_s = time.perf_counter() - assembled
        if "labels" in feeds:
            rows["labels"] = feeds["labels"].copy()  # the next batch may be assembled in the same memory
        # Before the answers are: who has one finds its batch in the metrics.
        self._observer.batch(images, runner.bucket(images), assembled - started, compute_s)
        if splits := sum(first == 0 and count < ticket.span.count for ticket, first, count in chunks):
            self._observer.split(splits)
        dispatcher.end_batch(self, rows, compute_s)
