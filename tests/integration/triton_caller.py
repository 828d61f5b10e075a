"""What the unmodified tritonclient sees of a server. Run by its own interpreter: its protobuf is older than ours.

    build/triton-client/bin/python tests/integration/triton_caller.py HOST:PORT

Prints one JSON object; the test that started it judges.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

Inputs = dict[str, tuple[str, Any]]


def tensors(values: Inputs) -> list[Any]:
    made = []
    for name, (datatype, array) in values.items():
        tensor = triton.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def address(seed: int, count: int, start: int = 0) -> Inputs:
    return {
        "seed": ("UINT64", np.array([seed], np.uint64)),
        "count": ("INT32", np.array([count], np.int32)),
        "start": ("UINT64", np.array([start], np.uint64)),
    }


def refusal(client: Any, values: Inputs, outputs: list[str] | None = None, model: str = "mlp", version: str = "") -> list[str]:
    wanted = [triton.InferRequestedOutput(name) for name in outputs] if outputs else None
    try:
        client.infer(model, tensors(values), model_version=version, outputs=wanted)
    except triton.InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


def streamed(client: Any, count: int) -> list[Any]:
    """What a stream of ``count`` requests, the second of them wrong, is answered with, in order."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(count):
        digits = 0 if number == 1 else 1 + number
        client.async_stream_infer("mlp", tensors(address(7, digits, number)), request_id=str(number))
    seen = []
    for _ in range(count):
        result, error = answers.get(timeout=20)
        if error is None:
            seen.append([result.get_response().id, result.as_numpy("pixels").tolist()])
        else:
            seen.append(["failed", str(error.message())])
    client.stop_stream()
    return seen


def main(target: str) -> dict[str, Any]:
    client = triton.InferenceServerClient(target)
    seen: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("mlp"),
        "unknown_ready": refusal_of(lambda: client.is_model_ready("vae")),
        "server": client.get_server_metadata(as_json=True),
        "model": client.get_model_metadata("mlp", as_json=True),
    }
    seen["unknown_config"] = refusal_of(lambda: client.get_model_config("vae"))
    for what, ask in {
        "SystemSharedMemoryStatus": client.get_system_shared_memory_status,
        "SystemSharedMemoryRegister": lambda: client.register_system_shared_memory("x", "/x", 8),
        "SystemSharedMemoryUnregister": lambda: client.unregister_system_shared_memory("x"),
        "CudaSharedMemoryStatus": client.get_cuda_shared_memory_status,
        "CudaSharedMemoryRegister": lambda: client.register_cuda_shared_memory("x", b"", 0, 8),
        "CudaSharedMemoryUnregister": lambda: client.unregister_cuda_shared_memory("x"),
        "RepositoryModelLoad": lambda: client.load_model("mlp", config="{}"),
        "RepositoryModelUnload": lambda: client.unload_model("mlp"),
        "TraceSetting": client.get_trace_settings,
        "LogSettings": client.get_log_settings,
    }.items():
        seen[what] = refusal_of(ask)
    answer = client.infer("mlp", tensors(address(7, 5, 1000)), request_id="abc", parameters={"trace": "x"})
    seen["pixels"] = answer.as_numpy("pixels").tolist()
    seen["answer"] = {"id": answer.get_response().id, "version": answer.get_response().model_version}
    seen["answer"]["trace"] = answer.get_response().parameters["trace"].string_param
    seen["answer"]["seed"] = answer.get_response().parameters["seed"].int64_param

    rows = np.linspace(-2, 2, 3 * 64, dtype=np.float32).reshape(3, 64)
    both = [triton.InferRequestedOutput("images"), triton.InferRequestedOutput("pixels")]
    answer = client.infer("mlp", tensors({"latents": ("FP32", rows)}), outputs=both)
    images, pixels = answer.as_numpy("images"), answer.as_numpy("pixels")
    seen["both"] = [list(images.shape), list(pixels.shape), float(np.abs(images[:, 0] * 255 - pixels).max())]
    seen["latents_pixels"] = pixels.tolist()

    done: queue.Queue[Any] = queue.Queue()
    for number in range(20):
        client.async_infer("dcgan", tensors(address(number, 2)), lambda result, error: done.put(shape_of(result, error)))
    seen["async"] = [done.get(timeout=30) for _ in range(20)]

    seen["refusals"] = {
        "dtype": refusal(client, {"latents": ("FP64", rows.astype(np.float64))}),
        "shape": refusal(client, {"latents": ("FP32", rows[:, :63].copy())}),
        "axes": refusal(client, {"latents": ("FP32", rows[:, :, None].copy())}),
        "input": refusal(client, {"noise": ("FP32", rows)}),
        "output": refusal(client, address(1, 1), ["logits"]),
        "nan": refusal(client, {"latents": ("FP32", rows * np.float32("nan"))}),
        "missing": refusal(client, {"seed": ("UINT64", np.array([1], np.uint64))}),
        "mixed": refusal(client, {"latents": ("FP32", rows), "seed": ("UINT64", np.array([1], np.uint64))}),
        "negative": refusal(client, address(1, -1)),
        "over": refusal(client, address(1, 100_000)),
        "oversize": refusal(client, {"latents": ("FP32", np.zeros((20_000, 64), np.float32))}),
        "model": refusal(client, address(1, 1), model="vae"),
        "version": refusal(client, address(1, 1), version="9"),
        "odd_version": refusal(client, address(1, 1), version="../1"),
    }
    seen["stream"] = streamed(client, 5)
    seen["config"] = client.get_model_config("cdcgan", as_json=True)["config"]
    seen["statistics"] = client.get_inference_statistics("mlp", as_json=True)["model_stats"]
    seen["all_statistics"] = [each["name"] for each in client.get_inference_statistics(as_json=True)["model_stats"]]
    return seen


def shape_of(result: Any, error: Any) -> Any:
    return str(error) if error else result.as_numpy("pixels").shape


def refusal_of(call: Any) -> list[str]:
    try:
        call()
    except triton.InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    return ["OK", ""]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
