"""Dynamic batching: a bounded fair queue, and slots that run what it holds. Knows no transport and no ONNX Runtime."""
