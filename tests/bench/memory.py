"""Resident memory by instances: ``python -m tests.bench.memory``. All bundled models, after load on each of them."""

from __future__ import annotations

import sys

from tests.bench.load import Load, closed
from tests.bench.process import started

INSTANCES = (1, 2, 4, 8, 16, 32, 64)
MODELS = ("mlp", "dcgan", "cdcgan", "rpgan")
FLAGS = ("--grpc-port=0", "--http-port=0", "--provider=cpu", "--max-batch-size=16", "--max-queue-images=100000")


def main() -> int:
    """Print a table, in MiB."""
    print("instances  after start  after load")
    for instances in INSTANCES:
        with started("serve", *FLAGS, f"--instances={instances}") as server:
            before = server.process.memory_info().rss >> 20
            for model in MODELS:
                closed(Load(server.target, model, 32, 4, 32))
            print(f"{instances:9d}  {before:11d}  {server.process.memory_info().rss >> 20:10d}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
