"""The log on stderr: text, or one JSON object per line, with the id of the request that a line belongs to.

A thread that serves never waits for whoever reads the log: lines go through a bounded queue to a thread that writes them. What a
library logs because of what a caller sent is muted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from contextvars import ContextVar
from datetime import UTC, datetime

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID_CHARACTERS = 128
STDERR = 2
LINES_AHEAD = 2000  # that wait to be written; more are dropped
FLUSH_S = 1.0  # for what waits, when the process ends
EVERY_S = 1.0  # a line that says how many there were


current_call: ContextVar[tuple[str, str]] = ContextVar("current_call", default=("", ""))  # its ``x-request-id`` and trace id


def configure(level: str, log_format: str) -> None:
    """Log from ``level`` on, as ``text`` or ``json``. May be called again; where others have set the log up, it stays theirs."""
    root = logging.getLogger()
    handler = next((each for each in root.handlers if isinstance(each, QueuedHandler)), None)
    if handler is None:
        if root.handlers:
            return
        handler = QueuedHandler(STDERR)
        root.addHandler(handler)
    root.setLevel(level.upper())
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT_FORMAT))


def last_line(text: str) -> None:
    """Say why the process ends, after what was logged: as an object where the log is JSON. It ends although nobody reads it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, QueuedHandler):
            record = logging.LogRecord("serve", logging.CRITICAL, __file__, 0, text, None, None)
            handler.say(handler.format(record) if isinstance(handler.formatter, JsonFormatter) else f"error: {text}")
            handler.flush()
            return
    print(f"error: {text}", file=sys.stderr)


class QueuedHandler(logging.Handler):
    """Writes to a descriptor in a thread of its own; drops lines, and says how many, where they are not taken fast enough.

    Not to a stream of Python's: a thread that hangs in one when the interpreter ends aborts the process.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(LINES_AHEAD)
        self._dropped = 0
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.say(self.format(record))  # here, for it names the request
        except Exception:
            self.handleError(record)

    def say(self, line: str) -> None:
        """Write a line as it is, after those before."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Wait until all is written, for ``FLUSH_S`` at most."""
        deadline = time.monotonic() + FLUSH_S
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def _write_all(self) -> None:
        said, say_at = 0, 0.0
        while True:
            self._write(self._lines.get())
            dropped = self._dropped
            if dropped > said and time.monotonic() >= say_at:
                text = f"{dropped - said} lines were dropped: they were not read fast enough"
                said, say_at = dropped, time.monotonic() + EVERY_S
                self._write(self.format(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)))
            self._lines.task_done()

    def _write(self, line: str) -> None:
        content = line.encode(errors="backslashreplace") + b"\n"
        with contextlib.suppress(OSError):  # a full disk, a reader who has left: there is nowhere to say it
            while content:
                content = content[os.write(self._descriptor, content) :]


class Muted(logging.Filter):
    """Has a logger say one fixed text, a line a second at most: what a library logs can hold what a caller sent."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        self._next_at = 0.0
        self._unsaid = 0

    def enabled(self, level: int) -> bool:
        """As the logger's ``isEnabledFor``: what is not said is not even made a record of, which takes 10 µs."""
        if level < logging.ERROR:  # not what the text is about
            return False
        if time.monotonic() < self._next_at:
            self._unsaid += 1
            return False
        return True

    def filter(self, record: logging.LogRecord) -> bool:
        unsaid, self._unsaid = self._unsaid, 0
        self._next_at = time.monotonic() + EVERY_S
        record.msg, record.args = self._text + (f"; {unsaid} more since the last such line" if unsaid else ""), None
        record.exc_info = record.exc_text = record.stack_info = None
        return True


def mute(logger: str, text: str) -> None:
    """Have a library's logger say ``text`` and nothing else."""
    muted = logging.getLogger(logger)
    if not any(isinstance(each, Muted) for each in muted.filters):
        says = Muted(text)
        muted.addFilter(says)
        muted.isEnabledFor = says.enabled  # type: ignore[method-assign]  # before a record is made


class JsonFormatter(logging.Formatter):
    """Keys: time, level, logger, message; request_id and trace_id within a call that has them; error for a stack trace."""

    def format(self, record: logging.LogRecord) -> str:
        request_id, trace_id = current_call.get()
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id[:MAX_REQUEST_ID_CHARACTERS],
            "trace_id": trace_id,
            "error": self.formatException(record.exc_info) if record.exc_info else "",
        }
        return json.dumps({key: value for key, value in entry.items() if value != ""}, ensure_ascii=False)
