"""An ONNX graph of a DCGAN in 8 bits for the CPU: its hidden convolutions' weights and activations as integers.

ONNX Runtime multiplies no 8-bit transposed convolutions. One of kernel 4 and stride 2 is four convolutions of kernel 2, one
for each phase of the output's rows and columns (Shi et al. 2016, arXiv:1609.07009): here as one convolution with four
times the channels, whose output is moved from depth to space and cropped. Those are quantised with ranges that latents
drawn by the address rule show; the first layer and the last, a fiftieth of the work, stay as they are.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from export.errors import GraphError
from export.graphs.to_onnx import check_graph
from serve.latents import Span, draw_span

CALIBRATION_SEED = 20_260_103
CALIBRATION_BATCHES, CALIBRATION_ROWS = 32, 16
# A kernel's row (or column) that a phase takes, at the earlier and the later of the two input rows that reach it.
TAPS = {0: (2, 0), 1: (3, 1)}


def to_int8(model: bytes, latent_size: int, labels: int) -> bytes:
    """Convert a served graph. Raises GraphError when it has no transposed convolution of that kind, or is none afterwards."""
    from onnxruntime.quantization import (  # noqa: PLC0415  # serve.engine.onnx_runtime comes first
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Calibration(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime's Python has no types
        """Feeds of the address rule's latents."""

        def __init__(self) -> None:
            self._feeds = _calibration(latent_size, labels)

        def get_next(self) -> Mapping[str, NDArray[Any]] | None:
            return next(self._feeds, None)

    graph = onnx.load_from_string(model)
    hidden = _by_phases(graph)
    logging.getLogger().disabled, before = True, logging.getLogger().disabled
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            onnx.save(graph, source)
            quantize_static(
                source, target, Calibration(), quant_format=QuantFormat.QDQ, per_channel=True, nodes_to_quantize=hidden,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
            converted = onnx.load(target)
    finally:
        logging.getLogger().disabled = before
    check_graph(converted)
    content: bytes = converted.SerializeToString()
    return content


def _calibration(latent_size: int, labels: int) -> Iterator[dict[str, NDArray[Any]]]:
    for batch in range(CALIBRATION_BATCHES):
        span = Span(CALIBRATION_SEED, batch * CALIBRATION_ROWS, CALIBRATION_ROWS)
        rows, chosen = draw_span(span, latent_size, labels)
        yield {"latents": rows} if chosen is None else {"latents": rows, "labels": chosen}


def _by_phases(model: onnx.ModelProto) -> list[str]:
    """Rewrite every transposed convolution of kernel 4 and stride 2; returns the names of the nodes to be quantised."""
    graph = model.graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    rewritten: list[list[str]] = []
    for node in graph.node:
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        transposed = node.op_type == "ConvTranspose" and list(attributes["strides"]) == [2, 2]
        if transposed and weights[node.input[1]].shape[2:] == (4, 4):
            number = len(rewritten)
            replacement = _phases(graph, node, weights, attributes["pads"][0], number)
            nodes += replacement
            rewritten.append([each.name for each in replacement])
        else:
            nodes.append(node)
    if len(rewritten) < 2:
        raise GraphError("int8 is for generators with transposed convolutions of kernel 4 and stride 2; this has none to gain by")
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return [name for names in rewritten[:-1] for name in names]


def _phases(
    graph: onnx.GraphProto, node: onnx.NodeProto, weights: Mapping[str, NDArray[np.float32]], pad: int, number: int
) -> list[onnx.NodeProto]:
    """One transposed convolution as convolution, depth to space and crop."""
    weight = weights[node.input[1]]
    inputs, outputs = weight.shape[:2]
    kernel = np.zeros((4 * outputs, inputs, 2, 2), np.float32)
    for phase in range(4):
        rows, columns = TAPS[phase // 2], TAPS[phase % 2]
        taps = weight[:, :, rows, :][:, :, :, columns]  # (inputs, outputs, 2, 2)
        kernel[phase * outputs : (phase + 1) * outputs] = taps.swapaxes(0, 1)
    bias = weights[node.input[2]] if len(node.input) > 2 else np.zeros(outputs, np.float32)
    prefix = f"phases{number}"
    own = {
        "kernel": kernel, "bias": np.tile(bias, 4), "begin": np.array([pad, pad]), "end": np.array([-pad, -pad]),
        "axes": np.array([2, 3]),
    }  # fmt: skip
    graph.initializer.extend(numpy_helper.from_array(array, f"{prefix}.{name}") for name, array in own.items())
    name = {each: f"{prefix}.{each}" for each in (*own, "convolved", "spread")}
    return [
        helper.make_node(
            "Conv", [node.input[0], name["kernel"], name["bias"]], [name["convolved"]], f"{prefix}.conv",
            kernel_shape=[2, 2], pads=[1, 1, 1, 1],
        ),
        helper.make_node("DepthToSpace", [name["convolved"]], [name["spread"]], f"{prefix}.spread", blocksize=2),
        helper.make_node("Slice", [name["spread"], name["begin"], name["end"], name["axes"]], [node.output[0]], f"{prefix}.crop"),
    ]  # fmt: skip
