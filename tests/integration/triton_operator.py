"""What the unmodified tritonclient sees of the repository extension. Run by its own interpreter, as triton_caller.py is."""

from __future__ import annotations

import json
import sys
from typing import Any

import tritonclient.grpc as triton
from triton_caller import refusal_of


def main(target: str) -> dict[str, Any]:
    client = triton.InferenceServerClient(target)
    return {
        "index": client.get_model_repository_index(as_json=True)["models"],
        "load": refusal_of(lambda: client.load_model("mlp", config="{}")),
        "unload": refusal_of(lambda: client.unload_model("mlp")),
        "ready": client.is_model_ready("mlp"),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
