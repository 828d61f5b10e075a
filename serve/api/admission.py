"""Admission: what every call passes through, by whichever protocol, in any thread. It is admitted, counted, timed and traced."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from serve.access.budget import Budget, Hold
from serve.access.identity import Accounts, Caller, Scope
from serve.api.status import Refusal, refusal
from serve.background import until
from serve.core.request import Digits, DigitsRequest
from serve.errors import CallerLeftError, DrainingError, ServeError
from serve.observability.call_metrics import CallMetrics
from serve.observability.logs import current_call
from serve.observability.metrics import Metrics
from serve.observability.tracing import Described, Span, Tracing

log = logging.getLogger(__name__)

DENIALS_EVERY_S = 1.0

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


class DenialLog:
    """Logs denied callers, at most one line a second, so that guessing cannot fill the log."""

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
    """The state that all calls of a server share, and the set of open calls."""

    def __init__(self, metrics: Metrics, accounts: Accounts, budget: Budget, tracing: Tracing | None = None) -> None:
        self.metrics = metrics
        self.accounts = accounts
        self.budget = budget
        self.tracing = tracing
        self.denials = DenialLog()
        self.open: dict[Call, None] = {}  # admitted, their answers not sent yet
        self.closed = False

    async def close(self, timeout_s: float) -> None:
        """Admit no more calls, and wait until every answer has been sent, or the time is over."""
        self.closed = True
        await until(lambda: not self.open, time.monotonic() + timeout_s)


class Call:
    """One call from its start to its end, as all protocols have it.

    Its protocol calls ``admit``; then, once, ``answered`` or ``failed``; and ``sent`` when the answer is on its way or has nobody
    to go to: until then what the call holds is held.
    """

    __slots__ = ("_admission", "_observed", "_scope", "_span", "_started", "_trace_id", "caller", "deadline", "hold")

    def __init__(
        self,
        admission: Admission,
        observed: CallMetrics,
        caller: Caller,
        deadline: float | None,
        describe: Callable[[], Described] | None = None,
    ) -> None:
        """``deadline`` on ``time.monotonic()``; None without one. ``describe`` is for the call's span; None without tracing."""
        self._admission = admission
        self._observed = observed
        self._scope: Scope = "open"
        self._started = time.perf_counter()
        self._span: Span | None = None
        self.caller = caller
        self.deadline = deadline
        self.hold: Hold
        observed.started()
        self._trace_id = ""
        if describe is not None and admission.tracing is not None:
            self._trace_id, self._span = admission.tracing.begin(describe, caller.trace)

    def admit(self, scope: Scope) -> None:
        """Count the call. Raises DrainingError while draining, or as ``Accounts.admit`` does."""
        self._scope = scope
        admission = self._admission
        admission.open[self] = None  # before the look: closing sees it, or it sees the closing
        if admission.closed:
            raise DrainingError("the server is stopping; ask another replica")
        self.hold = Hold(admission.accounts.admit(self.caller, scope), self.caller, admission.budget)

    def another_hold(self) -> Hold:
        """For a request of a stream, whose answer is sent before the call is over."""
        return Hold(self.hold.account, self.caller, self._admission.budget)

    def check_again(self) -> None:
        """Raises UnauthenticatedError or ForbiddenError when the caller would not be admitted any more."""
        self._admission.accounts.identify(self.caller, self._scope)

    def within(self, function: Callable[ParamsT, ResultT], *arguments: ParamsT.args, **named: ParamsT.kwargs) -> ResultT:
        """Call the function; log lines from inside carry the call's request id and trace id."""
        if not self.caller.request_id and not self._trace_id:
            return function(*arguments, **named)
        token = current_call.set((self.caller.request_id, self._trace_id))
        try:
            return function(*arguments, **named)
        finally:
            current_call.reset(token)

    def enter_log(self) -> None:
        """Have the log lines of this task, and of those that it begins, carry the ids."""
        current_call.set((self.caller.request_id, self._trace_id))

    def asks(self, request: DigitsRequest) -> None:
        """What the call asks for."""
        if self._span is not None:
            self._span.about(request.model, request.version, request.count)

    def encoded(self, digits: Digits, encode_s: float) -> None:
        """The rows are encoded: the phases of the call are known."""
        digits.model.metrics.answer(digits.encoding, digits.count, digits.wait_seconds, encode_s)
        if self._span is not None:
            self._span.about(digits.model.manifest.name, digits.model.manifest.version)
            self._span.phases(digits.queued_at, digits.queue_seconds, digits.compute_seconds, encode_s, digits.count)

    def answered(self, http_status: int = 200) -> None:
        """The answer has been made."""
        self._ended("OK", http_status)

    def failed(self, error: Exception) -> Refusal:
        """Count what went wrong; returns what to answer."""
        if isinstance(error, ServeError) and error.denial:
            self._admission.metrics.access_denied.labels(error.denial).inc()
            self._admission.denials.note(self.caller, error)
        if isinstance(error, DrainingError):
            self._admission.metrics.drain_refusals.inc()
        answer = refusal(error)
        if self._span is not None:
            self._span.about(answer.model, answer.version)
        self._ended(answer.code.name, answer.http_status, answer.reason)
        return answer

    def left(self) -> None:
        """The caller has left before there was an answer."""
        self.failed(CallerLeftError("the caller has left"))

    def sent(self) -> None:
        """What the call holds is given back. May be called again."""
        if self._admission.open.pop(self, self) is None and hasattr(self, "hold"):
            self.hold.give_back()

    def _ended(self, code: str, http_status: int, reason: str = "") -> None:
        self._observed.ended(code, http_status, time.perf_counter() - self._started)
        if self._span is not None:
            self._span.end(code, http_status, reason)
