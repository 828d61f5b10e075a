"""This checkout's server beside another's, round by round: ``python -m serve.bench.versus ../before --rounds 8``.

Both run at once and are measured by turns, each round in the other order, so that what the machine does meanwhile meets both.
A ratio is of one round; what is printed is their median and range. The other checkout is run by this one's interpreter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from serve.bench.load import WARM_UP_S, Load, closed
from serve.bench.process import Started, started

FLAGS = ("--grpc-port=0", "--http-port=0", "--provider=cpu")
LOADS = (("mlp", 1, 1), ("mlp", 1, 8), ("mlp", 1, 64), ("mlp", 64, 16), ("dcgan", 1, 64), ("dcgan", 64, 16))


def measure(server: Started, load: Load) -> tuple[float, float]:
    """Requests a second, and seconds of processor time a request, user and system, of all of the server's threads."""
    before = server.process.cpu_times()
    rate = closed(load).requests_per_s
    after = server.process.cpu_times()
    used = after.user + after.system - before.user - before.system
    return rate, used / (rate * (load.seconds + WARM_UP_S))


def main() -> int:
    """Print a line for each kind of load."""
    parser = argparse.ArgumentParser(prog="python -m serve.bench.versus", description="Compare with another checkout.")
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement (default: 2)")
    flags = parser.parse_args()
    print("model  digits  in flight  requests a second, this / other  processor time a request, this / other")
    with started("serve", *FLAGS) as this, started("serve", *FLAGS, checkout=flags.other) as other:
        for model, count, in_flight in LOADS:
            rates, costs = [], []
            for turn in range(flags.rounds):
                seen = {}
                for server in (this, other) if turn % 2 else (other, this):
                    seen[server.target] = measure(server, Load(server.target, model, count, flags.seconds, in_flight))
                rates.append(seen[this.target][0] / seen[other.target][0])
                costs.append(seen[this.target][1] / seen[other.target][1])
            print(f"{model:6s} {count:6d} {in_flight:10d}  {spread(rates):>31s}  {spread(costs):>38s}", flush=True)
    return 0


def spread(ratios: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
