"""``make bench-instructions``: counts user-space instructions per request with callgrind; busy neighbours do not change them.

It counts a fixed number of single mlp digits, 64 in flight, after a warm-up, in all threads, including the model's own. The
result is printed beside the recorded one in ``instructions.json``, which ``--record`` rewrites. Valgrind runs one thread at a
time and has no AVX-512: the figures can be compared with each other but say nothing about times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve.manifest import BUNDLED_DIR
from tests.bench.load import H2LOAD, METHOD, Load, framed_request
from tests.bench.report import machine, say

RECORD = Path(__file__).with_name("instructions.json")
WARM_UP, REQUESTS, IN_FLIGHT, CONNECTIONS = 320, 1280, 64, 4
START_S = 900
# Under valgrind everything takes some fifty times as long, and so must what the server waits for.
SLOW = ("--linger-us=250000", "--watchdog-s=600", "--self-check-interval-s=0")
FLAGS = ("--grpc-port=0", "--http-port=0", "--provider=cpu", *SLOW)
SUBJECTS = {
    "floor": ("tests.bench.floor", "832"),
    "serve": ("serve", *FLAGS),
}


class CallgrindError(Exception):
    """Valgrind could not be used."""


def count(name: str, models: Path) -> int:
    """Instructions a request. Raises CallgrindError."""
    command = list(SUBJECTS[name])
    if name != "floor":
        command += [f"--models-dir={models}", "--default-model=mlp"]
    with tempfile.TemporaryDirectory() as folder, under_callgrind(command, Path(folder)) as (target, process):
        send(target, WARM_UP)
        dump(process)
        before = set(Path(folder).glob("out*"))
        send(target, REQUESTS)
        dump(process)
        (written,) = set(Path(folder).glob("out*")) - before
        total = re.search(r"^totals: (\d+)", written.read_text(encoding="utf-8"), re.MULTILINE)
    if total is None:
        raise CallgrindError(f"callgrind wrote no total for {name}")
    return int(total[1]) // REQUESTS


@contextmanager
def under_callgrind(command: list[str], folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The server under valgrind until the block is left; its address and process. Raises CallgrindError."""
    valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", sys.executable, "-m", *command]
    # numpy's threads would spin, and be counted.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    begun = time.monotonic()
    with subprocess.Popen(
        valgrind, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if line.startswith("next") or time.monotonic() - begun > START_S:
                    break
            address = re.search(r"^gRPC +(\S+)$", said, re.MULTILINE)
            if address is None:
                raise CallgrindError(f"{' '.join(command)} did not start under valgrind")
            yield address[1], process
        finally:
            process.send_signal(signal.SIGKILL)


def send(target: str, requests: int) -> None:
    """So many single digits of the mlp. Raises CallgrindError when not all are answered."""
    assert H2LOAD is not None
    with tempfile.NamedTemporaryFile() as stored:
        stored.write(framed_request(Load(target, "mlp", 1, 1)))
        stored.flush()
        command = [
            H2LOAD, f"--requests={requests}", f"--clients={CONNECTIONS}", f"--max-concurrent-streams={IN_FLIGHT // CONNECTIONS}",
            f"--data={stored.name}", "--header=content-type: application/grpc", "--header=te: trailers", f"http://{target}{METHOD}",
        ]  # fmt: skip
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if f" {requests} succeeded" not in text:
        raise CallgrindError(f"h2load was not answered: {text}")


def dump(process: subprocess.Popen[str]) -> None:
    """Write the counters to a file of their own and set them to zero."""
    subprocess.run(["callgrind_control", "--dump", str(process.pid)], capture_output=True, check=True)


def main() -> int:
    """Print a line for each subject. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.instructions", description="Count instructions a request.")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} anew")
    flags = parser.parse_args()
    if shutil.which("valgrind") is None or H2LOAD is None:
        print("error: valgrind and h2load are needed: apt-get install valgrind nghttp2-client", file=sys.stderr)
        return 2
    recorded: dict[str, Any] = {"date": "never", "instructions": {}}
    if RECORD.exists():
        recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    counted = {}
    with tempfile.TemporaryDirectory() as models:
        shutil.copytree(BUNDLED_DIR / "mlp", Path(models) / "mlp")
        for name in SUBJECTS:
            say(f"{name}: this takes minutes")
            try:
                counted[name] = count(name, Path(models))
            except CallgrindError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
    print(f"{'instructions a request':24s} {'now':>12s} {'/ floor':>8s} {recorded['date'][:10]:>12s} {'now / then':>11s}")
    for name, value in counted.items():
        then = recorded["instructions"].get(name)
        beside = f"{then:12,d} {value / then:11.3f}" if then else f"{'':>12s} {'':>11s}"
        print(f"{name:24s} {value:12,d} {value / counted['floor']:8.2f} {beside}")
    if flags.record:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        RECORD.write_text(json.dumps({"date": date, "machine": machine(), "instructions": counted}, indent=2) + "\n")
        print(f"written: {RECORD}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
