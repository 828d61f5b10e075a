"""An ONNX graph in half precision: weights and arithmetic float16, inputs and outputs as they were.

From the last activation on it is float32: in half precision, what is rounded to 255 levels has a spacing of an eighth of one.
"""

from __future__ import annotations

import logging

import onnx
from onnx import TensorProto, helper

from export.graphs.to_onnx import check_graph

ACTIVATIONS = ("Tanh", "Sigmoid")


def to_fp16(model: bytes) -> bytes:
    """Convert a served graph by ONNX Runtime's own converter. Raises GraphError when the result is not a served graph.

    The converter gets the graph up to the last activation: nodes that it is told to leave out it puts between casts, one by one.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415  # serve.engine.onnx_runtime comes first
    from onnxruntime.transformers.onnx_model import OnnxModel  # noqa: PLC0415

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    whole, head = onnx.load_from_string(model), onnx.load_from_string(model)
    nodes = whole.graph.node
    last = max(place for place, node in enumerate(nodes) if node.op_type in ACTIVATIONS)
    del head.graph.node[last:], head.graph.output[:], head.graph.value_info[:]
    head.graph.output.append(helper.make_tensor_value_info(nodes[last].input[0], TensorProto.FLOAT, None))
    converted = OnnxModel(convert_float_to_float16(head, keep_io_types=True))
    converted.topological_sort()  # the converter puts its casts at the end
    result: onnx.ModelProto = converted.model
    del result.graph.output[:], result.graph.value_info[:]
    result.graph.node.extend(nodes[last:])
    result.graph.output.extend(whole.graph.output)
    check_graph(result)
    content: bytes = result.SerializeToString()
    return content
