"""Who goes next: a bounded queue of tickets, counted in images. Not thread-safe; the batcher holds the lock.

Order is weighted fair queuing (Demers, Keshav & Shenker 1989) with equal weights: virtual time is the images that each
waiting ticket would have been given had all been served alike; a ticket starts at the virtual time of its arrival, and
the ticket that would finish its next chunk first goes first. So a caller of one digit goes into the very next batch
however long the others' requests are, and a long request cannot starve, because virtual time moves past it.

Two levels: interactive first; bulk fills what is left of a batch, and every eighth batch begins with bulk.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from serve.errors import QueueFullError
from serve.latents import Span

BULK_TURN = 8  # one batch in so many begins with bulk


class Priority(IntEnum):
    """Interactive goes first."""

    INTERACTIVE = 0
    BULK = 1


class Part(NamedTuple):
    """Rows of a ticket that have come back, from its ``first``-th on, and their labels if the model takes any."""

    first: int
    rows: Any
    labels: Any


@dataclass(eq=False, slots=True)
class Ticket:
    """One caller's request on its way through the batcher, and what came of it. ``caller`` is the caller's own."""

    span: Span
    want_images: bool
    priority: Priority
    deadline: float | None  # time.monotonic() after which nobody wants it
    caller: object
    queued_at: float = 0.0
    tag: float = 0.0  # virtual time at which its next chunk would start
    taken: int = 0  # rows handed to an instance
    done: int = 0  # rows come back
    error: Exception | None = None
    cancelled: bool = False
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    parts: list[Part] = field(default_factory=list)  # in order of completion

    @property
    def waiting(self) -> int:
        """Rows not yet handed out."""
        return self.span.count - self.taken

    @property
    def dead(self) -> bool:
        return self.cancelled or self.error is not None


@dataclass(frozen=True, slots=True)
class Chunk:
    """``count`` rows of a ticket, from its ``first``-th on: its share of one batch."""

    ticket: Ticket
    first: int
    count: int


class FairQueue:
    """Tickets that wait, at most ``max_images`` of their rows in all."""

    def __init__(self, max_images: int, max_batch_size: int) -> None:
        self.max_images = max_images
        self._quantum = max_batch_size
        self.images = 0
        self._heaps: dict[Priority, list[tuple[float, int, int, Ticket]]] = {level: [] for level in Priority}
        self._virtual = dict.fromkeys(Priority, 0.0)
        self._tickets = dict.fromkeys(Priority, 0)
        self._arrivals = itertools.count()
        self._batches_without_bulk = 0

    def push(self, ticket: Ticket, retry_after_s: float) -> None:
        """Queue a new ticket whole or not at all. Raises QueueFullError."""
        if self.images + ticket.span.count > self.max_images:
            raise QueueFullError(
                f"queue is full: {self.images} of {self.max_images} images wait, {ticket.span.count} more do not fit",
                retry_after_s,
            )
        self.images += ticket.span.count
        ticket.tag = self._virtual[ticket.priority]
        self._tickets[ticket.priority] += 1
        self._enter(ticket)

    def discard(self, ticket: Ticket) -> int:
        """Give up a ticket's waiting rows, whose number is returned. Its heap entry goes when it comes up."""
        dropped = ticket.waiting
        if dropped:
            self._tickets[ticket.priority] -= 1
        self.images -= dropped
        ticket.taken = ticket.span.count
        return dropped

    def take(self, limit: int, now: float) -> tuple[list[Chunk], list[Ticket]]:
        """Up to ``limit`` images for one batch, and the tickets found expired on the way, which stay whole."""
        chunks: list[Chunk] = []
        expired: list[Ticket] = []
        bulk_waits = bool(self._heaps[Priority.BULK])
        bulk_first = bulk_waits and self._batches_without_bulk >= BULK_TURN - 1
        room = limit
        for level in (Priority.BULK, Priority.INTERACTIVE) if bulk_first else Priority:
            room = self._take_from(level, room, now, chunks, expired)
        if chunks:
            served_bulk = any(chunk.ticket.priority is Priority.BULK for chunk in chunks)
            self._batches_without_bulk = 0 if served_bulk or not bulk_waits else self._batches_without_bulk + 1
        return chunks, expired

    def tickets(self) -> list[Ticket]:
        """All tickets with rows that wait, in no order."""
        return [entry[3] for heap in self._heaps.values() for entry in heap if entry[3].waiting]

    def _take_from(self, level: Priority, room: int, now: float, chunks: list[Chunk], expired: list[Ticket]) -> int:
        heap = self._heaps[level]
        sharers = max(1, self._tickets[level])
        while heap and room:
            ticket = heapq.heappop(heap)[3]
            if not ticket.waiting:
                continue
            if ticket.deadline is not None and ticket.deadline <= now:
                expired.append(ticket)
                continue
            count = min(ticket.waiting, room)
            self._virtual[level] += count / sharers
            chunks.append(Chunk(ticket, ticket.taken, count))
            ticket.taken += count
            ticket.tag += count
            self.images -= count
            room -= count
            if ticket.waiting:
                self._enter(ticket)
            else:
                self._tickets[level] -= 1
        return room

    def _enter(self, ticket: Ticket) -> None:
        finish = ticket.tag + min(ticket.waiting, self._quantum)
        heapq.heappush(self._heaps[ticket.priority], (finish, ticket.waiting, next(self._arrivals), ticket))
