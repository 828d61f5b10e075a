"""``python -m serve.dataset``."""

from __future__ import annotations

from serve.command_line import run_command
from serve.dataset.command import main

if __name__ == "__main__":
    run_command(main)
