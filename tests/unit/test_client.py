"""What the client does when a call fails, without a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from serve.client import DigitClient, DigitError
from serve.client import client as client_module
from serve.client.client import ATTEMPTS
from serve.pb.digits.v1 import digits_pb2 as pb
from tests.fake_generator import blank

StatusCode = grpc.StatusCode


class FailedError(grpc.RpcError):
    """A call that ended with a status."""

    def __init__(self, code: grpc.StatusCode, pushback_ms: int = 0) -> None:
        self._code = code
        self._trailing = (("grpc-retry-pushback-ms", str(pushback_ms)),) if pushback_ms else None

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "as the server says"

    def trailing_metadata(self) -> Any:
        return self._trailing


def answering(*codes: grpc.StatusCode, pushback_ms: int = 0) -> tuple[Any, list[float]]:
    """A method that ends with these statuses in turn, and then answers; and the timeouts that it was given."""
    left, timeouts = list(codes), []

    def method(request: object, timeout: float, **options: object) -> str:
        timeouts.append(timeout)
        if left:
            raise FailedError(left.pop(0), pushback_ms)
        return "answered"

    return method, timeouts


def asked(client: DigitClient, method: Any) -> Any:
    client._stub = SimpleNamespace(Generate=method)
    return client._ask("Generate", None, str)


def test_a_call_that_the_server_dropped_unseen_is_made_again_within_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "DROPPED_BACKOFF_S", 0.05)
    with DigitClient("localhost:1", timeout_s=20, wait_for_server=False) as client:
        method, timeouts = answering(StatusCode.CANCELLED, StatusCode.CANCELLED)
        assert asked(client, method) == "answered"
        assert 20 >= timeouts[0] > timeouts[1] > timeouts[2] > 0
        assert timeouts[0] - timeouts[2] >= 0.1, "it waits in between, and the deadline stays"


@pytest.mark.parametrize("code", [StatusCode.UNAVAILABLE, StatusCode.INVALID_ARGUMENT, StatusCode.DEADLINE_EXCEEDED])
def test_what_grpc_has_given_up_or_cannot_help_is_raised(code: grpc.StatusCode) -> None:
    with DigitClient("localhost:1", wait_for_server=False) as client:
        method, timeouts = answering(code)
        with pytest.raises(DigitError) as caught:
            asked(client, method)
    # Nobody is there: that the time passed says less.
    assert caught.value.code() is (StatusCode.UNAVAILABLE if code is StatusCode.DEADLINE_EXCEEDED else code)
    assert len(timeouts) == 1


def test_an_overloaded_server_is_asked_again_when_it_says_and_within_the_deadline_alone() -> None:
    """gRPC would wait as long as the server says, beyond the deadline, and then tell of the deadline alone."""
    with DigitClient("localhost:1", timeout_s=20, wait_for_server=False) as client:
        method, timeouts = answering(StatusCode.RESOURCE_EXHAUSTED, StatusCode.RESOURCE_EXHAUSTED, pushback_ms=50)
        assert asked(client, method) == "answered"
        assert timeouts[0] - timeouts[2] >= 0.1
        for failures, pushback_ms, attempts in ((100, 20_001, 1), (100, 0, 1), (100, 1, ATTEMPTS)):
            method, timeouts = answering(*[StatusCode.RESOURCE_EXHAUSTED] * failures, pushback_ms=pushback_ms)
            with pytest.raises(DigitError, match="RESOURCE_EXHAUSTED: as the server says") as caught:
                asked(client, method)
            assert caught.value.retry_after_s == (pushback_ms / 1000 or None)
            assert len(timeouts) == attempts


def test_a_stream_that_is_traced_is_bounded_and_in_its_callers_context() -> None:
    """OpenTelemetry's interceptors make generators of streams, which cannot be cancelled."""
    release, caller, seen = threading.Event(), ContextVar("caller", default=""), []

    def method(request: pb.GenerateStreamRequest, **options: object) -> Iterator[pb.GenerateResponse]:
        seen.append(caller.get())
        more = request.count > 1
        yield blank(1)
        if more:
            release.wait(30)

    caller.set("mine")
    with DigitClient("localhost:1", timeout_s=2.0, wait_for_server=False) as client:
        client._stub = SimpleNamespace(GenerateStream=method)
        assert [len(each) for each in client.stream(1)] == [1]
        began = time.monotonic()
        with pytest.raises(DigitError):
            list(client.stream(2))
        assert time.monotonic() - began < 20
        release.set()
    assert seen == ["mine", "mine"]


def test_it_ends_with_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "DROPPED_BACKOFF_S", 0.02)
    with DigitClient("localhost:1", timeout_s=0.2, wait_for_server=False) as client:
        method, timeouts = answering(*[StatusCode.CANCELLED] * 1000)
        began = time.monotonic()
        with pytest.raises(DigitError):
            asked(client, method)
    assert time.monotonic() - began < 10
    assert 1 < len(timeouts) <= 11
    assert all(timeout > 0 for timeout in timeouts[:-1]), "the last may come late on a busy machine, and ends at once"
