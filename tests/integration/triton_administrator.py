"""What the unmodified tritonclient sees of model control. Run by its own interpreter, as triton_caller.py is."""

from __future__ import annotations

import json
import sys
from typing import Any

import tritonclient.grpc as triton
from triton_caller import refusal_of


def main(target: str) -> dict[str, Any]:
    client = triton.InferenceServerClient(target)

    def index() -> list[dict[str, str]]:
        models: list[dict[str, str]] = client.get_model_repository_index(as_json=True)["models"]
        return models

    def ready() -> bool:
        try:
            return bool(client.is_model_ready("mlp"))
        except triton.InferenceServerException:
            return False

    seen: dict[str, Any] = {"index": index()}
    client.unload_model("mlp")
    seen["ready_after_unload"] = ready()
    seen["state_after_unload"] = index()[0]["state"]
    client.load_model("mlp")
    seen["ready_after_load"] = ready()
    seen["unknown"] = refusal_of(lambda: client.load_model("vae"))
    seen["config"] = refusal_of(lambda: client.load_model("mlp", config="{}"))
    return seen


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
