"""PyTriton (Triton with Python models) serving MODEL.onnx on PORT, with dynamic batching. Run by the peer's own interpreter."""

import sys

import numpy as np
import onnxruntime as ort
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

name, path, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
latent_size = session.get_inputs()[0].shape[1]


@batch
def infer(latents):
    return {"pixels": session.run(["pixels"], {"latents": latents})[0]}


config = TritonConfig(
    grpc_port=port, http_port=port + 1, metrics_port=port + 2, grpc_address="127.0.0.1", http_address="127.0.0.1"
)
with Triton(config=config) as triton:
    triton.bind(
        model_name=name,
        infer_func=infer,
        inputs=[Tensor(name="latents", dtype=np.float32, shape=(latent_size,))],
        outputs=[Tensor(name="pixels", dtype=np.uint8, shape=(28, 28))],
        config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
    )
    triton.serve()
