"""The errors of the domain. They know nothing of gRPC or ONNX Runtime.

``serve.api.status`` has the table from these to status codes; ``serve.cli`` prints a StartError as one line.
"""

from __future__ import annotations


class ServeError(Exception):
    """Base of all errors whose text may be shown to a caller or operator. What else they have is for programs."""

    reason = "INTERNAL"  # why, in upper case; it stays the same when the text is reworded
    field = ""  # of the request, as its protocol calls it; "" where none is at fault
    limit: float | None = None  # the bound that was passed
    denial = ""  # where somebody is kept out: the reason in one word, for the metrics
    model, version = "", 0  # which was asked, as far as it was known

    def about(self, model: str, version: int) -> None:
        """Which model was asked."""
        self.model, self.version = model, version


class StartError(ServeError):
    """The server cannot start: a setting, a bundle, a provider or a port."""


class SettingsError(StartError):
    """A flag or environment variable with an unusable value."""


class BundleError(StartError):
    """A bundle that is missing, half-written, tampered with or of the wrong signature."""


class DigestError(BundleError):
    """A bundle's file that is not the one that was exported."""


class GoldenError(BundleError):
    """A model that does not give the pixels that its bundle's golden samples call for."""


class ProviderError(StartError):
    """The execution provider that was asked for cannot be had."""


class RequestError(ServeError):
    """A request field with an unusable value: the text names field, value and limit."""

    reason = "INVALID_REQUEST"

    def __init__(self, message: str, field: str, limit: float | None = None) -> None:
        super().__init__(message)
        self.field, self.limit = field, limit


class UnsupportedError(ServeError):
    """A call of a protocol that this server does not answer."""

    reason = "UNSUPPORTED"


class UnknownModelError(ServeError):
    """No such model or version: the text lists what there is."""

    reason = "UNKNOWN_MODEL"

    def __init__(self, message: str, model: str, version: int = 0) -> None:
        super().__init__(message)
        self.about(model, version)


class UnauthenticatedError(ServeError):
    """No token, or none that is known and still valid."""

    def __init__(self, message: str, denial: str) -> None:
        super().__init__(message)
        self.denial = denial
        self.reason = f"TOKEN_{denial.upper()}"


class ForbiddenError(ServeError):
    """A known caller who may not do this."""

    denial = "scope"
    reason = "SCOPE_MISSING"


class BusyError(ServeError):
    """Try again. ``retry_after_s`` is when a place is likely."""

    def __init__(self, message: str, retry_after_s: float, limit: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s, self.limit = retry_after_s, limit


class QueueFullError(BusyError):
    """The queue is at its bound."""

    reason = "QUEUE_FULL"


class CallerLimitError(BusyError):
    """This caller has reached a limit of its own: images in flight, requests a second, or its share of the memory."""

    def __init__(self, message: str, retry_after_s: float, denial: str, limit: float) -> None:
        super().__init__(message, retry_after_s, limit)
        self.denial = denial
        self.reason = f"CALLER_{denial.upper()}"


class OverloadedError(BusyError):
    """The calls that are open hold as much memory as they may."""

    reason = "OVERLOADED"


class CallerLeftError(ServeError):
    """The caller has cancelled the call, or its connection has ended."""

    reason = "CALLER_LEFT"


class ExpiredError(ServeError):
    """The deadline passed while rows still waited."""

    reason = "DEADLINE_PASSED"


class UnavailableError(ServeError):
    """The server is draining, or the model is not ready."""

    reason = "MODEL_NOT_READY"


class DrainingError(UnavailableError):
    """The process is stopping; another replica answers."""

    reason = "DRAINING"


class EngineError(ServeError):
    """A model run failed, hung or lost its thread. The text stays in the log; callers get a fixed one."""


class OutOfMemoryError(EngineError):
    """There was no memory for a run, on the device or page-locked beside it. The next run may have it."""


class DeviceLostError(EngineError):
    """The device has failed. CUDA's errors stay with the process: every later run of it fails too."""
