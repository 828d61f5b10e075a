"""The release of this program, also when it runs from a checkout that was never installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def release() -> str:
    """The installed distribution's version, or ``source``."""
    try:
        return version("digits-serve")
    except PackageNotFoundError:
        return "source"
