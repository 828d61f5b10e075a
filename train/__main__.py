"""``python -m train PRESET`` trains; ``activations``, ``compare`` and ``bench`` show results."""

from __future__ import annotations

import errno
import os
import signal
import sys

from train.cli import main
from train.trainer.parallel import leave


def _open_standard_streams() -> None:
    """Descriptors 0 to 2 that came closed lead nowhere, as in serve.command_line: what is opened next would be one of them."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


if __name__ == "__main__":
    _open_standard_streams()
    if "WORLD_SIZE" not in os.environ:
        # Without a handler the kernel drops the signal for process 1; training has one of its own, that saves.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except OSError as error:  # of standard output: a reader who has left, ``head`` for one, or a disk that is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain when it flushes at its end
        status = 128 + signal.SIGPIPE
        if error.errno != errno.EPIPE:
            print(f"error: standard output cannot be written to ({error.strerror})", file=sys.stderr)
            status = 2
    leave(status)
