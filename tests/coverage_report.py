"""What the tests run of each package, lines and branches: ``make test-all`` ends with it, and fails below the bounds.

Processes that tests start are counted in (``[tool.coverage]`` in pyproject.toml).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

BRANCHES = {"serve": 90.0, "export": 90.0, "train": 85.0}  # percent, at least


def main() -> int:
    """Print a line for each package; returns 1 when one is below its bound."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "coverage.json"
        command = [sys.executable, "-m", "coverage"]
        subprocess.run([*command, "combine", "--quiet"], check=True)
        subprocess.run([*command, "json", "--quiet", f"-o{out}"], check=True)
        files = json.loads(out.read_text())["files"]
    short = 0
    print("package  lines   branches  at least")
    for package, least in BRANCHES.items():
        sums = [each["summary"] for name, each in files.items() if name.startswith(f"{package}/")]
        lines = 100 * sum(each["covered_lines"] for each in sums) / sum(each["num_statements"] for each in sums)
        branches = 100 * sum(each["covered_branches"] for each in sums) / sum(each["num_branches"] for each in sums)
        print(f"{package:7s} {lines:5.1f} %    {branches:5.1f} %    {least:g} %{'' if branches >= least else '  TOO FEW'}")
        short += branches < least
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
