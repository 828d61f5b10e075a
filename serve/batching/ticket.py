"""Tickets, the requests in the batcher; chunks, their shares of a batch; and parts, the rows that came back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import msgspec
from numpy.typing import NDArray

from serve.latents import Span

log = logging.getLogger(__name__)

TOGETHER = 64  # answers that are sent together: the first of a large batch is not to wait for the last

Arrays = Mapping[str, NDArray[Any]]
Send = Callable[[], object]


class Priority(IntEnum):
    """Interactive goes first."""

    INTERACTIVE = 0
    BULK = 1


class Part(NamedTuple):
    """Rows of a ticket that have come back, from its ``first``-th on: output name → rows, and ``labels`` if it has any."""

    first: int
    rows: Arrays


class Ticket(msgspec.Struct, eq=False):
    """One request on its way through the batcher, and what came of it.

    ``completion`` is called once, in any thread, when the rows are there or ``error`` says why not. It returns what sends the
    answer, to be called after the other answers of its batch have been made, or None.
    """

    span: Span
    outputs: Sequence[str]
    priority: Priority
    deadline: float | None  # time.monotonic() after which nobody wants it
    completion: Callable[[Ticket], Send | None] | None = None
    waits_for_room: bool = False  # for a place in a full queue, instead of being refused
    queued_at: float = 0.0
    tag: float = 0.0  # virtual time at which its next chunk would start
    entry: list[Any] | None = None  # its place in a heap
    taken: int = 0  # rows handed to an instance
    done: int = 0  # rows come back
    error: Exception | None = None
    queue_seconds: float = 0.0  # until its first row went into a batch
    wait_seconds: float = 0.0  # until its last row did: in between its other rows were computed, and those of others
    compute_seconds: float = 0.0
    parts: list[Part] = []  # in order of completion; msgspec gives every ticket a list of its own

    @property
    def waiting(self) -> int:
        """Rows not yet handed out."""
        return self.span.count - self.taken

    def complete(self) -> Send | None:
        """Call the completion. It is dropped before: it may hold this ticket, which would live until a garbage collection."""
        completion, self.completion = self.completion, None
        return completion(self) if completion is not None else None


class Chunk(NamedTuple):
    """``count`` rows of a ticket, from its ``first``-th on: its share of one batch."""

    ticket: Ticket
    first: int
    count: int  # type: ignore[assignment]  # tuple's method of that name is not used


class Batch(msgspec.Struct, eq=False):
    """What an instance runs at once: chunks, and their images together."""

    chunks: list[Chunk]
    images: int


def scatter(chunks: Sequence[Chunk], rows: Arrays, compute_s: float) -> list[Ticket]:
    """Give a batch's ``rows``, in the order of its ``chunks``, to the tickets; returns those that are complete."""
    finished = []
    offset = 0
    for ticket, first, count in chunks:
        begin, offset = offset, offset + count
        if ticket.error is not None:
            continue
        ticket.parts.append(Part(first, {name: array[begin:offset] for name, array in rows.items()}))
        ticket.compute_seconds += compute_s
        ticket.done += count
        if ticket.done == ticket.span.count:
            finished.append(ticket)
    return finished


def complete(tickets: Sequence[Ticket]) -> None:
    """Complete tickets: first all answers of a group are made, then all are sent.

    By turns they cost half as much again (docs/decisions/0013-completion-queue.md): what is done once in a while is not in the
    processor's caches, and each sending lets another thread have the interpreter.
    """
    for first in range(0, len(tickets), TOGETHER):
        sends = []
        for ticket in tickets[first : first + TOGETHER]:
            try:
                sends.append(ticket.complete())
            except Exception:  # no concern of the other tickets'
                log.exception("an answer could not be made")
        for send in filter(None, sends):
            try:
                send()
            except Exception:
                log.exception("an answer could not be sent")
