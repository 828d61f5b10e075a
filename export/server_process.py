"""A server as a process: started with its own command line, stopped at the end of the ``with`` block."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

START_LIMIT_S = 300.0
TAIL = 2000  # characters of a log


class ServerProcess(NamedTuple):
    """A running server's addresses and process number; ``http`` is empty where it has no HTTP port."""

    target: str
    http: str
    pid: int


@contextmanager
def started(module: str, *arguments: str, checkout: Path | None = None) -> Iterator[ServerProcess]:
    """Run ``python -m module`` until the block is left, of another ``checkout`` if one is named.

    Raises RuntimeError with the last of what it said when it does not start in time.
    """
    command = [sys.executable, "-m", module, *arguments]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=checkout) as process,
    ):
        too_late = threading.Timer(START_LIMIT_S, process.kill)
        too_late.start()
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if line.startswith("next"):
                    break
            address = re.search(r"^gRPC +(\S+)$", said, re.MULTILINE)
            http = re.search(r"^HTTP +http://(\S+)/metrics", said, re.MULTILINE)
            too_late.cancel()
            if address is None:
                process.wait()
                errors.seek(0)
                raise RuntimeError(f"{' '.join(command)} did not start: {errors.read()[-TAIL:].strip()}")
            yield ServerProcess(address[1], http[1] if http else "", process.pid)
        finally:
            too_late.cancel()
            process.terminate()
