"""``make gpu-check``: all that needs a GPU, in under eight minutes, as a table and one JSON.

    python -m tests.gpu                        # writes build/gpu-check.json
    python -m tests.gpu parity graphs          # some of it
    python -m tests.gpu --out gpu-check.json

Exits with 3 where there is no GPU, with 1 when something that must hold does not; an aim that is missed is said, and no
failure.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from serve.engine.provider import choose_provider
from serve.errors import ProviderError
from tests.bench.report import Target, print_targets, say, write
from tests.gpu.checks import CHECKS, Plan

NO_GPU = 3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="Check and measure on a GPU.")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"which (default: all): {', '.join(CHECKS)}")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check.json"), help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement (default: 2)")
    flags = parser.parse_args()
    if unknown := set(flags.checks) - set(CHECKS):
        parser.error(f"{min(unknown)!r} is no check; there are {', '.join(CHECKS)}")
    if reason := no_gpu():
        print(f"no GPU to check on: {reason}", file=sys.stderr)
        return NO_GPU
    return run(Plan(seconds=flags.seconds, memory_seconds=20 * flags.seconds), flags.checks or list(CHECKS), flags.out)


def no_gpu() -> str | None:
    """Why there is nothing to check on; None when there is."""
    if not torch.cuda.is_available():
        return "PyTorch finds none"
    try:
        choose_provider("cuda")
    except ProviderError as error:
        return str(error)
    return None


def run(plan: Plan, names: list[str], out: Path) -> int:
    """Run the checks one after the other; a check that raises is a failure, and the others go on."""
    figures: dict[str, Any] = {}
    fixed: list[Target] = []
    aims: list[Target] = []
    failed = []
    device = torch.cuda.get_device_name() if plan.provider == "cuda" else "cpu"
    for name in names:
        say(f"{name} ...")
        begun = time.monotonic()
        try:
            outcome = CHECKS[name](plan)
        except Exception as error:  # every check is asked for its finding, whatever another's was
            figures[name] = {"raised": f"{type(error).__name__}: {error}"}
            failed.append(name)
            say(f"{name}: {type(error).__name__}: {error}")
        else:
            figures[name] = outcome.figures | {"check_s": round(time.monotonic() - begun, 1)}
            fixed += outcome.fixed
            aims += outcome.aims
        # After each: a check that hangs, or takes the process with it, must not cost what was found before.
        write(out, {"device": device, "torch": torch.__version__, "raised": failed, "figures": figures}, fixed + aims)
    print(f"{device}; torch {torch.__version__}")
    print_targets(fixed + aims)
    return 1 if failed or not all(target.met for target in fixed) else 0


if __name__ == "__main__":
    sys.exit(main())
