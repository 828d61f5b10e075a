"""``make mutate``: put the faults in one at a time, on a copy of what git tracks, and see whether the tests for them fail.

    python -m tests.mutate                    # all of them; writes docs/mutations.md
    python -m tests.mutate --only train/      # those of some files, as lines on standard output
    python -m tests.mutate --stale            # no tests: lists in a second the faults whose place in the code is gone

Exit status 1 when fewer than nine in ten are caught, or when a fault is stale: its place is gone, or its tests are.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Set
from datetime import date
from pathlib import Path

from tests.mutate.faults import FAULTS, Fault
from tests.mutate.planting import StaleError, file_of, plant

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "mutations.md"
TIMEOUT_S = 300
WANTED = 0.9
# Faults that no test is asked to see, and why.
EXCUSED: dict[str, str] = {}
FAILED = 1  # pytest's exit status when tests ran and some of them failed


def main() -> int:
    """Run the faults and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description="See whether the tests find planted faults.")
    parser.add_argument("--only", default="", help="faults of files whose path begins so")
    parser.add_argument("--stale", action="store_true", help="run no tests; list the faults whose place is gone")
    flags = parser.parse_args()
    chosen = [fault for fault in FAULTS if fault.place.startswith(flags.only)]
    if not chosen:
        parser.error(f"no fault is in a file whose path begins with {flags.only!r}; see tests/mutate/faults.py")
    if flags.stale:
        return report_stale([(fault, problem) for fault in chosen if (problem := why_stale(fault))])
    results: list[tuple[Fault, str]] = []
    stale: list[tuple[Fault, str]] = []
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        copy = Path(scratch) / "copy"
        copy_tree(copy)
        for number, fault in enumerate(chosen, 1):
            started = time.monotonic()
            try:
                caught = run_fault(copy, fault)
                said = caught or "SURVIVED"
            except StaleError as error:
                caught, said = "", f"stale: {error}"
                stale.append((fault, str(error)))
            results.append((fault, caught))
            took_s = time.monotonic() - started
            print(f"{number}/{len(chosen)} {file_of(fault)}: {fault.what}: {said} ({took_s:.0f} s)", flush=True)
    share = sum(bool(caught) for _, caught in results) / len(results)
    if not flags.only:
        TABLE.write_text(as_markdown(results, {fault for fault, _ in stale}), encoding="utf-8")
    print(f"{share:.1%} of {len(results)} faults are caught")
    return report_stale(stale) or (0 if share >= WANTED else 1)


def why_stale(fault: Fault) -> str:
    """Why a fault cannot be put in, or nothing."""
    try:
        plant(ROOT, fault)
    except StaleError as error:
        return str(error)
    return ""


def report_stale(stale: list[tuple[Fault, str]]) -> int:
    """Print the stale faults, a line each; the exit status."""
    for fault, problem in stale:
        print(f"stale: {fault.what}: {problem}")
    return 1 if stale else 0


def copy_tree(copy: Path) -> None:
    """What git tracks, and the environments beside it."""
    copy.mkdir()
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    for name in (".venv", "build"):
        if (ROOT / name).exists():
            (copy / name).symlink_to(ROOT / name)


def run_fault(copy: Path, fault: Fault) -> str:
    """Put a fault in, run its tests, take it out; the test that failed, or nothing when none did.

    Raises StaleError when there is no place for it, or when its tests cannot be run.
    """
    planted = plant(copy, fault)
    path = copy / file_of(fault)
    honest = path.read_text(encoding="utf-8")
    path.write_text(planted, encoding="utf-8")
    quietly = ("-x", "-q", "--timeout=90", "-pno:cacheprovider")
    command = [sys.executable, "-m", "pytest", *quietly, *shlex.split(_quoted(fault.tests))]
    # The copy, and not the tree that the environment was installed from, is what the tests and their servers import.
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"nothing ended within {TIMEOUT_S} s"
    finally:
        path.write_text(honest, encoding="utf-8")
    if done.returncode not in (0, FAILED):
        print(f"{done.stdout[-3000:]}{done.stderr[-1000:]}", file=sys.stderr)
        raise StaleError(f"its tests ended with pytest's status {done.returncode}: {fault.tests}")
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py::\w+)", done.stdout, re.MULTILINE)
    return failed[1] if failed and done.returncode == FAILED else ""


def _quoted(tests: str) -> str:
    """What follows -k is one expression."""
    files, marker, expression = tests.partition(" -k ")
    return f"{files}{marker}{shlex.quote(expression)}" if marker and "--" not in expression else tests


def as_markdown(results: list[tuple[Fault, str]], stale: Set[Fault] = frozenset()) -> str:
    """The table for the docs."""
    caught = sum(bool(name) for _, name in results)
    lines = [
        "# Planted faults, and the tests that find them",
        "",
        f"{caught} of {len(results)} are caught; written on {date.today().isoformat()} by `make mutate`, which puts each into",
        "a copy of the tree and runs the tests that concern it. The list is `tests/mutate/faults.py`: a fault names a function",
        "and a piece of its code. `python -m tests.mutate --stale` lists those whose place in the code is gone.",
        "",
        "| fault | file | caught by |",
        "|---|---|---|",
    ]
    for fault, name in results:
        otherwise = "stale" if fault in stale else EXCUSED.get(fault.what, "nothing")
        lines.append(f"| {fault.what} | `{file_of(fault)}` | {f'`{name}`' if name else otherwise} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
