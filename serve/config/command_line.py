"""What every command line has: complaints of one line, no abbreviated flags, and an end by SIGTERM that cleans up."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

ENDED_BY_SIGTERM = 128 + signal.SIGTERM  # the exit status, as a shell gives it


class OneLineParser(argparse.ArgumentParser):
    """argparse's parser, less its habit of printing the whole usage with every error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def end_on_sigterm() -> None:
    """Let SIGTERM end this process by an exception, so that what is half-written is taken away.

    Without a handler the kernel drops the signal for process 1, as which a command runs in a container.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED_BY_SIGTERM))
