"""What the unmodified tritonclient sees of a server over HTTP. Run by its own interpreter; prints one JSON object.

build/triton-client/bin/python tests/integration/triton_http_caller.py HOST:PORT [CA_FILE TOKEN]
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient._plugin import InferenceServerClientPlugin


def ask(client: Any, binary: bool, version: str = "", **values: tuple[str, Any]) -> Any:
    tensors = []
    for name, (datatype, array) in values.items():
        tensor = triton.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array, binary_data=binary)
        tensors.append(tensor)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("pixels", "images")]
    return client.infer("mlp", tensors, model_version=version, outputs=wanted, request_id="abc")


class WithToken(InferenceServerClientPlugin):
    """Sends a bearer token with every call."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: Any) -> None:
        request.headers["authorization"] = f"Bearer {self.token}"


def main(target: str, ca: str = "", token: str = "") -> dict[str, Any]:
    secure = {"ssl": True, "ssl_options": {"ca_certs": ca}} if ca else {}
    client = triton.InferenceServerClient(target, **secure)
    if token:
        client.register_plugin(WithToken(token))
    seen: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": [client.is_model_ready("mlp"), client.is_model_ready("mlp", "1"), client.is_model_ready("vae")],
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata("mlp"),
    }
    address = {
        "seed": ("UINT64", np.array([2**64 - 1], np.uint64)),
        "count": ("INT32", np.array([5], np.int32)),
        "start": ("UINT64", np.array([1000], np.uint64)),
    }
    for binary in (True, False):
        answer = ask(client, binary, **address)
        response = answer.get_response()
        seen[f"pixels {binary}"] = answer.as_numpy("pixels").tolist()
        seen[f"images {binary}"] = answer.as_numpy("images").tolist()
        seen[f"answer {binary}"] = [response["id"], response["model_version"], response["parameters"]["seed"]]
    latents = np.linspace(-2, 2, 3 * 64, dtype=np.float32).reshape(3, 64)
    seen["latents"] = ask(client, True, "1", latents=("FP32", latents)).as_numpy("pixels").tolist()
    try:
        ask(client, True, count=("INT32", np.array([0], np.int32)))
    except triton.InferenceServerException as error:
        seen["refused"] = [str(error.status()), str(error.message())]
    return seen


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
