"""Generates load: with h2load where it is installed, otherwise with callers in Python, always in a process of its own.

h2load (nghttp2) sends real gRPC and costs little, but knows only HTTP; the Python callers are used for status codes, deadlines
and open loops. ``python -m tests.bench.load JSON`` is their process.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import numpy as np
import uvloop

from serve.pb.digits.v1 import digits_pb2 as pb

METHOD = "/digits.v1.DigitGenerator/Generate"
H2LOAD = shutil.which("h2load")
WARM_UP_S = 1


@dataclass(frozen=True)
class Load:
    """``in_flight`` callers that ask again when answered, or, if ``rate`` is given, so many requests a second.

    ``seconds`` is a whole number: h2load takes no other.
    """

    target: str
    model: str
    count: int
    seconds: int
    in_flight: int = 1
    rate: float = 0.0
    deadline_s: float = 30.0
    bulk: bool = False
    connections: int = 4  # that h2load spreads the callers over


@dataclass
class Result:
    """What came of a load. Latencies in seconds; of answered and of refused calls."""

    requests_per_s: float
    mean_s: float = 0.0
    p50_s: float = 0.0
    p99_s: float = 0.0
    refused_p99_s: float = 0.0
    codes: dict[str, int] = field(default_factory=dict)


def request_bytes(load: Load) -> bytes:
    priority = pb.PRIORITY_BULK if load.bulk else pb.PRIORITY_UNSPECIFIED
    return pb.GenerateRequest(model=load.model, count=load.count, seed=7, priority=priority).SerializeToString()


def framed_request(load: Load) -> bytes:
    """A request as it goes over the wire."""
    return framed(request_bytes(load))


def framed(message: bytes) -> bytes:
    """gRPC's frame: not compressed, length, message."""
    return b"\0" + struct.pack(">I", len(message)) + message


def by_h2load(load: Load, path: str = METHOD, body: bytes | None = None) -> Result:
    """A closed loop by h2load."""
    assert H2LOAD is not None
    connections = min(load.connections, load.in_flight)
    message = request_bytes(load) if body is None else body
    with tempfile.NamedTemporaryFile() as stored, tempfile.NamedTemporaryFile("r", encoding="utf-8") as log:
        stored.write(framed(message))
        stored.flush()
        command = [
            H2LOAD, f"--log-file={log.name}", f"--duration={load.seconds}", f"--warm-up-time={WARM_UP_S}",
            f"--clients={connections}", f"--max-concurrent-streams={load.in_flight // connections}",
            f"--data={stored.name}", "--header=content-type: application/grpc", "--header=te: trailers",
            f"http://{load.target}{path}",
        ]  # fmt: skip
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # One line a request: start and duration in microseconds, the status between them.
        latencies = np.array([int(line.split()[2]) for line in log], np.float64) / 1e6
    rate = re.search(r"finished in .*?, ([\d.]+) req/s", text)
    if rate is None or len(latencies) == 0:
        raise RuntimeError(f"h2load got no answers from {load.target}: {text}")
    p50_s, p99_s = (float(value) for value in np.percentile(latencies, [50, 99]))
    return Result(float(rate[1]), mean_s=float(latencies.mean()), p50_s=p50_s, p99_s=p99_s)


def by_python(load: Load) -> Result:
    """The same by Python callers in a process of their own."""
    command = [sys.executable, "-m", "tests.bench.load", json.dumps(asdict(load))]
    return Result(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))


def closed(load: Load) -> Result:
    """A closed loop by whichever is there."""
    return by_h2load(load) if H2LOAD else by_python(load)


async def _run(load: Load) -> Result:
    answered: list[float] = []
    refused: list[float] = []
    codes: dict[str, int] = {}
    message = request_bytes(load)
    async with grpc.aio.insecure_channel(load.target) as channel:
        call: Any = channel.unary_unary(METHOD)
        await call(message, timeout=load.deadline_s)

        async def ask(counted: bool) -> None:
            started = time.perf_counter()
            code, latencies = "OK", answered
            try:
                await call(message, timeout=load.deadline_s)
            except grpc.aio.AioRpcError as error:
                code, latencies = error.code().name, refused
            if counted:
                latencies.append(time.perf_counter() - started)
                codes[code] = codes.get(code, 0) + 1

        begin = time.perf_counter() + WARM_UP_S
        end = begin + load.seconds
        if load.rate:
            await _open_loop(load.rate, begin, end, ask)
        else:
            await asyncio.gather(*(_caller(begin, end, ask) for _ in range(load.in_flight)))
    result = Result(len(answered) / load.seconds, codes=codes)
    if answered:
        result.mean_s = float(np.mean(answered))
        result.p50_s, result.p99_s = (float(value) for value in np.percentile(answered, [50, 99]))
    if refused:
        result.refused_p99_s = float(np.percentile(refused, 99))
    return result


async def _caller(begin: float, end: float, ask: Any) -> None:
    while (now := time.perf_counter()) < end:
        await ask(now >= begin)


async def _open_loop(rate: float, begin: float, end: float, ask: Any) -> None:
    tasks: set[asyncio.Task[None]] = set()
    due = time.perf_counter()
    while due < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.ensure_future(ask(due >= begin))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += 1 / rate
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    print(json.dumps(asdict(uvloop.run(_run(Load(**json.loads(sys.argv[1])))))))
