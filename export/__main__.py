"""``python -m export`` publishes finished runs as bundles; ``verify`` compares a bundle again."""

from __future__ import annotations

from export.cli import main
from serve.command_line import run_command

if __name__ == "__main__":
    run_command(main)
