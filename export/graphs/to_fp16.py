"""An ONNX graph in half precision: weights and arithmetic float16, inputs and outputs as they were."""

from __future__ import annotations

import logging

import onnx

from export.graphs.to_onnx import check_graph


def to_fp16(model: bytes) -> bytes:
    """Convert a served graph by ONNX Runtime's own converter. Raises GraphError when the result is not a served graph."""
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415  # serve.engine.onnx_runtime comes first
    from onnxruntime.transformers.onnx_model import OnnxModel  # noqa: PLC0415

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    converted = OnnxModel(convert_float_to_float16(onnx.load_from_string(model), keep_io_types=True))
    converted.topological_sort()  # the converter puts its casts at the end
    check_graph(converted.model)
    content: bytes = converted.model.SerializeToString()
    return content
