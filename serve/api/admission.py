"""Admission: what every call passes through on every transport, in any thread. It is admitted, counted and timed."""

from __future__ import annotations

import logging
import threading
import time

import grpc

from serve.access.identity import Account, Accounts, Caller, Scope
from serve.api.status import Refusal, refusal
from serve.core.request import Digits
from serve.errors import DrainingError, ServeError
from serve.observability.logs import current_request_id
from serve.observability.metrics import Metrics, RpcMetrics
from serve.observability.tracing import Tracing
from serve.ports.load_report import LoadReports
from serve.waiting import RefCount, until

log = logging.getLogger(__name__)

DENIALS_EVERY_S = 1.0


class InFlight:
    """Counts the calls whose answers are not with their transport yet, and admits no more once it is closed."""

    def __init__(self) -> None:
        self._calls = RefCount()

    def enter(self) -> None:
        """Count a call. Raises DrainingError when it is closed."""
        if not self._calls.enter():
            raise DrainingError("the server is stopping; ask another replica")

    def leave(self) -> None:
        self._calls.leave()

    async def close(self, timeout_s: float) -> None:
        """Admit no more calls, and wait until none is in flight, or the time is over."""
        self._calls.close()
        await until(lambda: not self._calls.calls, time.monotonic() + timeout_s)


class DenialLog:
    """Names who was kept out, in a line a second at most: guessing must not fill the log."""

    def __init__(self) -> None:
        self._next_at = 0.0
        self._unsaid = 0
        self._lock = threading.Lock()

    def note(self, caller: Caller, error: ServeError) -> None:
        """A call has been denied."""
        with self._lock:
            now = time.monotonic()
            if now < self._next_at:
                self._unsaid += 1
                return
            unsaid, self._unsaid = self._unsaid, 0
            self._next_at = now + DENIALS_EVERY_S
        more = f"; {unsaid} more since the last such line" if unsaid else ""
        log.warning("denied: %s, from %s%s", error, caller.address or "an unknown address", more)


class Admission:
    """What the calls of a server share."""

    def __init__(
        self,
        metrics: Metrics,
        in_flight: InFlight,
        accounts: Accounts,
        tracing: Tracing | None = None,
        load_reports: LoadReports | None = None,
    ) -> None:
        self.metrics = metrics
        self.load_reports = load_reports
        self.in_flight = in_flight
        self.accounts = accounts
        self.tracing = tracing
        self.denials = DenialLog()


class Call:
    """One call from its start to its end. Its transport calls ``admit``, then ``failed`` if it failed, then ``ended``.

    ``in_flight`` is for the transport: whether the call was counted, and is to leave once its answer has been sent.
    """

    __slots__ = ("_admission", "_caller", "_code", "_observed", "_scope", "_started", "account", "deadline", "in_flight")

    def __init__(self, admission: Admission, observed: RpcMetrics, deadline: float | None) -> None:
        """``deadline`` on ``time.monotonic()``; None without one."""
        self._admission = admission
        self._observed = observed
        self._code = grpc.StatusCode.CANCELLED  # what ends a call otherwise than by an answer or an error
        self._started = time.perf_counter()
        self.deadline = deadline
        self.in_flight = False
        self.account: Account
        self._caller: Caller
        self._scope: Scope
        observed.started()

    def admit(self, caller: Caller, scope: Scope) -> None:
        """Count the call. Raises DrainingError while draining, or as ``Accounts.admit`` does."""
        current_request_id.set(caller.request_id)
        self._caller, self._scope = caller, scope
        self._admission.in_flight.enter()
        self.in_flight = True
        self.account = self._admission.accounts.admit(caller, scope)

    def check_again(self) -> None:
        """Raises UnauthenticatedError or ForbiddenError when the caller would not be admitted any more."""
        self._admission.accounts.identify(self._caller, self._scope)

    @property
    def caller(self) -> str:
        """Who calls, for the log."""
        return f"{self.account.name} at {self._caller.address or 'an unknown address'}"

    def encoded(self, digits: Digits, encode_s: float) -> None:
        """The rows are encoded: the phases of the call are known."""
        digits.model.metrics.answer(digits.encoding, digits.count, digits.queue_seconds, encode_s)
        if self._admission.tracing is not None:
            self._admission.tracing.phases(digits.queued_at, digits.queue_seconds, digits.compute_seconds, encode_s, digits.count)

    def answered(self) -> None:
        self._code = grpc.StatusCode.OK

    def failed(self, error: Exception) -> Refusal:
        """Count what went wrong; returns what to answer."""
        if isinstance(error, ServeError) and error.denial:
            self._admission.metrics.access_denied.labels(error.denial).inc()
            self._admission.denials.note(self._caller, error)
        if isinstance(error, DrainingError):
            self._admission.metrics.drain_refusals.inc()
        answer = refusal(error)
        self._code = answer.code
        return answer

    def ended(self) -> None:
        """The handler is done."""
        self._observed.ended(self._code.name, time.perf_counter() - self._started)

    def sent(self) -> None:
        """The answer is with the transport, or there is nobody to send it to."""
        if self.in_flight:
            self.in_flight = False
            self._admission.in_flight.leave()
