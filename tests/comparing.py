"""How far digits are apart."""

from __future__ import annotations

from typing import Any

import numpy as np


def apart(some: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> int:
    """The largest difference of a pixel, in levels. The shapes must be the same."""
    assert some.shape == others.shape
    return int(np.abs(some.astype(int) - others.astype(int)).max())
