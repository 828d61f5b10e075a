"""The one table from errors to status codes."""

from __future__ import annotations

import grpc
import pytest

from serve import errors
from serve.rpc import PUSHBACK_KEY, to_status


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RequestError("count"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.UnknownModelError("name"), grpc.StatusCode.NOT_FOUND),
        (errors.ExpiredError("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.UnavailableError("draining"), grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_a_domain_error_keeps_its_text(error: Exception, code: grpc.StatusCode) -> None:
    assert to_status(error) == (code, str(error), ())


def test_a_full_queue_says_when_to_come_back() -> None:
    code, _, trailing = to_status(errors.QueueFullError("full", 0.25))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailing == ((PUSHBACK_KEY, "250"),)


@pytest.mark.parametrize("error", [errors.EngineError("secret path /model"), KeyError("secret path /model")])
def test_what_was_not_foreseen_shows_an_id_and_nothing_else(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    code, text, _ = to_status(error)
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in text
    error_id = text.split()[2].rstrip(";")
    assert error_id in caplog.text
    assert "secret path" in caplog.text
