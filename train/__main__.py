"""``python -m train PRESET`` trains; ``activations``, ``compare`` and ``bench`` show results."""

from __future__ import annotations

import os
import signal
import sys

from train.cli import main
from train.trainer.parallel import leave

if __name__ == "__main__":
    if "WORLD_SIZE" not in os.environ:
        # Without a handler the kernel drops the signal for process 1; training has one of its own, that saves.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # a reader who has left, ``head`` for one; Python would complain when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    leave(status)
