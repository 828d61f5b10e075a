"""KServe's own server and client, by the interpreter that has them (build/integrations). Knows nothing of this project.

python tests/deploy/kserve_peer.py serve PORT       # KServe's server with a model that answers zeros
python tests/deploy/kserve_peer.py call HOST:PORT   # what KServe's client gets of a server, as one JSON object
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc
import kserve
import numpy as np

SIZE = 64


class Zeros(kserve.Model):
    """Latents (n, 64) in, pixels (n, 28, 28) out."""

    def __init__(self) -> None:
        super().__init__("mlp")
        self.ready = True

    def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        rows = payload.inputs[0].as_numpy()
        pixels = kserve.InferOutput("pixels", [len(rows), 28, 28], "UINT8")
        pixels.set_data_from_numpy(np.zeros((len(rows), 28, 28), np.uint8), binary_data=True)
        return kserve.InferResponse(response_id=payload.id, model_name="mlp", infer_outputs=[pixels])


async def call(target: str) -> dict[str, Any]:
    client = kserve.InferenceGRPCClient(target, timeout=20)

    async def outcome(made: Any) -> Any:
        try:
            return await made
        except grpc.RpcError as error:
            return str(error.code())

    def request(model: str) -> Any:
        latents = kserve.InferInput("latents", [3, SIZE], "FP32")
        latents.set_data_from_numpy(np.linspace(-2, 2, 3 * SIZE, dtype=np.float32).reshape(3, SIZE), binary_data=True)
        return kserve.InferRequest(model, [latents], request_id="abc")

    answer = await client.infer(request("mlp"))
    pixels = answer.outputs[0]
    return {
        "live": await outcome(client.is_server_live()),
        "ready": await outcome(client.is_server_ready()),
        "model ready": await outcome(client.is_model_ready("mlp")),
        "unknown model ready": await outcome(client.is_model_ready("vae")),
        "unknown model": await outcome(client.infer(request("vae"))),
        "answer": [answer.id, answer.model_name, pixels.name, pixels.datatype, list(pixels.shape)],
        "pixels": pixels.as_numpy().tolist(),
    }


if __name__ == "__main__":
    action, where = sys.argv[1:]
    if action == "serve":
        kserve.ModelServer(http_port=0, grpc_port=int(where), enable_grpc=True, workers=1).start([Zeros()])
    else:
        print(json.dumps(asyncio.run(call(where))))
