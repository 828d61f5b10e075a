"""``make gpu-check``: all that needs a GPU, in under eight minutes, as a table and one JSON.

    python -m tests.gpu                        # writes build/gpu-check.json
    python -m tests.gpu parity graphs          # some of it
    python -m tests.gpu --out gpu-check.json
    python -m tests.gpu --session              # ten minutes that decide what is open: build/gpu-session.json
    python -m tests.gpu --session --dry-run    # the same without a GPU, everything tiny

Exits with 3 where there is no GPU, with 1 when something that must hold does not; an aim that is missed is said, and no
failure.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from serve.engine.provider import choose_provider
from serve.errors import ProviderError
from tests.bench.report import Target, print_targets, say, write
from tests.gpu import session
from tests.gpu.checks import CHECKS, Plan
from tests.host_device import HostDevice, ReplayedByHand

NO_GPU = 3
DRY = Plan(
    provider="cpu", largest=8, seconds=0.1, memory_seconds=0.5, count=64, training_steps=8, recording=ReplayedByHand,
    compile_options={"backend": "eager"}, device=HostDevice,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="Check and measure on a GPU.")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"which (default: all): {', '.join(CHECKS)}")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: build/gpu-check.json, build/gpu-session.json)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement (default: 2)")
    parser.add_argument("--session", action="store_true", help="stages in order, each under a time limit, with a decision each")
    parser.add_argument("--total", type=float, default=session.TOTAL_S, help="seconds of a session (default: 600)")
    parser.add_argument("--dry-run", action="store_true", help="try a session on the CPU, with host memory in the GPU's place")
    flags = parser.parse_args()
    if flags.session:
        return run_session(flags)
    if unknown := set(flags.checks) - set(CHECKS):
        parser.error(f"{min(unknown)!r} is no check; there are {', '.join(CHECKS)}")
    if reason := no_gpu():
        print(f"no GPU to check on: {reason}", file=sys.stderr)
        return NO_GPU
    out = flags.out or Path("build/gpu-check.json")
    return run(Plan(seconds=flags.seconds, memory_seconds=20 * flags.seconds), flags.checks or list(CHECKS), out)


def run_session(flags: argparse.Namespace) -> int:
    """Run the stages; CUDA is called in their processes alone, for a process that has cannot be forked."""
    out = flags.out or Path("build/gpu-session.json")
    if flags.dry_run:
        return session.run(DRY, out, flags.total)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            reason, device = pool.submit(_found).result()
    except BrokenProcessPool:
        reason, device = "looking for one has ended its process", ""
    if reason:
        print(f"no GPU to check on: {reason}", file=sys.stderr)
        return NO_GPU
    plan = Plan(seconds=flags.seconds, memory_seconds=5 * flags.seconds)
    return session.run(plan, out, flags.total, device=device)


def _found() -> tuple[str | None, str]:
    """Why there is nothing to check on, and what there is."""
    reason = no_gpu()
    return reason, "" if reason else torch.cuda.get_device_name()


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
