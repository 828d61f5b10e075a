"""Trained networks as graphs that others run: ONNX in single and half precision, TorchScript, and the judge."""
