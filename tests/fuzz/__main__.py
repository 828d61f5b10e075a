"""``make fuzz``: every target for so many inputs, coverage-guided by atheris (libFuzzer).

    python -m tests.fuzz                           # all targets, over 1,000,000 inputs
    python -m tests.fuzz --runs 2000 --seed 1 idx  # one, briefly, the same inputs every time

Each target runs in a process of its own under a memory limit. An input that finds a defect is kept in build/fuzz/ and
the command ends with 1.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CRASHES = Path("build/fuzz")
MEMORY_BEYOND_START_BYTES = 1 << 30
INPUT_TIMEOUT_S = 20
MAX_INPUT_BYTES = 4096
DEFAULT_RUNS = 110_000  # each


def main() -> int:
    """Run the targets one after the other and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz everything that reads bytes from outside.")
    parser.add_argument("targets", nargs="*", help="which (default: all)")
    parser.add_argument("--runs", type=int, help=f"inputs for each (default: {DEFAULT_RUNS})")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    flags, libfuzzer = parser.parse_known_args()
    if flags.inside:
        fuzz(flags.targets[0], libfuzzer)
    from tests.fuzz.targets import NAMES  # noqa: PLC0415  # inside, it must be imported under atheris' eyes

    CRASHES.mkdir(parents=True, exist_ok=True)
    total, failed = 0, []
    print("target        inputs  seconds  inputs/s")
    for name in flags.targets or NAMES:
        runs = flags.runs or DEFAULT_RUNS
        started = time.perf_counter()
        done, log = run_target(name, runs, flags.seed)
        seconds = time.perf_counter() - started
        total += done
        print(f"{name:10s} {done:9,d} {seconds:8.1f} {done / seconds:9,.0f}", flush=True)
        if done < runs:
            failed.append(name)
            print(log[-1500:], file=sys.stderr)
    print(f"{'all':10s} {total:9,d}; {'defects in ' + ', '.join(failed) if failed else 'no defect'}")
    return 1 if failed else 0


def run_target(name: str, runs: int, seed: int) -> tuple[int, str]:
    """Fuzz one target in a process of its own: the inputs it got through, and what was said."""
    from tests.fuzz.targets import seeds  # noqa: PLC0415  # as above

    with tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(seeds(name)):
            (Path(corpus) / str(number)).write_bytes(content)
        command = [
            sys.executable, "-m", "tests.fuzz", "--inside", name, f"-runs={runs}", f"-seed={seed}", f"-timeout={INPUT_TIMEOUT_S}",
            f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={CRASHES}/{name}-", "-rss_limit_mb=4096", corpus,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    finished = re.search(r"^Done (\d+) (?:runs )?in", done.stderr, re.MULTILINE)
    if done.returncode == 0 and finished:
        return int(finished[1]), done.stderr
    reached = [int(number) for number in re.findall(r"^#(\d+)\s", done.stderr, re.MULTILINE)]
    return min(max(reached, default=0), runs - 1), done.stderr


def fuzz(name: str, libfuzzer: list[str]) -> None:
    """Inside the target's own process. Does not return."""
    import atheris  # noqa: PLC0415  # only here: nothing else is instrumented

    with atheris.instrument_imports(include=["serve", "train.data"]):
        from tests.fuzz.targets import make_target  # noqa: PLC0415

    target = make_target(name)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BEYOND_START_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    atheris.Setup([sys.argv[0], *libfuzzer], target)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
