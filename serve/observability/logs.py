"""The log on stderr: text, or one JSON object per line, with the id of the request that a line belongs to."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID_CHARACTERS = 128


current_call: ContextVar[tuple[str, str]] = ContextVar("current_call", default=("", ""))  # its ``x-request-id`` and trace id


def configure(level: str, log_format: str) -> None:
    """Log from ``level`` on, as ``text`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


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


class Muted(logging.Filter):
    """Says a fixed text, once a second at most and with a count, in place of a logger's own lines: they hold a caller's bytes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        self._next_at = 0.0
        self._unsaid = 0

    def attach(self, logger: str) -> None:
        """Begin with a logger, whose filter of an earlier server this one replaces."""
        target = logging.getLogger(logger)
        target.filters = [self]

    def filter(self, record: logging.LogRecord) -> bool:
        self._unsaid += 1
        if record.created < self._next_at:
            return False
        record.msg, record.args, record.exc_info, record.exc_text = f"{self._text} ({self._unsaid} times)", (), None, None
        self._unsaid, self._next_at = 0, record.created + 1.0
        return True
