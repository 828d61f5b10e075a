"""Dynamic batching: a bounded fair queue, and instances that run what it holds. Knows no transport and no ONNX Runtime."""
