"""A stand-in for a model whose pixels carry the latents they were made from, so that a test can tell whose row is whose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.batcher import Batcher, Limits
from serve.fair_queue import Priority, Ticket
from serve.latents import Span

LATENT_SIZE = 8
LARGEST = 4096
TIMEOUT_S = 30


@dataclass
class FakeRows:
    pixels: NDArray[np.uint8]
    images: NDArray[np.float32] | None
    labels: NDArray[np.int64] | None
    bucket: int


class FakeRunner:
    """Returns the latents' own bytes as pixels. ``before`` may wait, raise or record; ``labelled`` takes labels."""

    def __init__(self, before: Callable[[NDArray[np.float32]], None] = lambda latents: None, *, labelled: bool = False) -> None:
        self._before = before
        self._latents = np.zeros((LARGEST, LATENT_SIZE), np.float32)
        self._labels = np.zeros(LARGEST, np.int64) if labelled else None

    def latents(self, count: int) -> NDArray[np.float32]:
        return self._latents[:count]

    def labels(self, count: int) -> NDArray[np.int64] | None:
        return None if self._labels is None else self._labels[:count]

    def run(self, count: int, want_images: bool = False) -> FakeRows:
        latents = self._latents[:count]
        self._before(latents)
        pixels = latents.copy().view(np.uint8).reshape(len(latents), -1)
        labels = self.labels(count)
        return FakeRows(pixels, latents.copy() if want_images else None, None if labels is None else labels.copy(), count)


class RecordingObserver:
    """Counts what the batcher reports."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.drops: dict[str, int] = {}
        self.failures: list[str] = []
        self.splits = 0

    def batch(self, images: int, bucket: int, assembly_s: float, compute_s: float) -> None:
        self.batches.append(images)

    def split(self, chunks: int) -> None:
        self.splits += chunks

    def dropped(self, images: int, reason: str) -> None:
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

    def open(self) -> None:
        self._open.set()


class Delivery:
    """Collects delivered tickets; a ticket's ``caller`` is an Event that is set on delivery."""

    def __init__(self) -> None:
        self.order: list[Ticket] = []

    def __call__(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self.order.append(ticket)
            assert isinstance(ticket.caller, threading.Event)
            assert not ticket.caller.is_set(), "a ticket was delivered twice"
            ticket.caller.set()


def make_limits(**changes: float) -> Limits:
    values: dict[str, float] = {
        "latent_size": LATENT_SIZE, "labels": 0, "max_batch_size": 16, "max_queue_images": 100_000, "max_queue_delay_s": 0.0,
        "crowd_rest_s": 0.001, "instances": 1, "watchdog_s": 30.0,
    }  # fmt: skip
    return Limits(**(values | changes))  # type: ignore[arg-type]


def make_ticket(
    count: int = 1, seed: int = 0, start: int = 0, priority: Priority = Priority.INTERACTIVE, deadline: float | None = None
) -> Ticket:
    return Ticket(Span(seed, start, count), False, priority, deadline, threading.Event())


def wait_for(ticket: Ticket) -> Ticket:
    """Wait until the ticket is delivered; raises its error."""
    assert isinstance(ticket.caller, threading.Event)
    assert ticket.caller.wait(TIMEOUT_S), "a call hangs"
    if ticket.error is not None:
        raise ticket.error
    return ticket


def start_batcher(runner: Callable[[], FakeRunner] = FakeRunner, **limits: float) -> tuple[Batcher, Delivery, RecordingObserver]:
    delivery, observer = Delivery(), RecordingObserver()
    batcher = Batcher(make_limits(**limits), runner, delivery, observer)
    batcher.start()
    return batcher, delivery, observer
