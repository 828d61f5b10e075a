"""The table from errors to status codes, for gRPC and HTTP."""

from __future__ import annotations

import logging
import uuid
from typing import NamedTuple

import grpc

from serve.errors import (
    BusyError,
    CallerLeftError,
    CallerLimitError,
    DrainingError,
    EngineError,
    ExpiredError,
    ForbiddenError,
    OverloadedError,
    QueueFullError,
    RequestError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
    UnsupportedError,
)

log = logging.getLogger(__name__)

# A text goes over gRPC as metadata, of which clients take 8 KiB: of more they make RESOURCE_EXHAUSTED, whatever the status.
MOST_CHARACTERS = 2000

Code = grpc.StatusCode

STATUS: dict[type[Exception], tuple[grpc.StatusCode, int]] = {
    RequestError: (Code.INVALID_ARGUMENT, 400),
    UnauthenticatedError: (Code.UNAUTHENTICATED, 401),
    ForbiddenError: (Code.PERMISSION_DENIED, 403),
    UnknownModelError: (Code.NOT_FOUND, 404),
    UnsupportedError: (Code.UNIMPLEMENTED, 501),
    QueueFullError: (Code.RESOURCE_EXHAUSTED, 429),
    CallerLimitError: (Code.RESOURCE_EXHAUSTED, 429),
    OverloadedError: (Code.RESOURCE_EXHAUSTED, 429),
    CallerLeftError: (Code.CANCELLED, 499),
    UnavailableError: (Code.UNAVAILABLE, 503),
    DrainingError: (Code.UNAVAILABLE, 503),
    ExpiredError: (Code.DEADLINE_EXCEEDED, 504),
}


class Refusal(NamedTuple):
    """How a call that failed is answered. ``retry_after_s``: when a place is likely; None where that is not the reason."""

    code: grpc.StatusCode
    http_status: int
    text: str
    retry_after_s: float | None = None


def refusal(error: Exception) -> Refusal:
    """The answer to an error. Anything unforeseen gets a fixed text and an id; the log has the rest."""
    known = STATUS.get(type(error))
    if known is None:
        error_id = uuid.uuid4().hex[:12]
        if isinstance(error, EngineError):
            log.error("error %s: %s", error_id, error)
        else:
            log.error("error %s", error_id, exc_info=error)
        return Refusal(Code.INTERNAL, 500, f"internal error {error_id}; the server's log has more")
    text = str(error)
    text = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"
    return Refusal(*known, text, error.retry_after_s if isinstance(error, BusyError) else None)
