"""The calls that are open on the gRPC port: their number is bounded, for each caller's address where there are many."""

from __future__ import annotations

import time
from collections import Counter

from serve.access.identity import peer_address
from serve.errors import OverloadedError
from serve.ports.grpc_call import GrpcCall

MOST_CALLS = 8192  # open at once, each of some 24 KiB
FEW_CALLS = 1024  # beyond so many, one address has half of the rest at most; asking for a call's address takes a while
# An answer of this size can be with the core for so long after it has told that it is sent.
MUCH_BYTES, SENDING_S = 64 << 10, 60.0
RETRY_S = 0.1


class OpenCalls:
    """Calls whose status has not been sent. Added and removed by the thread that receives, looked at by others."""

    def __init__(self) -> None:
        self._calls: dict[GrpcCall, None] = {}
        self._by_address: Counter[str] = Counter()  # those that were begun while there were more than a few
        self._sent_much_at = -SENDING_S  # time.monotonic()

    def __len__(self) -> int:
        return len(self._calls)

    def all(self) -> list[GrpcCall]:
        return list(self._calls)

    @property
    def sending(self) -> bool:
        """Whether the core may still have much of an answer that it has told is sent."""
        return time.monotonic() - self._sent_much_at < SENDING_S

    def add(self, call: GrpcCall) -> OverloadedError | None:
        """Count a call; returns an error if it is one too many."""
        self._calls[call] = None
        if len(self._calls) <= FEW_CALLS:
            return None
        if len(self._calls) > MOST_CALLS:
            return OverloadedError(f"{MOST_CALLS} calls are open; try again", RETRY_S, MOST_CALLS)
        address = peer_address(call.peer())
        if (own := self._by_address[address]) >= (MOST_CALLS - FEW_CALLS) // 2:
            return OverloadedError(f"{address} has {own} calls open; try again", RETRY_S, (MOST_CALLS - FEW_CALLS) // 2)
        self._by_address[address] += 1
        call.counted_for = address
        return None

    def remove(self, call: GrpcCall) -> None:
        """Its status has been sent, or cannot be."""
        self._calls.pop(call, None)
        if call.counted_for:
            self._by_address[call.counted_for] -= 1
            if not self._by_address[call.counted_for]:
                del self._by_address[call.counted_for]
        if call.sent_bytes > MUCH_BYTES:
            self._sent_much_at = time.monotonic()
