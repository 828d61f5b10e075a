"""The errors of the domain. They know nothing of gRPC or ONNX Runtime.

``serve.api.status`` has the table from these to status codes; ``serve.cli`` prints a StartError as one line.
"""

from __future__ import annotations


class ServeError(Exception):
    """Base of all errors whose text may be shown to a caller or operator."""

    denial = ""  # where somebody is kept out: the reason in one word, for the metrics


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


class UnsupportedError(ServeError):
    """A call of a protocol that this server does not answer."""


class UnknownModelError(ServeError):
    """No such model or version: the text lists what there is."""


class UnauthenticatedError(ServeError):
    """No token, or none that is known and still valid."""

    def __init__(self, message: str, denial: str) -> None:
        super().__init__(message)
        self.denial = denial


class ForbiddenError(ServeError):
    """A known caller who may not do this."""

    denial = "scope"


class BusyError(ServeError):
    """Try again. ``retry_after_s`` is when a place is likely."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(BusyError):
    """The queue is at its bound."""


class CallerLimitError(BusyError):
    """This caller has reached a limit of its own: images in flight, or requests a second."""

    def __init__(self, message: str, retry_after_s: float, denial: str) -> None:
        super().__init__(message, retry_after_s)
        self.denial = denial


class OverloadedError(BusyError):
    """The calls that are open hold as much memory as they may, or one caller's hold its share of it."""


class CallerLeftError(ServeError):
    """The caller has cancelled the call, or its connection has ended."""


class ExpiredError(ServeError):
    """The deadline passed while rows still waited."""


class UnavailableError(ServeError):
    """The server is draining, or the model is not ready."""


class DrainingError(UnavailableError):
    """The process is stopping; another replica answers."""


class EngineError(ServeError):
    """A model run failed, hung or lost its thread. The text stays in the log; callers get a fixed one."""


class OutOfMemoryError(EngineError):
    """There was no memory for a run, on the device or page-locked beside it. The next run may have it."""


class DeviceLostError(EngineError):
    """The device has failed. CUDA's errors stay with the process: every later run of it fails too."""
