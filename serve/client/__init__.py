"""The Python client. ``from serve.client import DigitClient`` is its public name; ``python -m serve.client`` its command line."""

import os

# gRPC's C core writes lines of its own about connections that fail; it reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from serve.client.channel import Access  # see above
from serve.client.client import DigitClient, Digits

__all__ = ["Access", "DigitClient", "Digits"]
