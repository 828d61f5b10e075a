"""Imports ONNX Runtime with its telemetry turned off. All other modules import it from here.

From version 1.29 on its wheels report sessions to the maker unless this variable is set before the import. A server of ours
contacts nobody; set the variable to 0 to turn telemetry on.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort  # after that

__all__ = ["ort"]
