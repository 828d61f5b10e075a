"""A command line called in the test's own process: what starting Python and loading torch would take is saved."""

from __future__ import annotations

import io
import logging
import subprocess
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout


def in_process(main: Callable[[Sequence[str]], int], *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the command would have ended with, printed and logged."""
    out, error = io.StringIO(), io.StringIO()
    handler, root = logging.StreamHandler(error), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with redirect_stdout(out), redirect_stderr(error):
            status = main(arguments)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), error.getvalue())
