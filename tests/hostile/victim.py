"""A well-behaved caller in a process of its own, who asks for one digit at a time and notes how long each took.

``python -m tests.hostile.victim TARGET`` answers each line on stdin with a JSON object: what was seen since the last one.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Self

import grpc

from serve.client.channel import CHANNEL_OPTIONS
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc

CALL_S = 60.0  # longer than any attack may hold a call


@dataclass(frozen=True)
class Held:
    """Calls of the victim's: how many, their longest and their 99th percentile, and how those ended that failed."""

    calls: int
    longest_ms: float
    p99_ms: float
    failures: list[str]


class Victim:
    """The process, calling since the constructor has returned."""

    def __init__(self, target: str, pause_s: float = 0.002) -> None:
        """``pause_s``: between two calls, so that it leaves the processor to others."""
        command = [sys.executable, "-m", "tests.hostile.victim", target, str(pause_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.held()  # once connected

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def held(self) -> Held:
        """What it has seen since the last time, once the call that is under way has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Held(**json.loads(self._process.stdout.readline()))

    def baseline(self, seconds: float) -> Held:
        """What it sees when nobody does anything to it."""
        self.held()
        time.sleep(seconds)  # what is measured
        return self.held()


class _Caller:
    def __init__(self, target: str, pause_s: float) -> None:
        self._target, self._pause_s = target, pause_s
        self._lock = threading.Lock()  # held during a call
        self._waiting = threading.Event()  # somebody wants to look
        self._taken: list[float] = []
        self._failures: list[str] = []

    def run(self) -> None:
        with grpc.insecure_channel(self._target, CHANNEL_OPTIONS[1:]) as channel:
            call = pb_grpc.DigitGeneratorStub(channel).Generate
            while True:
                with self._lock:
                    started = time.perf_counter()
                    try:
                        call(pb.GenerateRequest(model="mlp", count=1, seed=1), timeout=CALL_S)
                    except grpc.RpcError as error:
                        self._failures.append(f"{error.code().name}: {error.details()}")
                    self._taken.append(time.perf_counter() - started)
                time.sleep(0.01 if self._waiting.is_set() else self._pause_s)

    def held(self) -> Held:
        self._waiting.set()
        with self._lock:
            taken, failures = sorted(self._taken), self._failures
            self._taken, self._failures = [], []
        self._waiting.clear()
        longest, p99 = (taken[-1], taken[int(len(taken) * 0.99)]) if taken else (0.0, 0.0)
        return Held(len(taken), round(longest * 1000, 2), round(p99 * 1000, 2), failures)


def main() -> int:
    caller = _Caller(sys.argv[1], float(sys.argv[2]))
    threading.Thread(target=caller.run, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        for _ in sys.stdin:
            print(json.dumps(asdict(caller.held())), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
