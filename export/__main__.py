"""``python -m export`` publishes finished runs as bundles; ``verify`` compares a bundle again."""

from __future__ import annotations

import sys

from export.cli import main
from serve.config.command_line import end_on_sigterm

if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
