"""The served generator as graphs: ONNX in three precisions, and TorchScript."""
