"""``python -m export`` publishes finished runs as bundles; ``verify`` compares a bundle again."""

from __future__ import annotations

import sys

from export.cli import main

if __name__ == "__main__":
    sys.exit(main())
