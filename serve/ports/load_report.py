"""ORCA load reports at the end of each answer, by which clients send fewer calls to a busy or failing replica
(gRFC A51, https://github.com/grpc/proposal/blob/master/A51-custom-backend-metrics.md; A58 is the client's policy).

Knows no transport. ``message OrcaLoadReport`` is in ``xds/data/orca/v3/orca_load_report.proto``.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

METADATA_KEY = "endpoint-load-metrics-bin"
REFRESH_S = 0.1
NEWEST_SHARE = 0.3  # of the newest period in the figures: enough to follow a change within a second

# Field number and wire type of what is reported (protobuf encoding, 1: 64 bits, 2: length-delimited).
UTILIZATION, RPS, EPS, APPLICATION_UTILIZATION = (
    bytes([5 << 3 | 2]),
    bytes([6 << 3 | 1]),
    bytes([7 << 3 | 1]),
    bytes([9 << 3 | 1]),
)
MAP_KEY, MAP_VALUE = bytes([1 << 3 | 2]), bytes([2 << 3 | 1])


class Load(NamedTuple):
    """What the process has done and has before it: seconds of runs since the start, runs side by side, share of the queue."""

    busy_s: float
    instances: int
    queue_fill: float


class LoadReports:
    """Reports from the calls that ask for one and from ``read``. Safe to call from any thread."""

    def __init__(self, read: Callable[[], Load]) -> None:
        self._read = read
        self._calls = self._errors = 0
        self._at = time.monotonic()
        self._busy_s = 0.0
        self._rps = self._eps = self._utilization = 0.0
        self._encoded = b""
        self._lock = threading.Lock()

    def answered(self, *, failed: bool = False) -> bytes:
        """Count an answered call; returns the report that goes with it, at most a tenth of a second old.

        ``failed``: by the server's own fault.
        """
        with self._lock:
            self._calls += 1
            self._errors += failed
            now = time.monotonic()
            if now - self._at >= REFRESH_S or not self._encoded:
                self._refresh(now)
            return self._encoded

    def _refresh(self, now: float) -> None:
        load = self._read()
        period_s = max(now - self._at, 1e-3)
        self._rps += NEWEST_SHARE * (self._calls / period_s - self._rps)
        busy = max(0.0, load.busy_s - self._busy_s) / period_s / max(1, load.instances)
        self._utilization += NEWEST_SHARE * (busy - self._utilization)
        self._eps += NEWEST_SHARE * (self._errors / period_s - self._eps)
        self._calls, self._errors, self._at, self._busy_s = 0, 0, now, load.busy_s
        # Over 1 where work waits: of two replicas that are always busy, the one with the longer queue is the fuller.
        self._encoded = encoded(self._rps, self._eps, self._utilization + load.queue_fill, load.queue_fill)


def encoded(rps: float, eps: float, utilization: float, queue_fill: float) -> bytes:
    """``OrcaLoadReport``: calls and errors a second, ``application_utilization``, and ``utilization["queue"]``, its share."""
    entry = MAP_KEY + b"\x05queue" + MAP_VALUE + struct.pack("<d", queue_fill)
    return (
        UTILIZATION + bytes([len(entry)]) + entry
        + RPS + struct.pack("<d", rps)
        + EPS + struct.pack("<d", eps)
        + APPLICATION_UTILIZATION + struct.pack("<d", utilization)
    )  # fmt: skip
