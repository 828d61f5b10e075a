"""Turn finished training runs into bundles that can be served. Start it with ``python -m export``."""

import serve  # noqa: F401  # before ONNX Runtime is loaded: it turns its telemetry off
