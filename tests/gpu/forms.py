"""Other graphs of the same function, of which a GPU is to say whether they are faster than the bundled ones.

Until it has, they are no part of ``export``. A transposed convolution of 4×4 taps and stride 2 is a 3×3 convolution to the four
pixels that lie between its inputs: row 0 of them takes the kernel's rows (3, 1, none), row 1 (none, 2, 0).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

Form = Callable[[bytes], bytes]
TAPS = ((3, 1, None), (None, 2, 0))


class _Graph:
    """A model that is being rewritten: its nodes and weights, and what is known of its shapes."""

    def __init__(self, model: bytes) -> None:
        self.model: ModelProto = onnx.load_from_string(model)
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}
        inferred = onnx.shape_inference.infer_shapes(self.model).graph
        self.shapes = {
            value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in (*inferred.value_info, *inferred.output)
        }
        self.nodes: list[NodeProto] = []

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def constant(self, name: str, array: NDArray[Any]) -> str:
        self.weights[name] = array
        return name

    def written(self) -> bytes:
        graph = self.model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in self.weights.items() if name in used)
        onnx.checker.check_model(self.model, full_check=True)
        content: bytes = self.model.SerializeToString()
        return content


def as_bundled(model: bytes) -> bytes:
    return model


def last_as_3x3(model: bytes) -> bytes:
    """The layer that makes the picture so, with DepthToSpace: a transposed convolution to one channel leaves tiles empty."""
    return _rewritten(model, _as_3x3, lambda node, places: node.name == places[-1])


def all_as_3x3(model: bytes) -> bytes:
    """Every transposed convolution so."""
    return _rewritten(model, _as_3x3, lambda node, places: node.op_type == "ConvTranspose")


def gathered(model: bytes) -> bytes:
    """Every convolution as a matrix product of gathered inputs, channels last."""
    return _rewritten(model, _gathered, lambda node, places: True)


def biases_apart(model: bytes) -> bytes:
    """Biases as additions: with channels last cuDNN's own path for them is very slow."""

    def apart(graph: _Graph, node: NodeProto) -> None:
        name = node.output[0]
        graph.add(node.op_type, [*node.input[:2]], f"{name}/sums", **_attributes(node))
        graph.add("Add", [f"{name}/sums", graph.constant(f"{name}/bias", graph.weights[node.input[2]][:, None, None])], name)

    return _rewritten(model, apart, lambda node, places: len(node.input) > 2)


def biases_back(model: bytes) -> bytes:
    """Convolutions without biases with some, as the rpgan's had until they went into its labels' tables."""

    def back(graph: _Graph, node: NodeProto) -> None:
        zeros = np.zeros(graph.shapes[node.output[0]][1], np.float32)
        graph.add(
            node.op_type, [*node.input, graph.constant(f"{node.output[0]}/bias", zeros)], node.output[0], **_attributes(node)
        )

    return _rewritten(model, back, lambda node, places: len(node.input) == 2)


FORMS: dict[str, Form] = {form.__name__: form for form in (as_bundled, last_as_3x3, all_as_3x3, gathered, biases_back)}


def _rewritten(
    model: bytes, rewrite: Callable[[_Graph, NodeProto], None], wanted: Callable[[NodeProto, list[str]], bool]
) -> bytes:
    """The model with each convolution that is wanted put otherwise."""
    graph = _Graph(model)
    places = [node.name for node in graph.model.graph.node if node.op_type in ("Conv", "ConvTranspose")]
    for node in graph.model.graph.node:
        if node.name in places and wanted(node, places):
            rewrite(graph, node)
        else:
            graph.nodes.append(node)
    return graph.written()


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _as_3x3(graph: _Graph, node: NodeProto) -> None:
    weight, name = graph.weights[node.input[1]], node.output[0]  # (in, out, 4, 4)
    inputs, outputs = weight.shape[:2]
    made = np.zeros((2, 2, outputs, inputs, 3, 3), np.float32)
    for row, column, down, across in itertools.product(range(2), range(2), range(3), range(3)):
        taps = TAPS[row][down], TAPS[column][across]
        if taps[0] is not None and taps[1] is not None:
            made[row, column, :, :, down, across] = weight[:, :, taps[0], taps[1]].T
    given = [node.input[0], graph.constant(f"{name}/weight", made.reshape(4 * outputs, inputs, 3, 3))]
    if len(node.input) > 2:
        given.append(graph.constant(f"{name}/bias", np.tile(graph.weights[node.input[2]], 4)))
    around = 1 if _attributes(node)["pads"][0] == 1 else 0
    graph.add("Conv", given, f"{name}/quarters", pads=[around] * 4, kernel_shape=[3, 3])
    graph.add("DepthToSpace", [f"{name}/quarters"], name, blocksize=2, mode="DCR")


def _gathered(graph: _Graph, node: NodeProto) -> None:
    """Which inputs an output takes is a table; those beyond the edge are a row of zeros behind the others."""
    source, name, weight = node.input[0], node.output[0], graph.weights[node.input[1]]
    (_, channels, height, width), (_, outputs, out_height, out_width) = (graph.shapes[each] for each in (source, name))
    if node.op_type == "Conv":
        taps = [[(tap, tap - 1) for tap in range(3)]]  # (kernel's row, input's row beside the output's)
        factors = weight.transpose(2, 3, 1, 0)  # (3, 3, in, out)
        step = 1
    else:
        beyond = _attributes(node)["pads"][0] // 2  # 0 or 1
        taps = [[(3, beyond - 1), (1, beyond)], [(2, beyond), (0, beyond + 1)]]
        factors = weight.transpose(2, 3, 0, 1)
        step = 2
    parities = list(itertools.product(taps, taps))
    rows, columns = np.meshgrid(np.arange(out_height // step), np.arange(out_width // step), indexing="ij")
    table, products = [], []
    for down, across in parities:
        places = []
        for (_, row), (_, column) in itertools.product(down, across):
            there = (rows + row >= 0) & (rows + row < height) & (columns + column >= 0) & (columns + column < width)
            places.append(np.where(there, (rows + row) * width + columns + column, height * width))
        table.append(np.stack(places, -1).reshape(-1))  # (positions · taps)
        products.append(np.concatenate([factors[tap, other] for (tap, _), (other, _) in itertools.product(down, across)]))
    shape = lambda label, *sizes: graph.constant(f"{name}/{label}", np.array(sizes, np.int64))  # noqa: E731
    graph.add("Transpose", [source], f"{name}/last", perm=[0, 2, 3, 1])
    flat = graph.add("Reshape", [f"{name}/last", shape("flat", 0, height * width, channels)], f"{name}/rows")
    graph.add("Slice", [flat, shape("from", 0), shape("to", 1), shape("axis", 1)], f"{name}/one")
    graph.add("Mul", [f"{name}/one", graph.constant(f"{name}/nought", np.float32(0))], f"{name}/zero")
    graph.add("Concat", [flat, f"{name}/zero"], f"{name}/padded", axis=1)
    graph.add("Gather", [f"{name}/padded", graph.constant(f"{name}/table", np.concatenate(table))], f"{name}/taken", axis=1)
    positions, taken = rows.size, len(products[0])
    graph.add("Reshape", [f"{name}/taken", shape("parts", 0, len(parities), positions, taken)], f"{name}/operands")
    graph.add("MatMul", [f"{name}/operands", graph.constant(f"{name}/factors", np.stack(products))], f"{name}/products")
    sums = f"{name}/products"
    if len(node.input) > 2:
        sums = graph.add("Add", [sums, graph.constant(f"{name}/bias", graph.weights[node.input[2]])], f"{name}/biased")
    sizes = (0, step, step, out_height // step, out_width // step, outputs)
    graph.add("Reshape", [sums, shape("apart", *sizes)], f"{name}/apart/parts")
    graph.add("Transpose", [f"{name}/apart/parts"], f"{name}/between", perm=[0, 3, 1, 4, 2, 5])
    graph.add("Reshape", [f"{name}/between", shape("whole", 0, out_height, out_width, outputs)], f"{name}/picture")
    graph.add("Transpose", [f"{name}/picture"], name, perm=[0, 3, 1, 2])
