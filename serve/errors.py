"""What can go wrong, in the domain's own words: nothing here knows of gRPC or ONNX Runtime.

``serve.rpc`` holds the one table from these to status codes; ``serve.cli`` prints a StartError as one line.
"""

from __future__ import annotations


class ServeError(Exception):
    """Base of all errors whose text may be shown to a caller or operator."""


class StartError(ServeError):
    """The server cannot start: a setting, a bundle, a provider or a port."""


class SettingsError(StartError):
    """A flag or environment variable with an unusable value."""


class BundleError(StartError):
    """A bundle that is missing, half-written, tampered with or of the wrong signature."""


class ProviderError(StartError):
    """The execution provider that was asked for cannot be had."""


class RequestError(ServeError):
    """A request field with an unusable value: the text names field, value and limit."""


class UnknownModelError(ServeError):
    """No such model or version: the text lists what there is."""


class QueueFullError(ServeError):
    """The queue is at its bound. ``retry_after_s`` is when a place is likely."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ExpiredError(ServeError):
    """The deadline passed while rows still waited."""


class UnavailableError(ServeError):
    """The server is draining, or the model is not ready."""


class EngineError(ServeError):
    """A model run failed, hung or lost its thread. The text stays in the log; callers get a fixed one."""
