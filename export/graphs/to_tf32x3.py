"""An ONNX graph in float32 whose products are each three in TF32: for matrix units, which have no float32.

Each operand x is split into hi, its rounding to ten bits of fraction, and lo = x - hi; of the four products lo · lo is left out
(Ootomo & Yokota 2022, arXiv:2203.03341). Rounding is a Cast to half precision and back: as many bits, and what is too small for
them is in lo; values over 65,504 would be lost, which the parity check would find.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.graphs.emulation import to_tf32
from export.graphs.to_onnx import check_graph

# How the products are added up: all in one sum; hi · hi apart from the corrections, which are a thousandth; or besides in sums of
# at most SHORT products. The longer a sum, the more of it matrix units cut off.
Sums = Literal["one", "apart", "short"]
SHORT = 256
INPUT_AXIS = {"Gemm": 1, "Conv": 1, "ConvTranspose": 0}  # of a weight, with transB=1


def to_tf32x3(model: bytes, sums: Sums = "apart") -> bytes:
    """Convert a served graph. Raises GraphError when the result is not a served graph."""
    graph = onnx.load_from_string(model)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.graph.node:
        if node.op_type in INPUT_AXIS:
            made, own = _split(node, weights.pop(node.input[1]), sums)
            nodes += made
            weights |= own
        else:
            nodes.append(node)
    del graph.graph.node[:], graph.graph.initializer[:], graph.graph.value_info[:]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    check_graph(graph)
    content: bytes = graph.SerializeToString()
    return content


def _split(node: NodeProto, weight: NDArray[np.float32], sums: Sums) -> tuple[list[NodeProto], dict[str, NDArray[Any]]]:
    """The nodes that take a node's place, and their weights."""
    axis, name = INPUT_AXIS[node.op_type], node.output[0]
    high = to_tf32(weight)
    low = to_tf32(weight - high)
    hi, lo = f"{name}/hi", f"{name}/lo"
    nodes = [
        helper.make_node("Cast", [node.input[0]], [f"{name}/half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{name}/half"], [hi], to=TensorProto.FLOAT),
        helper.make_node("Sub", [node.input[0], hi], [lo]),
    ]
    own: dict[str, NDArray[Any]] = {}
    parts: list[str] = []

    def multiply(inputs: list[str], factors: list[NDArray[np.float32]], bias: list[str]) -> None:
        """One sum, of some operands one after the other along the axis that is summed over."""
        part = f"{name}/{len(parts)}"
        source = inputs[0]
        if len(inputs) > 1:
            source = f"{part}/operands"
            nodes.append(helper.make_node("Concat", inputs, [source], axis=1))
        own[f"{part}/weight"] = np.concatenate(factors, axis)
        made = NodeProto()
        made.CopyFrom(node)
        del made.input[:], made.output[:]
        made.name = part
        made.input.extend([source, f"{part}/weight", *bias])
        made.output.append(part)
        nodes.append(made)
        parts.append(part)

    bias = list(node.input[2:])
    if sums == "one":
        multiply([lo, hi, hi], [high, low, high], bias)
    else:
        multiply([lo, hi], [high, low], [])
        channels = weight.shape[axis]
        most = SHORT // _taps(node, weight) if sums == "short" else channels
        cuts = list(range(0, channels, most))
        pieces = [hi] if len(cuts) == 1 else [f"{hi}/{first}" for first in cuts]
        if len(cuts) > 1:
            own[f"{hi}/sizes"] = np.diff([*cuts, channels]).astype(np.int64)
            nodes.append(helper.make_node("Split", [hi, f"{hi}/sizes"], pieces, axis=1))
        for piece, first in zip(pieces, cuts, strict=True):
            multiply([piece], [np.take(high, range(first, min(first + most, channels)), axis)], bias if first == 0 else [])
    total = parts[0]
    for number, part in enumerate(parts[1:], 1):
        last = number == len(parts) - 1
        nodes.append(helper.make_node("Add", [total, part], [name if last else f"{name}/sum{number}"]))
        total = nodes[-1].output[0]
    if len(parts) == 1:
        nodes[-1].output[0] = name
    return nodes, own


def _taps(node: NodeProto, weight: NDArray[np.float32]) -> int:
    """How many products an input channel adds to an output: of a transposed convolution one in stride² meets an input."""
    strides = next((helper.get_attribute_value(each) for each in node.attribute if each.name == "strides"), [1, 1])
    kernel = int(np.prod(weight.shape[2:], dtype=int))
    return kernel // int(np.prod(strides)) if node.op_type == "ConvTranspose" else kernel
