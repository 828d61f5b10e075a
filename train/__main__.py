"""``python -m train PRESET`` trains; ``activations``, ``compare`` and ``bench`` look at what came of it."""

from __future__ import annotations

import os
import signal
import sys

from train.cli import main
from train.parallel import leave

if __name__ == "__main__":
    if "WORLD_SIZE" not in os.environ:
        # Without a handler the kernel drops the signal for process 1; training has one of its own, that saves.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    leave(main())
