"""A bounded, fair queue of tickets, counted in images. Not thread-safe; the batcher holds the lock.

The order is weighted fair queuing (Demers, Keshav & Shenker 1989) with equal weights. Virtual time is the number of images that
each waiting ticket would have been given if all had been served equally. A ticket starts at the virtual time of its arrival, less
the part of a batch that it leaves to others, and the ticket whose next chunk would finish first is served first. So a request for
one digit is in the very next batch however long the other requests are, and a long request cannot starve, because virtual
time moves past it.

There are two priorities: interactive first; bulk fills the rest of a batch, and every eighth batch begins with bulk. Each
priority has the whole limit for itself, so that neither can fill the queue against the other. If a ticket does not fit but may
wait for room, it waits in a line before the queue and is not counted.
"""

from __future__ import annotations

import heapq
from itertools import count as counter
from typing import Any

from serve.batching.ticket import Chunk, Priority, Ticket
from serve.errors import QueueFullError

BULK_TURN = 8  # one batch in so many begins with bulk
LEAST_RETRY_S = 0.005  # never so short that a retry is a busy loop
FEW_DEAD = 64  # entries of tickets that are gone, before they are swept out of a heap


class _Level:
    """The tickets of one priority. Heap entries are [finish, waiting, arrival, ticket]; a ticket that left is None there."""

    def __init__(self) -> None:
        self.heap: list[list[Any]] = []
        self.virtual = 0.0
        self.tickets = 0
        self.images = 0
        self.dead = 0
        self.no_room: dict[Ticket, None] = {}  # in order of arrival; not in the heap, and not counted

    def sweep(self) -> None:
        """Drop the entries of tickets that left, once they are the larger part."""
        if self.dead > max(FEW_DEAD, self.tickets):
            self.heap = [entry for entry in self.heap if entry[3] is not None]
            heapq.heapify(self.heap)
            self.dead = 0


class FairQueue:
    """Tickets that wait, at most ``max_images`` of their rows in each priority."""

    def __init__(self, max_images: int, max_batch_size: int) -> None:
        self.max_images = max_images
        self.images = 0
        self.waiting = 0  # tickets in the queue
        self.waiting_since = 0.0  # when the oldest of what waits was queued, or earlier; time.monotonic()
        self._quantum = max_batch_size
        self._levels = [_Level() for _ in Priority]
        self._arrivals = counter()
        self._batches_without_bulk = 0

    @property
    def lone(self) -> Ticket | None:
        """The only ticket that waits, if there is no other."""
        return self.tickets()[0] if self.waiting == 1 else None

    def push(self, ticket: Ticket, seconds_per_image: float = 0.0) -> None:
        """Queue a new ticket, or let it wait for room. Raises QueueFullError, which says when to return, when it may not."""
        level = self._levels[ticket.priority]
        if self._fits(level, ticket) and not (ticket.waits_for_room and level.no_room):
            self._push(level, ticket)
        elif ticket.waits_for_room:
            level.no_room[ticket] = None
        else:
            text = f"queue is full: {level.images} of {self.max_images} images wait, {ticket.span.count} more do not fit"
            raise QueueFullError(text, max(LEAST_RETRY_S, self.images * seconds_per_image), self.max_images)

    def discard(self, ticket: Ticket) -> int:
        """Drop a ticket's waiting rows, and the ticket with what it holds; returns how many rows there were."""
        dropped, entry, level = ticket.waiting, ticket.entry, self._levels[ticket.priority]
        ticket.taken = ticket.span.count
        if entry is not None:
            entry[3] = ticket.entry = None
            self._leave(level, ticket, dropped)
            level.dead += 1
            level.sweep()
        else:
            level.no_room.pop(ticket, None)
        self._admit()
        return dropped

    def take(self, limit: int, now: float) -> tuple[list[Chunk], list[Ticket]]:
        """Up to ``limit`` images for one batch, and the tickets found expired on the way, which are out of the queue.

        ``now`` is on ``time.monotonic()``.
        """
        chunks: list[Chunk] = []
        expired: list[Ticket] = []
        interactive, bulk = self._levels
        bulk_waits = bulk.tickets > 0
        bulk_first = bulk_waits and self._batches_without_bulk >= BULK_TURN - 1
        room = limit
        for level in (bulk, interactive) if bulk_first else (interactive, bulk):
            if level.tickets and room:
                room = self._take_from(level, room, now, chunks, expired)
        if not bulk_waits or any(chunk.ticket.priority is Priority.BULK for chunk in chunks):
            self._batches_without_bulk = 0
        elif chunks:
            self._batches_without_bulk += 1
        self._admit()
        return chunks, expired

    def tickets(self) -> list[Ticket]:
        """All tickets with rows that wait, also for room, in no order."""
        queued = [entry[3] for level in self._levels for entry in level.heap if entry[3] is not None]
        return [*queued, *(ticket for level in self._levels for ticket in level.no_room)]

    def _fits(self, level: _Level, ticket: Ticket) -> bool:
        return level.images + ticket.span.count <= self.max_images

    def _admit(self) -> None:
        """Queue what has waited for room, as far as there is room now."""
        for level in self._levels:
            while level.no_room and self._fits(level, ticket := next(iter(level.no_room))):
                del level.no_room[ticket]
                self._push(level, ticket)

    def _push(self, level: _Level, ticket: Ticket) -> None:
        if not self.images:
            self.waiting_since = ticket.queued_at
        count = ticket.span.count
        self.images += count
        self.waiting += 1
        level.images += count
        level.tickets += 1
        ticket.tag = level.virtual - max(0, self._quantum - count)
        self._enter(level, ticket)

    def _take_from(self, level: _Level, room: int, now: float, chunks: list[Chunk], expired: list[Ticket]) -> int:
        sharers = max(1, level.tickets)
        while level.heap and room:
            ticket: Ticket | None = heapq.heappop(level.heap)[3]
            if ticket is None:
                level.dead -= 1
                continue
            ticket.entry = None
            if ticket.deadline is not None and ticket.deadline <= now:
                self._leave(level, ticket, ticket.waiting)
                expired.append(ticket)
                continue
            count = min(ticket.waiting, room)
            level.virtual += count / sharers
            chunks.append(Chunk(ticket, ticket.taken, count))
            ticket.taken += count
            ticket.tag += count
            room -= count
            if ticket.waiting:
                self.images -= count
                level.images -= count
                self._enter(level, ticket)
            else:
                self._leave(level, ticket, count)
        return room

    def _enter(self, level: _Level, ticket: Ticket) -> None:
        waiting = ticket.waiting
        ticket.entry = [ticket.tag + min(waiting, self._quantum), waiting, next(self._arrivals), ticket]
        heapq.heappush(level.heap, ticket.entry)

    def _leave(self, level: _Level, ticket: Ticket, images: int) -> None:
        self.images -= images
        level.images -= images
        level.tickets -= 1
        self.waiting -= 1
