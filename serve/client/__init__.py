"""The Python client. ``from serve.client import DigitClient`` is its public name; ``python -m serve.client`` its command line."""

from serve.client.channel import Access
from serve.client.client import DigitClient, Digits

__all__ = ["Access", "DigitClient", "Digits"]
