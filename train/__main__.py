"""``python -m train PRESET`` trains; ``activations``, ``compare`` and ``bench`` show results."""

from __future__ import annotations

from serve.command_line import run_command
from train.cli import main
from train.trainer.parallel import leave


def _main() -> int:
    status = main()
    leave(status)
    return status


if __name__ == "__main__":
    run_command(_main)
