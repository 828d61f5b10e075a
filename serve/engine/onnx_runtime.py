"""ONNX Runtime with its telemetry off. Whatever uses it takes it from here.

From 1.29 on its wheels report sessions to its maker unless this variable is set before they are loaded. A server of ours
calls nobody; whoever wants that sets the variable to 0.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort  # after that

__all__ = ["ort"]
