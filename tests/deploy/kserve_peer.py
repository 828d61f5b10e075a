"""KServe's own server and client, by the interpreter that has them (build/integrations). Knows nothing of this project.

python tests/deploy/kserve_peer.py serve PORT HTTP_PORT        # KServe's server with a model that answers zeros
python tests/deploy/kserve_peer.py call HOST:PORT              # what KServe's client gets of a server, as one JSON object
python tests/deploy/kserve_peer.py rest URL [CA_FILE TOKEN]    # the same over REST
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from typing import Any

import grpc
import httpx
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


async def outcome(made: Any) -> Any:
    try:
        return await made
    except grpc.RpcError as error:
        return str(error.code())
    except httpx.HTTPStatusError as error:
        return error.response.status_code


def request(model: str, binary: bool = True) -> Any:
    latents = kserve.InferInput("latents", [3, SIZE], "FP32")
    latents.set_data_from_numpy(np.linspace(-2, 2, 3 * SIZE, dtype=np.float32).reshape(3, SIZE), binary_data=binary)
    return kserve.InferRequest(model, [latents], request_id="abc")


def seen(answer: Any) -> dict[str, Any]:
    pixels = answer.outputs[0]
    return {
        "answer": [answer.id, answer.model_name, pixels.name, pixels.datatype, list(pixels.shape)],
        "pixels": pixels.as_numpy().tolist(),
    }


async def call(target: str) -> dict[str, Any]:
    client = kserve.InferenceGRPCClient(target, timeout=20)
    return {
        "live": await outcome(client.is_server_live()),
        "ready": await outcome(client.is_server_ready()),
        "model ready": await outcome(client.is_model_ready("mlp")),
        "unknown model ready": await outcome(client.is_model_ready("vae")),
        "unknown model": await outcome(client.infer(request("vae"))),
        **seen(await client.infer(request("mlp"))),
    }


async def rest(url: str, ca: str = "", token: str = "") -> dict[str, Any]:
    verify = ssl.create_default_context(cafile=ca) if ca else True
    client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2", timeout=20, verify=verify, retries=0))
    headers = {"authorization": f"Bearer {token}"} if token else {}

    def infer(model: str, binary: bool = True) -> Any:
        return client.infer(url, request(model, binary), model_name=model, headers=dict(headers))

    answers = [seen(await infer("mlp", binary)) for binary in (True, False)]
    return {
        "live": await outcome(client.is_server_live(url)),
        "ready": await outcome(client.is_server_ready(url)),
        "model ready": await outcome(client.is_model_ready(url, "mlp")),
        "unknown model ready": await outcome(client.is_model_ready(url, "vae")),
        "unknown model": await outcome(infer("vae")),
        "without a token": await outcome(client.infer(url, request("mlp"), model_name="mlp")) if token else 401,
        "both forms": answers[0] == answers[1],
        **answers[0],
    }


if __name__ == "__main__":
    action, *rest_of_it = sys.argv[1:]
    if action == "serve":
        grpc_port, http_port = map(int, rest_of_it)
        kserve.ModelServer(http_port=http_port, grpc_port=grpc_port, enable_grpc=True, workers=1).start([Zeros()])
    else:
        print(json.dumps(asyncio.run({"call": call, "rest": rest}[action](*rest_of_it))))
