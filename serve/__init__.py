"""Serve the exported generators over gRPC. Start it with ``python -m serve``; it knows nothing of torch."""

import os

# From 1.29 on ONNX Runtime's own wheels report sessions to its maker unless this is set before they are loaded. A server
# of ours calls nobody; whoever wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
