"""``python -m serve.client``: ask a running server for digits."""

from __future__ import annotations

import sys

from serve.client.command import main

if __name__ == "__main__":
    sys.exit(main())
