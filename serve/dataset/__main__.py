"""``python -m serve.dataset``."""

from __future__ import annotations

import sys

from serve.config.command_line import end_on_sigterm
from serve.dataset.command import main

if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
