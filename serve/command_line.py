"""What all command lines share: one-line errors, no abbreviated flags, bounded numbers, and a clean end."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

ENDED_BY_SIGNAL = 128  # added to the signal's number: the exit status, as a shell gives it

NumberT = TypeVar("NumberT", int, float)


class OneLineParser(argparse.ArgumentParser):
    """argparse's parser, less its habit of printing the whole usage with every error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def within(low: NumberT, high: NumberT) -> Callable[[str], NumberT]:
    """A flag's ``type`` for argparse: a whole number if the bounds are, from ``low`` to ``high``."""

    def read(text: str) -> NumberT:
        value = type(low)(text)
        if not low <= value <= high:  # nan is not
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text[:64]}")
        return value

    read.__name__ = "number" if isinstance(low, float) else "whole number"  # as argparse calls it
    return read


# A message's counts and labels; its versions and indices; its seeds.
UINT32, INT63, UINT64 = within(0, (1 << 32) - 1), within(0, (1 << 63) - 1), within(0, (1 << 64) - 1)
TIMEOUT_S = within(0.001, 86400.0)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Be a command line's process. SIGTERM ends it by an exception, so that what is half-written is taken away.

    Without a handler the kernel drops the signal for process 1, as which a command runs in a container. Ctrl-C, and a reader
    who has left (``head`` for one), end it without complaint.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED_BY_SIGNAL + signal.SIGTERM))
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = ENDED_BY_SIGNAL + signal.SIGINT
    except BrokenPipeError:
        drop_output()
        status = ENDED_BY_SIGNAL + signal.SIGPIPE
    sys.exit(status)


def drop_output() -> None:
    """Have what is still printed go nowhere: nobody reads standard output, and Python would complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
