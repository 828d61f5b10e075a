"""``python -m train PRESET`` trains; ``activations``, ``compare`` and ``bench`` look at what came of it."""

from __future__ import annotations

from train.cli import main
from train.parallel import leave

if __name__ == "__main__":
    leave(main())
