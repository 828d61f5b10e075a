"""What all command lines share: one-line errors, no abbreviated flags, bounded numbers, and a clean end."""

from __future__ import annotations

import argparse
import codecs
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn, TypeVar

SHOWN = "digits-shown"  # how what an encoding lacks is printed
LOSING = ("strict", "surrogateescape")  # ways that end a command at a character which its terminal lacks
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


def failed(text: object, status: int = 2) -> int:
    """Say in one line on standard error what went wrong. Returns the exit status: 2 for what is to be asked otherwise."""
    print(f"error: {text}", file=sys.stderr)
    return status


def told(error: OSError) -> str:
    """What the system says, after the file that it says it of."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


class OutputError(Exception):
    """Standard output takes no more. No OSError: commands tell of those as of the files that they write."""


class _Stream(io.FileIO):
    """Standard output, whose failure is OutputError, or standard error, which is lost where nobody takes it."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if self.fileno() == 2:
                return len(content)
            raise OutputError(error.errno, error.strerror) from None


def open_standard_streams() -> None:
    """First thing in a process: descriptors 0 to 2 that came closed lead nowhere, and what is printed can fail in one way only.

    What is opened next would else be one of them: uvloop aborts when it closes it, and others would print into it. A character
    that the terminal's encoding lacks is printed as its escape, and a byte of a file's name that is no text as itself.
    """
    codecs.register_error(SHOWN, _shown)
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name, number in (("stdout", 1), ("stderr", 2)):
        was: Any = getattr(sys, name)
        if was is None or was.fileno() == number:  # else a test's own
            options = {"encoding": was.encoding, "write_through": was.write_through} if was else {}
            errors = was.errors if was and was.errors not in LOSING else SHOWN
            line_buffering = was.line_buffering if was else False
            stream = io.BufferedWriter(_Stream(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(stream, **options, errors=errors, line_buffering=line_buffering))


def _shown(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def encodable(text: str) -> str:
    """The text. Raises UnicodeEncodeError if standard output's encoding lacks a character of it."""
    text.encode(sys.stdout.encoding or "utf-8")
    return text


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command line as the process's main. SIGTERM raises an exception, so that half-written files are removed.

    Without a handler the kernel drops the signal for process 1, as which a command runs in a container. Ctrl-C, and a reader
    who has left (``head`` for one), end it without complaint; standard output that is full is one line.
    """
    open_standard_streams()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED_BY_SIGNAL + signal.SIGTERM))
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = ENDED_BY_SIGNAL + signal.SIGINT
    except OutputError as error:
        drop_output()
        status = ENDED_BY_SIGNAL + signal.SIGPIPE
        if error.args[0] != errno.EPIPE:
            status = failed(f"standard output cannot be written to ({error.args[1]})")
    sys.exit(status)


def drop_output() -> None:
    """Have what is still printed go nowhere: nobody reads standard output, and Python would complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def release() -> str:
    """The installed distribution's version, or ``source`` when it runs from a checkout that was never installed."""
    try:
        return version("digits-serve")
    except PackageNotFoundError:
        return "source"
