"""A stand-in for a model whose pixels carry the latents they were made from, so that a test can tell whose row is whose."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from serve.background import until
from serve.batching.batcher import Batcher, Limits
from serve.batching.ticket import Priority, Ticket
from serve.latents import LatentReader, Span

LATENT_SIZE = 8
TIMEOUT_S = 30


class FakeEngine:
    """Returns the latents' own bytes as pixels. ``before`` may wait, raise or record; ``labelled`` takes labels."""

    launches_ahead = False

    def __init__(self, before: Callable[[NDArray[np.float32]], None] = lambda latents: None, *, labelled: bool = False) -> None:
        self._before = before
        self._labelled = labelled

    def allocate(self, count: int) -> dict[str, NDArray[Any]]:
        feeds: dict[str, NDArray[Any]] = {"latents": np.zeros((count, LATENT_SIZE), np.float32)}
        return feeds | {"labels": np.zeros(count, np.int64)} if self._labelled else feeds

    def assemble(self, reader: LatentReader, spans: Sequence[Span], count: int) -> dict[str, NDArray[Any]]:
        feeds = self.allocate(count)
        reader.fill(feeds["latents"], spans, feeds.get("labels"))
        return feeds

    def launch(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Callable[[], dict[str, NDArray[Any]]]:
        return partial(self.run, feeds, outputs)

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        latents = feeds["latents"]
        self._before(latents)
        rows = {"pixels": latents.copy().view(np.uint8).reshape(len(latents), -1), "images": latents.copy()}
        return {name: rows[name] for name in outputs}

    def bucket(self, count: int) -> int:
        return count

    def close(self) -> None:
        pass


class RecordingObserver:
    """Counts what the batcher reports."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.drops: dict[str, int] = {}
        self.failures: list[str] = []
        self.splits = 0
        self._lock = threading.Lock()

    def batch(self, images: int, bucket: int, assembly_s: float, compute_s: float) -> None:
        self.batches.append(images)

    def split(self, chunks: int) -> None:
        self.splits += chunks

    def dropped(self, images: int, reason: str) -> None:
        with self._lock:  # callers who cancel say so in their own threads
            self.drops[reason] = self.drops.get(reason, 0) + images

    def failed(self, reason: str) -> None:
        self.failures.append(reason)


class Gate:
    """Holds runs until it is opened; ``reached`` is set when the first run waits at it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, latents: NDArray[np.float32]) -> None:
        self.reached.set()
        assert self._open.wait(TIMEOUT_S)

    @property
    def passed(self) -> bool:
        """Whether it has been opened."""
        return self._open.is_set()

    def open(self) -> None:
        self._open.set()


class FakeTicket(Ticket, eq=False):
    """A ticket that tells when it has been completed."""

    ended: threading.Event = msgspec.field(default_factory=threading.Event)


def _completed(ticket: Ticket) -> None:
    assert isinstance(ticket, FakeTicket)
    assert not ticket.ended.is_set(), "a ticket was completed twice"
    ticket.ended.set()


def make_limits(**changes: float) -> Limits:
    values: dict[str, float] = {
        "latent_size": LATENT_SIZE, "labels": 0, "max_batch_size": 16, "max_queue_images": 100_000,
        "linger_s": 0.001, "instances": 1, "watchdog_s": 30.0,
    }  # fmt: skip
    return Limits(**(values | changes))  # type: ignore[arg-type]


def make_ticket(
    count: int = 1,
    seed: int = 0,
    start: int = 0,
    *,
    priority: Priority = Priority.INTERACTIVE,
    deadline: float | None = None,
    waits_for_room: bool = False,
) -> FakeTicket:
    return FakeTicket(Span(seed, start, count), ("pixels",), priority, deadline, _completed, waits_for_room)


def wait_for(ticket: FakeTicket) -> FakeTicket:
    """Wait until the ticket is completed; raises its error."""
    assert ticket.ended.wait(TIMEOUT_S), "a call hangs"
    if ticket.error is not None:
        raise ticket.error
    return ticket


def drain(batcher: Batcher, seconds: float = TIMEOUT_S) -> int:
    """Wait until nothing waits or runs, no longer than that, and cut off what is left; returns how many tickets."""
    asyncio.run(until(lambda: not (batcher.queued_images or batcher.running_images), time.monotonic() + seconds))
    return batcher.cut_off()


def start_batcher(engine: Callable[[], FakeEngine] = FakeEngine, **limits: float) -> tuple[Batcher, RecordingObserver]:
    observer = RecordingObserver()
    batcher = Batcher(make_limits(**limits), engine, observer)
    batcher.start()
    return batcher, observer
