"""``python -m serve``: serve the bundled models, or those of ``--models-dir``."""

from __future__ import annotations

import sys

from serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
