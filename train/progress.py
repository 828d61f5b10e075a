"""Shows progress on standard error: as a bar on a terminal, otherwise as one line a minute."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

LINE_EVERY_S = 60.0


class _Lines:
    """What is used of tqdm's bar, for standard error that is no terminal: carriage returns would fill the file with bars."""

    def __init__(self, total: int | None, what: str, initial: int, unit: str) -> None:
        self._total, self._what, self._unit = total, what, unit
        self._initial = self._done = initial
        self._begun = self._said = time.monotonic()
        self._figures = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def update(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said < LINE_EVERY_S or self._done == self._total:
            return
        self._said = now
        line = f"{self._what}: {self._unit} {self._done:,}"
        if self._total:
            left_s = (now - self._begun) / (self._done - self._initial) * (self._total - self._done)
            line += f" of {self._total:,}, about {left_s / 60:,.0f} min left"
        print(line + self._figures, file=sys.stderr, flush=True)

    def set_description(self, text: str, refresh: bool) -> None:
        self._what = text

    def set_postfix(self, refresh: bool, **figures: str) -> None:
        self._figures = "".join(f", {name} {value}" for name, value in figures.items())


def progress_bar(
    total: int | None, what: str, *, unit: str = "step", initial: int = 0, disable: bool = False, **tqdm_own: Any
) -> Any:
    """A context manager with tqdm's ``update``, ``set_description`` and ``set_postfix``; a line is said while it goes on."""
    if disable or sys.stderr.isatty():
        return tqdm(total=total, initial=initial, unit=unit, desc=what, mininterval=1, disable=disable, **tqdm_own)
    return _Lines(total, what, initial, unit)
