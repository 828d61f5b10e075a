"""The one table from errors to status codes."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from serve import errors
from serve.api.status import STATUS, Refusal, refusal


@pytest.mark.parametrize(
    ("error", "code", "http_status"),
    [
        (errors.RequestError("count", "count"), grpc.StatusCode.INVALID_ARGUMENT, 400),
        (errors.UnauthenticatedError("who", "missing"), grpc.StatusCode.UNAUTHENTICATED, 401),
        (errors.ForbiddenError("no"), grpc.StatusCode.PERMISSION_DENIED, 403),
        (errors.UnknownModelError("name", "vae"), grpc.StatusCode.NOT_FOUND, 404),
        (errors.UnsupportedError("never"), grpc.StatusCode.UNIMPLEMENTED, 501),
        (errors.ExpiredError("late"), grpc.StatusCode.DEADLINE_EXCEEDED, 504),
        (errors.UnavailableError("draining"), grpc.StatusCode.UNAVAILABLE, 503),
    ],
)
def test_a_domain_error_keeps_its_text(error: Exception, code: grpc.StatusCode, http_status: int) -> None:
    assert refusal(error)[:4] == (code, http_status, str(error), None)


def test_a_text_is_none_too_long_for_a_grpc_client() -> None:
    versions = ", ".join(str(10**17 + number) for number in range(5000))
    text = refusal(errors.UnknownModelError(f"model 'mlp' has no version 1; there are {versions}", "mlp", 1)).text
    assert text.startswith("model 'mlp' has no version 1; there are 100000000000000000, 1")
    assert text.endswith(" …")


@pytest.mark.parametrize("letter", ["x", "é", "你", "😀", "%", "\n", "\ud800"])
def test_a_status_with_its_details_is_none_too_long_for_a_grpc_client(letter: str) -> None:
    long = letter * 5000
    request = errors.RequestError(long, long, 1 << 63)
    busy = errors.CallerLimitError(long, 1e9, "images", 1 << 63)
    for error in (request, busy):
        error.about(long, 10**18)
        answer = refusal(error)
        sent = sum(
            len(key) + (4 * len(value) // 3 if isinstance(value, bytes) else len(value)) for key, value in answer.trailing()
        )
        assert sent + len(quote(answer.text, safe=" ")) < 4096
        assert details(answer)[0].message == answer.text


def details(answer: Refusal) -> tuple[status_pb2.Status, dict[str, Any]]:
    """What a program reads of a refusal: its status, and the details by their names."""
    [content] = [value for key, value in answer.trailing() if key == "grpc-status-details-bin"]
    assert isinstance(content, bytes)
    status = status_pb2.Status.FromString(content)
    found = {}
    for each in status.details:
        message = getattr(error_details_pb2, each.type_url.rpartition(".")[2])()
        assert each.Unpack(message)
        found[type(message).__name__] = message
    return status, found


def test_a_wrong_field_is_named_for_programs_with_its_limit_and_the_model_that_was_asked() -> None:
    error = errors.RequestError("count must be from 1 to 64, got 65", "count", 64)
    error.about("mlp", 3)
    answer = refusal(error)
    status, found = details(answer)
    assert (status.code, status.message) == (grpc.StatusCode.INVALID_ARGUMENT.value[0], str(error))
    assert found.keys() == {"ErrorInfo", "BadRequest"}
    info, [violation] = found["ErrorInfo"], found["BadRequest"].field_violations
    assert (info.reason, info.domain) == ("INVALID_REQUEST", "digits-serve")
    assert dict(info.metadata) == {"limit": "64", "model": "mlp", "version": "3"}
    assert (violation.field, violation.description) == ("count", str(error))
    of_http = {"code": "INVALID_ARGUMENT", "reason": "INVALID_REQUEST", "domain": "digits-serve"}
    assert answer.fields() == {"error": str(error), **of_http, "field": "count", "limit": 64, "model": "mlp", "version": 3}


def test_a_full_queue_says_when_to_come_back() -> None:
    answer = refusal(errors.QueueFullError("full", 0.25, 4096))
    assert answer[:4] == (grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "full", 0.25)
    assert dict(answer.trailing())["grpc-retry-pushback-ms"] == "250"
    found = details(answer)[1]
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 250
    assert (found["ErrorInfo"].reason, found["ErrorInfo"].metadata["limit"]) == ("QUEUE_FULL", "4096")
    assert "BadRequest" not in found
    assert (answer.fields()["retry_after_s"], answer.fields()["limit"]) == (0.25, 4096)


def test_every_reason_is_one_errors_alone() -> None:
    made = [
        errors.UnauthenticatedError("", "missing"),
        errors.CallerLimitError("", 1.0, "images", 1),
        *(kind for kind in STATUS if kind not in (errors.UnauthenticatedError, errors.CallerLimitError)),
    ]
    reasons = [each.reason for each in made]
    assert len(set(reasons)) == len(reasons)
    assert all(re.fullmatch(r"[A-Z][A-Z_]+[A-Z]", reason) for reason in reasons)
    assert errors.ServeError.reason not in reasons, "what is unforeseen has a reason of its own"


def test_every_error_that_a_caller_may_see_has_a_status() -> None:
    def below(kind: type[Exception]) -> set[type[Exception]]:
        return {kind}.union(*(below(each) for each in kind.__subclasses__()))

    only_inside = below(errors.StartError) | {errors.ServeError, errors.BusyError} | below(errors.EngineError)
    assert below(errors.ServeError) - only_inside == set(STATUS)


@pytest.mark.parametrize("error", [errors.EngineError("secret path /model"), KeyError("secret path /model")])
def test_what_was_not_foreseen_shows_an_id_and_nothing_else(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    answer = refusal(error)
    code, _, text, *_ = answer
    assert details(answer)[1]["ErrorInfo"].reason == "INTERNAL"
    assert "secret" not in str(answer.trailing()) + str(answer.fields())
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in text
    error_id = text.split()[2].rstrip(";")
    assert error_id in caplog.text
    assert "secret path" in caplog.text
