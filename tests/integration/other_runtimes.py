"""Runs a graph by other runtimes and after other optimizers: ``python other_runtimes.py MODEL INPUTS.npz OUTPUTS.npz``.

Called by the interpreter of ``build/other-runtimes``, which has an old ONNX Runtime, OpenVINO and the optimizers.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnxruntime as ort
import onnxsim
import onnxslim
import openvino

MODEL, INPUTS, OUTPUTS = sys.argv[1:]
with np.load(INPUTS) as archive:
    feeds = dict(archive)


def by_onnx_runtime(content: bytes) -> np.ndarray:
    return ort.InferenceSession(content, providers=["CPUExecutionProvider"]).run(["pixels"], feeds)[0]


def by_openvino() -> np.ndarray:
    # Its default is half precision where the processor has that.
    compiled = openvino.Core().compile_model(MODEL, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(feeds)["pixels"]


graph = onnx.load(MODEL)
simplified, good = onnxsim.simplify(graph)
assert good
np.savez(
    OUTPUTS,
    old=by_onnx_runtime(graph.SerializeToString()),
    onnxslim=by_onnx_runtime(onnxslim.slim(graph).SerializeToString()),
    onnxsim=by_onnx_runtime(simplified.SerializeToString()),
    openvino=by_openvino(),
)
