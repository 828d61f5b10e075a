"""The one exception of the client, and how the values of a request are checked before it is sent."""

from __future__ import annotations

import operator
from typing import Any, SupportsFloat, SupportsIndex

import grpc

RETRY_AFTER = "grpc-retry-pushback-ms"
MOST_TIMEOUT_S = 86400.0  # as of the command line; gRPC takes what is much longer for a time that has passed
MOST_RETRY_DIGITS = 10  # four months; Python refuses to read thousands


class DigitError(grpc.RpcError):
    """A call that was not answered, or could not be made: what ``DigitClient`` and ``AsyncDigitClient`` raise.

    ``code()`` and ``details()`` are those of a ``grpc.RpcError``: a status code, and one line of text. ``retry_after_s`` is
    when an overloaded server has room again, None where it did not say.
    """

    def __init__(self, code: grpc.StatusCode, text: str, retry_after_s: float | None = None) -> None:
        super().__init__(code, text, retry_after_s)  # so that it can be pickled
        # Much of it is a server's: what would move the terminal's cursor is an escape.
        shown = (each if each.isprintable() else each.encode("unicode_escape").decode() for each in " ".join(text.split()))
        self._code, self._text = code, "".join(shown)
        self.retry_after_s = retry_after_s

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def __str__(self) -> str:
        return f"{self._code.name}: {self._text}"


def mistake(text: str) -> DigitError:
    """For what is wrong with a request, a target or a file before anything was sent."""
    return DigitError(grpc.StatusCode.INVALID_ARGUMENT, text)


def unusable(text: str) -> DigitError:
    """For an answer that no server of this service gives."""
    return DigitError(grpc.StatusCode.INTERNAL, f"the server's answer cannot be used: {text}")


def retry_after_s(error: Any) -> float | None:
    """What an error's trailing metadata say of when to come back."""
    for key, value in error.trailing_metadata() or ():
        if key == RETRY_AFTER and value.isdecimal() and len(value) <= MOST_RETRY_DIGITS:  # a negative one says: never
            return int(value) / 1000
    return None


def whole(name: str, value: SupportsIndex, bits: int) -> int:
    """``value`` as an int of so many bits, numpy's and torch's integers too. Raises TypeError or DigitError naming the field."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r:.64}") from None
    if not 0 <= number < 1 << bits:
        raise mistake(f"{name} must be from 0 to 2^{bits} - 1, got {number}")
    return number


def real(name: str, value: SupportsFloat) -> float:
    """``value`` as a float. Raises TypeError naming the field."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r:.64}") from None


def timeout(value: SupportsFloat) -> float:
    """A client's ``timeout_s``. Raises TypeError or DigitError."""
    seconds = real("timeout_s", value)
    if not 0 < seconds <= MOST_TIMEOUT_S:
        raise mistake(f"timeout_s must be more than 0 and at most {MOST_TIMEOUT_S:g}, got {seconds:g}")
    return seconds
