"""The table from errors to status codes, for gRPC and HTTP, and what programs are told beside the text.

Over gRPC that is google.rpc's error model (https://google.aip.dev/193) in ``grpc-status-details-bin``; over HTTP the same fields
in the JSON of the error.
"""

from __future__ import annotations

import logging
import math
import uuid
from functools import lru_cache
from typing import Any, NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from serve.api.encoding import field_key, pack_field
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
    ServeError,
    UnauthenticatedError,
    UnavailableError,
    UnknownModelError,
    UnsupportedError,
)

log = logging.getLogger(__name__)

DOMAIN = "digits-serve"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
# A text goes over gRPC as metadata, of which clients take 8 KiB: of more they make RESOURCE_EXHAUSTED, whatever the status. With
# the details, which repeat it in base64, a status has 4 KiB at most. A byte that is not printable ASCII is three there.
MOST_BYTES, MOST_ESCAPED_BYTES, MORE = 1200, 500, " …".encode()
MOST_DESCRIPTION_BYTES, MOST_NAME_BYTES = 200, 64
# Errors come in floods: a status is put together as answers are (``serve.api.encoding``), not by protobuf.
MESSAGE, DETAILS = field_key(Status, "message"), field_key(Status, "details")
TYPE_URL, VALUE = field_key(AnyMessage, "type_url"), field_key(AnyMessage, "value")
VIOLATIONS, DESCRIPTION = field_key(BadRequest, "field_violations"), field_key(BadRequest.FieldViolation, "description")

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
    """How a call that failed is answered. ``retry_after_s``: when a place is likely; None where that is not the reason.

    The rest is as in ``ServeError``.
    """

    code: grpc.StatusCode
    http_status: int
    text: str
    retry_after_s: float | None = None
    reason: str = ServeError.reason
    field: str = ""
    limit: float | None = None
    model: str = ""
    version: int = 0

    def trailing(self) -> tuple[tuple[str, str | bytes], ...]:
        """gRPC's metadata that go with the status."""
        head, violation = _head(self.code, self.reason, self.field, self.limit, self.model, self.version)
        status = pack_field(head, MESSAGE, [[self.text.encode()]])
        if self.code is Code.INVALID_ARGUMENT:
            violation = pack_field(violation, DESCRIPTION, [[_cut(self.text, MOST_DESCRIPTION_BYTES)]])
            status += _detail(BadRequest, pack_field(b"", VIOLATIONS, [[violation]]))
        if self.retry_after_s is None:
            return ((DETAILS_KEY, status),)
        milliseconds = max(1, round(self.retry_after_s * 1000))
        delay = Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)
        status += _detail(RetryInfo, RetryInfo(retry_delay=delay).SerializeToString())
        return (DETAILS_KEY, status), (PUSHBACK_KEY, str(milliseconds))

    def fields(self) -> dict[str, Any]:
        """HTTP's JSON: what is empty or unknown is left out."""
        known = {"error": self.text, "code": self.code.name, "reason": self.reason, "domain": DOMAIN}
        retry_after_s = None if self.retry_after_s is None else math.ceil(self.retry_after_s * 1000) / 1000
        about: dict[str, Any] = {
            "field": self.field,
            "limit": self.limit,
            "model": self.model,
            "version": self.version,
            "retry_after_s": retry_after_s,
        }
        return known | {name: value for name, value in about.items() if value}


def refusal(error: Exception) -> Refusal:
    """The answer to an error. Anything unforeseen gets a fixed text and an id; the log has the rest."""
    known = STATUS.get(type(error))
    if known is None:
        error_id = uuid.uuid4().hex[:12]
        text = f"internal error {error_id}; the server's log has more"
        if isinstance(error, EngineError):
            log.error("error %s: %s", error_id, error)
            return Refusal(Code.INTERNAL, 500, text, model=error.model, version=error.version)
        log.error("error %s", error_id, exc_info=error)
        return Refusal(Code.INTERNAL, 500, text)
    assert isinstance(error, ServeError)
    return Refusal(
        *known,
        _text(error),
        error.retry_after_s if isinstance(error, BusyError) else None,
        error.reason,
        error.field and _cut(error.field, MOST_NAME_BYTES).decode(),
        error.limit,
        error.model and _cut(error.model, MOST_NAME_BYTES).decode(),
        error.version,
    )


def _cut(text: str, most: int) -> bytes:
    """The beginning of a text that is too long, as UTF-8."""
    encoded = text.encode(errors="replace")
    return encoded if len(encoded) <= most else encoded[:most].decode(errors="ignore").encode() + MORE


def _text(error: Exception) -> str:
    text = str(error)
    plain = text.isascii() and text.isprintable() and "%" not in text
    return _cut(text, MOST_BYTES if plain else MOST_ESCAPED_BYTES).decode()


@lru_cache(1024)
def _head(code: grpc.StatusCode, *about: Any) -> tuple[bytes, bytes]:
    """Of a status, and of the violation in it if there is one, what is the same whatever the text."""
    reason, field, limit, model, version = about
    bound = f"{limit:g}" if isinstance(limit, float) else str(limit or "")
    known = {"limit": bound, "model": model, "version": str(version or "")}
    metadata = {name: value for name, value in known.items() if value}
    info = ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    violation = BadRequest.FieldViolation(field=field)
    return Status(code=code.value[0]).SerializeToString() + _detail(info, info.SerializeToString()), violation.SerializeToString()


def _detail(kind: Message | type[Message], value: bytes) -> bytes:
    """A serialised message as a detail of a status."""
    any_message = pack_field(b"", TYPE_URL, [[b"type.googleapis.com/" + kind.DESCRIPTOR.full_name.encode()]])
    return pack_field(b"", DETAILS, [[pack_field(any_message, VALUE, [[value]])]])
