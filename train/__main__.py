"""``python -m train PRESET`` trains; ``activations``, ``compare`` and ``bench`` look at what came of it."""

from __future__ import annotations

import sys

from train.cli import main

if __name__ == "__main__":
    sys.exit(main())
