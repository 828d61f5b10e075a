"""``python -m serve.client``: ask a running server for digits."""

from __future__ import annotations

from serve.client.command import main
from serve.command_line import run_command

if __name__ == "__main__":
    run_command(main)
