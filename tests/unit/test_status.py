"""The one table from errors to status codes."""

from __future__ import annotations

import grpc
import pytest

from serve import errors
from serve.api.status import STATUS, refusal


@pytest.mark.parametrize(
    ("error", "code", "http_status"),
    [
        (errors.RequestError("count"), grpc.StatusCode.INVALID_ARGUMENT, 400),
        (errors.UnauthenticatedError("who", "missing"), grpc.StatusCode.UNAUTHENTICATED, 401),
        (errors.ForbiddenError("no"), grpc.StatusCode.PERMISSION_DENIED, 403),
        (errors.UnknownModelError("name"), grpc.StatusCode.NOT_FOUND, 404),
        (errors.UnsupportedError("never"), grpc.StatusCode.UNIMPLEMENTED, 501),
        (errors.ExpiredError("late"), grpc.StatusCode.DEADLINE_EXCEEDED, 504),
        (errors.UnavailableError("draining"), grpc.StatusCode.UNAVAILABLE, 503),
    ],
)
def test_a_domain_error_keeps_its_text(error: Exception, code: grpc.StatusCode, http_status: int) -> None:
    assert refusal(error) == (code, http_status, str(error), None)


def test_a_text_is_none_too_long_for_a_grpc_client() -> None:
    versions = ", ".join(str(10**17 + number) for number in range(5000))
    text = refusal(errors.UnknownModelError(f"model 'mlp' has no version 1; there are {versions}")).text
    assert text.startswith("model 'mlp' has no version 1; there are 100000000000000000, 1")
    assert text.endswith(" …")
    assert len(text.encode()) < 4096


def test_a_full_queue_says_when_to_come_back() -> None:
    assert refusal(errors.QueueFullError("full", 0.25)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "full", 0.25)


def test_every_error_that_a_caller_may_see_has_a_status() -> None:
    def below(kind: type[Exception]) -> set[type[Exception]]:
        return {kind}.union(*(below(each) for each in kind.__subclasses__()))

    only_inside = below(errors.StartError) | {errors.ServeError, errors.BusyError} | below(errors.EngineError)
    assert below(errors.ServeError) - only_inside == set(STATUS)


@pytest.mark.parametrize("error", [errors.EngineError("secret path /model"), KeyError("secret path /model")])
def test_what_was_not_foreseen_shows_an_id_and_nothing_else(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    code, _, text, _ = refusal(error)
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in text
    error_id = text.split()[2].rstrip(";")
    assert error_id in caplog.text
    assert "secret path" in caplog.text
