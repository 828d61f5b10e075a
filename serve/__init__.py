"""Serve the exported generators over gRPC. Start it with ``python -m serve``; it knows nothing of torch."""
