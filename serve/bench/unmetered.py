"""The server with every metric made a no-op: what metrics cost is the difference to the server as it is."""

from __future__ import annotations

import sys

from prometheus_client import Counter, Histogram

from serve.cli import main


def _nothing(self: object, *values: object) -> None:
    return None


if __name__ == "__main__":
    Counter.inc = Histogram.observe = _nothing  # type: ignore[method-assign, assignment]  # that is the point
    sys.exit(main())
