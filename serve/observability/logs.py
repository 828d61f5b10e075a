"""The log on stderr: text, or one JSON object per line, with the id of the request that a line belongs to."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

from serve.observability.tracing import current_trace_id

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID_CHARACTERS = 128


current_request_id: ContextVar[str] = ContextVar("current_request_id", default="")  # the ``x-request-id`` of the call


def configure(level: str, log_format: str) -> None:
    """Log from ``level`` on, as ``text`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


class JsonFormatter(logging.Formatter):
    """Keys: time, level, logger, message; request_id and trace_id within a call that has them; error for a stack trace."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": current_request_id.get()[:MAX_REQUEST_ID_CHARACTERS],
            "trace_id": current_trace_id(),
            "error": self.formatException(record.exc_info) if record.exc_info else "",
        }
        return json.dumps({key: value for key, value in entry.items() if value != ""}, ensure_ascii=False)
