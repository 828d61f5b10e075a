"""The Python client: ``DigitClient`` and, for asyncio, ``AsyncDigitClient``. ``python -m serve.client`` is its command line."""

import os

# gRPC's C core writes lines of its own about connections that fail; it reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Without it calls hang in some of the processes that are forked off after a first call: a DataLoader's workers.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

from serve.client.asyncio_client import AsyncDigitClient  # see above
from serve.client.channel import Access
from serve.client.client import DigitClient
from serve.client.digits import Digits
from serve.client.errors import DigitError
from serve.client.training.digit_set import DigitSet

__all__ = ["Access", "AsyncDigitClient", "DigitClient", "DigitError", "DigitSet", "Digits"]
