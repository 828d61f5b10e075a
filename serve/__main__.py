"""``python -m serve``: serve the bundled models, or those of ``--models-dir``."""

from __future__ import annotations

import os
import sys

# gRPC's C core writes its own lines beside ours, a port in use among them; it reads this when it is imported. Only there
# is a failed TLS handshake told of.
os.environ.setdefault(
    "GRPC_VERBOSITY", "INFO" if "DIGITS_TLS_CERT" in os.environ or "--tls-cert" in " ".join(sys.argv) else "NONE"
)

from serve.command_line import failed, run_command  # see above

try:
    from serve.cli import main
except ModuleNotFoundError as error:
    sys.exit(
        failed(f"{error.name} is not installed: the client's install lacks the server; in a checkout, pip install '.[serve]'")
    )

if __name__ == "__main__":
    run_command(main)
