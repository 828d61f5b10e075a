"""How long one caller's request of any shape holds up another's single digit: ``python -m tests.bench.bounds``.

Each shape is sent again and again for ``--seconds``, as it is and compressed, one call at a time with a pause after each: what
the victim waits for is one request. It is another process, which asks for one digit after another; beside its figures stand
those of a quiet server just before. The target is 20 ms.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator

from tests.bench.process import started
from tests.hostile.http2 import Http2Connection, gzipped
from tests.hostile.shapes import MOST_BYTES, Shape, every_shape, random_shapes
from tests.hostile.victim import Held, Victim

TARGET_MS = 20.0
FLAGS = ("--grpc-port=0", "--http-port=0", "--provider=cpu")
ANSWER_S = 60.0


def attacked(
    target: str, victim: Victim, shape: Shape, message: bytes, *, compressed: bool, seconds: float, pause_s: float
) -> tuple[str, Held]:
    """How the calls ended, and what the victim saw from the first to the last of them."""
    ends: set[str] = set()
    victim.held()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with Http2Connection(target) as connection:
                while time.monotonic() < deadline:
                    stream = connection.open(shape.method, compressed=compressed)
                    connection.send(stream, message, compressed=compressed)
                    answer = connection.finish(stream, ANSWER_S if "Watch" not in shape.method else seconds)
                    ends.add(str(answer.status if answer.reset is None else f"reset {answer.reset}"))
                    time.sleep(pause_s)
        except OSError as error:
            ends.add(type(error).__name__)
    return ",".join(sorted(ends)), victim.held()


def _chosen(arguments: argparse.Namespace) -> Iterator[Shape]:
    chance = random.Random(arguments.seed)
    for shape in (*every_shape(), *random_shapes(arguments.chance, chance)):
        if arguments.match in shape.what:
            yield shape


def main() -> int:
    """Print a line for each shape, then the worst."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bounds", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each shape (default: 1)")
    parser.add_argument("--pause-ms", type=float, default=20.0, help="pause between two requests (default: 20)")
    parser.add_argument("--match", default="", help="only shapes whose name contains this")
    parser.add_argument("--chance", type=int, default=40, help="number of random mixtures (default: 40)")
    parser.add_argument("--seed", type=int, default=1, help="random seed of the mixtures (default: 1)")
    parser.add_argument("--bytes", type=int, default=MOST_BYTES, help="uncompressed size of a message (default: almost 4 MiB)")
    arguments = parser.parse_args()
    found: list[tuple[float, str]] = []
    with started("serve", *FLAGS) as server, Victim(server.target) as victim:
        print("  on wire |  longest     p99 ms | quiet: longest     p99 | MiB now | status | shape")
        for shape in _chosen(arguments):
            message = shape.make(arguments.bytes)
            for compressed in (False, True):
                sent = gzipped(message) if compressed else message
                quiet = victim.baseline(arguments.seconds / 4)
                pace = {"seconds": arguments.seconds, "pause_s": arguments.pause_ms / 1000}
                ends, held = attacked(server.target, victim, shape, sent, compressed=compressed, **pace)
                name = shape.what + (", gzip" if compressed else "")
                found.append((held.longest_ms, name))
                print(
                    f"{len(sent):9d} | {held.longest_ms:8.1f}{held.p99_ms:8.1f}    | {quiet.longest_ms:14.1f}{quiet.p99_ms:8.1f}"
                    f" | {server.process.memory_info().rss >> 20:7d} | {ends} | {name}",
                    flush=True,
                )
                if held.failures:
                    print(f"          the victim's calls failed: {held.failures[0]}")
    found.sort(reverse=True)
    over = sum(longest > TARGET_MS for longest, _ in found)
    print(f"\n{over} of {len(found)} hold a single digit by more than {TARGET_MS:g} ms; the worst:")
    for longest, name in found[:10]:
        print(f"{longest:10.1f} ms  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
