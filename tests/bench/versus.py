"""Compares this checkout's server with another checkout's: ``python -m tests.bench.versus ../before --rounds 8``.

Both run at once and are measured in turn (``tests.bench.rounds``). This checkout's interpreter runs the other one too, as
``python -m serve`` with the same flags; where its flags are others, ``--other-flags "--grpc-port=0 ..."`` takes their place.
"""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path

from serve.command_line import OneLineParser, within
from tests.bench.load import Load
from tests.bench.process import started
from tests.bench.report import spread
from tests.bench.rounds import ROUNDS, alternate, costs_us, measure, rates, ratios

FLAGS = ("--grpc-port=0", "--http-port=0", "--provider=cpu")
LOADS = (("mlp", 1, 1), ("mlp", 1, 8), ("mlp", 1, 64), ("mlp", 64, 16), ("dcgan", 1, 64), ("dcgan", 64, 16))


def main() -> int:
    """Print a line for each kind of load."""
    parser = OneLineParser(prog="python -m tests.bench.versus", description="Compare with another checkout.")
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=within(1, 1000), default=ROUNDS, help=f"how often each is measured (default: {ROUNDS})")
    parser.add_argument("--seconds", type=within(1, 600), default=2, help="length of each measurement (default: 2)")
    parser.add_argument(
        "--other-flags", type=shlex.split, default=FLAGS, help=f"flags of the other server (default: {' '.join(FLAGS)})"
    )
    flags = parser.parse_args()
    print("model  digits  in flight  requests a second, this / other  processor time a request, this / other")
    with started("serve", *FLAGS) as this, started("serve", *flags.other_flags, checkout=flags.other) as other:
        for model, count, in_flight in LOADS:
            subjects = {
                name: partial(measure, server, Load(server.target, model, count, flags.seconds, in_flight))
                for name, server in (("this", this), ("other", other))
            }
            seen = alternate(subjects, flags.rounds)
            rate = spread(ratios(rates(seen["this"]), rates(seen["other"])))
            cost = spread(ratios(costs_us(seen["this"]), costs_us(seen["other"])))
            print(f"{model:6s} {count:6d} {in_flight:10d}  {rate:>31s}  {cost:>38s}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
