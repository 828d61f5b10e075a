"""Exports the served generator as an ONNX graph with PyTorch's dynamo exporter, and checks the graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence

import onnx
import torch
from torch import Tensor, nn

from export.errors import GraphError
from train.config import TrainConfig

OPSET = 18  # the exporter's own; no operator here has changed since for what it is used for
BATCH_AXIS = "batch"
OUTPUTS = ("images", "pixels")


def to_onnx(served: nn.Module, config: TrainConfig, outputs: tuple[str, ...] = OUTPUTS) -> bytes:
    """Export with a symbolic batch axis. Raises GraphError when the exporter froze that axis or left a BatchNorm."""
    example = {"latents": torch.zeros(3, config.latent_size)}
    if config.conditional:
        example["labels"] = torch.zeros(3, dtype=torch.int64)
    model = exported(served, example, outputs)
    if outputs == OUTPUTS:
        check_graph(model)
    return model.SerializeToString()


def exported(module: nn.Module, example: Mapping[str, Tensor], outputs: Sequence[str]) -> onnx.ModelProto:
    """A module's graph by PyTorch's dynamo exporter, its batch axis symbolic. Raises GraphError."""
    batch = torch.export.Dim(BATCH_AXIS, min=1)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside the exporter
        program = torch.onnx.export(
            module,
            tuple(example.values()),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(example),
            output_names=list(outputs),
            dynamic_shapes=tuple({0: batch} for _ in example),
        )
    if program is None:
        raise GraphError("the exporter returned nothing")
    model: onnx.ModelProto = program.model_proto
    # The exporter writes the newest, which runtimes older than itself refuse; the graph needs nothing of it.
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    for node in model.graph.node:  # the exporter's notes on which line of which file of this machine a node comes from
        node.ClearField("metadata_props")
    return model


def check_graph(model: onnx.ModelProto) -> None:
    """onnx's full check, the symbolic batch axis of every input and output, and no BatchNorm left. Raises GraphError."""
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output):
        axis = value.type.tensor_type.shape.dim[0]
        if not axis.dim_param:
            raise GraphError(f"the batch axis of {value.name} was frozen to {axis.dim_value}")
    if any(node.op_type == "BatchNormalization" for node in model.graph.node):
        raise GraphError("a BatchNormalization is left in the graph: folding did not reach it")
