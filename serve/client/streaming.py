"""A stream's progress: which digits are still to be requested when its connection ends."""

from __future__ import annotations

import grpc

from serve.client.digits import Digits, from_response
from serve.client.errors import DigitError
from serve.pb.digits.v1 import digits_pb2 as pb

ATTEMPTS = 3  # without a chunk between; gRPC itself makes each up to five times
BACKOFF_S = 0.2
RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED)


class Progress:
    """The digits that have come, and the request for the rest."""

    def __init__(self, request: pb.GenerateStreamRequest) -> None:
        self._request = request
        self._begun = False
        self._failures = 0

    @property
    def rest(self) -> pb.GenerateStreamRequest | None:
        """The request for the remaining digits; None when all have come. A request for none is left to the server to refuse."""
        return self._request if self._request.count or not self._begun else None

    def take(self, response: pb.GenerateResponse) -> Digits:
        """A chunk: the next request begins behind it, in the same stream of the same model, whatever the default is by then.

        Raises DigitError for one that is none.
        """
        request = self._request
        digits = from_response(response, request, request.count)
        self._begun, self._failures = True, 0
        request.seed, request.model, request.version = response.seed, response.model, response.version
        request.start += response.count
        request.count -= response.count
        return digits

    def pause_after(self, failure: DigitError, most_s: float) -> float:
        """Seconds to wait before the rest is asked for; raises ``failure`` where that would be in vain, or over ``most_s``."""
        self._failures += 1
        pause_s = failure.retry_after_s or BACKOFF_S * self._failures
        tried_once = self._begun or failure.retry_after_s is not None  # else gRPC itself has tried it again
        if not tried_once or self._failures >= ATTEMPTS or failure.code() not in RETRYABLE or pause_s > most_s:
            raise failure from None
        return pause_s
