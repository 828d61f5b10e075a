"""Measures a training set that is read while it is made: ``python -m tests.bench.training_set [--count 4096]``.

The client's workers and the server share the machine's cores. Digits a second, the median of three epochs after one that is not
counted; beside them the same by an engine in the reading processes, without a server.
"""

from __future__ import annotations

import argparse
import statistics
import time

from torch.utils.data import DataLoader

from serve.client import DigitSet
from serve.manifest import BUNDLED_DIR
from tests.bench.process import started

MODELS = ("rpgan", "mlp")
WORKERS = (0, 1, 2)
EPOCHS = 3
BATCH = 64


def digits_a_second(digits: DigitSet, workers: int) -> float:
    loader: DataLoader[object] = DataLoader(digits, BATCH, num_workers=workers, persistent_workers=workers > 0)  # type: ignore[arg-type]  # no Dataset by its class
    rates = []
    for epoch in range(EPOCHS + 1):
        digits.set_epoch(epoch)
        begun = time.perf_counter()
        for _ in loader:
            pass
        rates.append(len(digits) / (time.perf_counter() - begun))
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.training_set")
    parser.add_argument("--count", type=int, default=4096, help="digits in an epoch (default: 4096)")
    count = parser.parse_args().count
    print("| model | made by | " + " | ".join(f"{workers} workers" for workers in WORKERS) + " |")
    print("|---|---|" + "--:|" * len(WORKERS))
    with started("serve", "--grpc-port=0", "--http-port=0") as server:
        for model in MODELS:
            sources = {"a server": server.target, "an engine in each process": str(BUNDLED_DIR / model / "1")}
            for by, source in sources.items():
                rates = [digits_a_second(DigitSet(source, seed=7, count=count, model=model), workers) for workers in WORKERS]
                print(f"| {model} | {by} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |", flush=True)


if __name__ == "__main__":
    main()
