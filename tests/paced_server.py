"""A server whose runs take a given time and no processor: ``python -m tests.paced_server SECONDS FLAGS``."""

from __future__ import annotations

import sys
import time
from typing import Any

from serve.cli import main
from serve.engine.session import Engine


def pace(seconds: float) -> None:
    """Let every run from now on take so long."""
    honest = Engine.run

    def run(self: Engine, feeds: Any, *outputs: Any) -> Any:
        time.sleep(seconds)
        return honest(self, feeds, *outputs)

    Engine.run = run  # type: ignore[method-assign]


if __name__ == "__main__":
    pace(float(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
