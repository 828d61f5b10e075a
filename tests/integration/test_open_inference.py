"""The Open Inference Protocol, spoken by the unmodified tritonclient and, for what that cannot say, by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from serve.api.open_inference import UNSUPPORTED
from serve.client import DigitClient
from serve.pb.inference import open_inference_pb2 as pb
from serve.pb.inference import open_inference_pb2_grpc as pb_grpc
from tests.server_process import ServerProcess


@pytest.fixture(scope="module")
def seen(shared_server: ServerProcess, by_triton: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
    """What tritonclient saw."""
    return by_triton("triton_caller.py", shared_server.target)


def test_live_ready_and_metadata(seen: dict[str, Any]) -> None:
    assert (seen["live"], seen["ready"], seen["model_ready"]) == (True, True, True)
    assert seen["unknown_ready"][0] == "StatusCode.NOT_FOUND"
    assert seen["server"]["name"] == "digits-serve"
    model = seen["model"]
    assert (model["name"], model["versions"], model["platform"]) == ("mlp", ["1"], "onnxruntime_onnx")
    assert {"name": "latents", "datatype": "FP32", "shape": ["-1", "64"]} in model["inputs"]
    assert {"name": "pixels", "datatype": "UINT8", "shape": ["-1", "28", "28"]} in model["outputs"]


def test_an_address_gives_the_digits_that_the_own_api_gives(seen: dict[str, Any], shared_server: ServerProcess) -> None:
    with DigitClient(shared_server.target) as client:
        own = client.generate(5, model="mlp", seed=7, start=1000).pixels.astype(int)
    assert int(np.abs(np.array(seen["pixels"]) - own).max()) <= 1
    assert seen["answer"] == {"id": "abc", "version": "1", "trace": "x", "seed": 7}


def test_latents_give_images_and_pixels_as_asked(seen: dict[str, Any], shared_server: ServerProcess) -> None:
    images_shape, pixels_shape, apart = seen["both"]
    assert (images_shape, pixels_shape) == ([3, 1, 28, 28], [3, 28, 28])
    assert apart <= 0.51
    rows = np.linspace(-2, 2, 3 * 64, dtype=np.float32).reshape(3, 64)
    with DigitClient(shared_server.target) as client:
        own = client.generate(latents=rows, model="mlp").pixels.astype(int)
    assert int(np.abs(np.array(seen["latents_pixels"]) - own).max()) <= 1


def test_async_calls_are_all_answered(seen: dict[str, Any]) -> None:
    assert seen["async"] == [[2, 28, 28]] * 20


@pytest.mark.parametrize(
    ("case", "code", "text"),
    [
        ("dtype", "INVALID_ARGUMENT", "inputs: latents must be FP32, got 'FP64'"),
        ("shape", "INVALID_ARGUMENT", "latents must have shape [n, 64], got [3, 63]"),
        ("axes", "INVALID_ARGUMENT", "inputs: latents has the impossible shape [3, 64, 1]"),
        ("input", "INVALID_ARGUMENT", "inputs: 'noise' is unknown; there are latents, seed, count, start, truncation, labels"),
        ("output", "INVALID_ARGUMENT", "outputs: 'logits' is unknown; there are pixels, images, labels"),
        ("nan", "INVALID_ARGUMENT", "latents must be from -10000 to 10000, but row 0 value 0 is nan"),
        ("missing", "INVALID_ARGUMENT", "inputs: count is missing"),
        ("mixed", "INVALID_ARGUMENT", "inputs: latents cannot go with seed, count, start or truncation"),
        ("negative", "INVALID_ARGUMENT", "count must be from 1 to 4096 for uint8, got -1"),
        ("over", "INVALID_ARGUMENT", "count must be from 1 to 4096 for uint8, got 100000"),
        ("oversize", "RESOURCE_EXHAUSTED", ""),
        ("model", "NOT_FOUND", "model 'vae' is not served; there are cdcgan, dcgan, mlp, rpgan"),
        ("version", "NOT_FOUND", "model 'mlp' has no version 9; there are 1"),
        ("odd_version", "NOT_FOUND", "has no version '../1'"),
    ],
)
def test_refusals_name_tensor_and_field(seen: dict[str, Any], case: str, code: str, text: str) -> None:
    status, message = seen["refusals"][case]
    assert status == f"StatusCode.{code}"
    assert text in message


def infer(target: str, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    with grpc.insecure_channel(target) as channel:
        answer: pb.ModelInferResponse = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=20)
        return answer


def typed(**values: Any) -> list[pb.ModelInferRequest.InferInputTensor]:
    fields = {"seed": ("UINT64", "uint64_contents"), "count": ("INT32", "int_contents")}
    return [
        pb.ModelInferRequest.InferInputTensor(
            name=name, datatype=fields[name][0], shape=[1], contents=pb.InferTensorContents(**{fields[name][1]: [value]})
        )
        for name, value in values.items()
    ]


def test_typed_contents_get_typed_contents(shared_server: ServerProcess) -> None:
    answer = infer(shared_server.target, pb.ModelInferRequest(model_name="mlp", inputs=typed(seed=3, count=2)))
    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("pixels", "UINT8", [2, 28, 28])
    assert not answer.raw_output_contents
    with DigitClient(shared_server.target) as client:
        own = client.generate(2, model="mlp", seed=3).pixels.astype(int)
    assert int(np.abs(np.array(output.contents.uint_contents).reshape(2, 28, 28) - own).max()) <= 1


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ([bytes(8)], "raw_input_contents has 1 entries for 2 inputs"),
        ([bytes(8), bytes(4)], "inputs: seed has both contents and raw_input_contents"),
    ],
)
def test_contents_beside_raw_contents_are_refused(shared_server: ServerProcess, raw: list[bytes], text: str) -> None:
    request = pb.ModelInferRequest(model_name="mlp", inputs=typed(seed=3, count=2), raw_input_contents=raw)
    with pytest.raises(grpc.RpcError) as caught:
        infer(shared_server.target, request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in caught.value.details()


def test_empty_contents_beside_raw_ones_are_none_and_the_seed_may_be_left_out(shared_server: ServerProcess) -> None:
    """MLServer's converter sends an empty contents beside raw values."""
    tensor = pb.ModelInferRequest.InferInputTensor(name="count", datatype="INT32", shape=[1], contents=pb.InferTensorContents())
    request = pb.ModelInferRequest(model_name="mlp", inputs=[tensor], raw_input_contents=[(3).to_bytes(4, "little")])
    answers = [infer(shared_server.target, request) for _ in range(2)]
    assert {len(answer.raw_output_contents[0]) for answer in answers} == {3 * 784}
    drawn = {answer.parameters["seed"].int64_param for answer in answers}
    assert len(drawn) == 2, "each with a seed of its own, and told"


@pytest.mark.parametrize(("seed", "kind"), [(2**63 - 1, "int64_param"), (2**63, "uint64_param")])
def test_the_address_is_told_in_the_parameter_that_every_client_knows_where_it_fits(
    seed: int, kind: str, shared_server: ServerProcess
) -> None:
    tensors = [("count", "INT32", (1).to_bytes(4, "little")), ("seed", "UINT64", seed.to_bytes(8, "little"))]
    inputs = [pb.ModelInferRequest.InferInputTensor(name=name, datatype=of, shape=[1]) for name, of, _ in tensors]
    request = pb.ModelInferRequest(model_name="mlp", inputs=inputs, raw_input_contents=[raw for *_, raw in tensors])
    answer = infer(shared_server.target, request).parameters
    assert (answer["seed"].WhichOneof("parameter_choice"), getattr(answer["seed"], kind)) == (kind, seed)
    assert answer["start"].WhichOneof("parameter_choice") == "int64_param"


@pytest.mark.parametrize("where", ["request", "input", "output"])
@pytest.mark.parametrize("name", ["sequence_id", "classification", "shared_memory_region"])
def test_parameters_that_ask_for_another_answer_are_refused_by_name(where: str, name: str, shared_server: ServerProcess) -> None:
    request = pb.ModelInferRequest(model_name="mlp", inputs=typed(seed=3, count=2))
    holder = {"request": request, "input": request.inputs[0], "output": request.outputs.add(name="pixels")}[where]
    holder.parameters[name].int64_param = 1
    with pytest.raises(grpc.RpcError) as caught:
        infer(shared_server.target, request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"parameters: {name} " in caught.value.details()


@pytest.mark.parametrize(("shape", "raw"), [([2**62, 2**62], bytes(4)), ([0, 2**63 - 1], b""), ([0, 64], b""), ([-1, 64], b"")])
def test_an_impossible_shape_allocates_nothing_and_is_refused(shape: list[int], raw: bytes, shared_server: ServerProcess) -> None:
    tensor = pb.ModelInferRequest.InferInputTensor(name="latents", datatype="FP32", shape=shape)
    with pytest.raises(grpc.RpcError) as caught:
        infer(shared_server.target, pb.ModelInferRequest(model_name="mlp", inputs=[tensor], raw_input_contents=[raw]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_is_answered_in_order_and_one_wrong_request_ends_it_not(
    seen: dict[str, Any], shared_server: ServerProcess
) -> None:
    with DigitClient(shared_server.target) as client:
        for number, (request_id, pixels) in enumerate(seen["stream"]):
            if number == 1:
                assert (request_id, "count must be from 1 to" in pixels) == ("failed", True)
                continue
            own = client.generate(1 + number, model="mlp", seed=7, start=number).pixels.astype(int)
            assert request_id == str(number)
            assert int(np.abs(np.array(pixels) - own).max()) <= 1


def test_configuration_and_statistics(seen: dict[str, Any]) -> None:
    config = seen["config"]
    assert (config["name"], config["platform"], config.get("max_batch_size", 0)) == ("cdcgan", "onnxruntime_onnx", 0)
    assert {"name": "latents", "data_type": "TYPE_FP32", "dims": ["-1", "100"], "optional": True} in config["input"]
    assert {"name": "labels", "data_type": "TYPE_INT64", "dims": ["-1"]} in config["output"]
    [mlp] = seen["statistics"]
    stats = {name: int(each["count"]) for name, each in mlp["inference_stats"].items() if each.get("count")}
    assert int(mlp["inference_count"]) >= 5 + 1 + 3 + 4 + 5
    assert 0 < int(mlp["execution_count"]) == stats["compute_infer"] == stats["compute_input"]
    assert stats["success"] == stats["queue"] == stats["compute_output"] > 4
    assert int(mlp["inference_stats"]["success"]["ns"]) > int(mlp["inference_stats"]["compute_infer"]["ns"]) > 0
    assert seen["all_statistics"] == ["cdcgan", "dcgan", "mlp", "rpgan"]
    assert seen["unknown_config"][0] == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize("method", UNSUPPORTED)
def test_what_is_not_supported_says_so_in_a_line(seen: dict[str, Any], method: str) -> None:
    code, text = seen[method]
    assert code == "StatusCode.UNIMPLEMENTED"
    assert text == f"{method} is not supported: {UNSUPPORTED[method]}"


def test_every_rpc_of_the_protocol_is_answered_or_refused_and_in_the_docs() -> None:
    own = {method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
    guide = (Path(__file__).parents[2] / "docs" / "open-inference.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (yes|no)\b", guide, re.MULTILINE))
    assert rows == dict.fromkeys(own, "yes") | dict.fromkeys(UNSUPPORTED, "no")
    assert f"{len(own)} of {len(own) + len(UNSUPPORTED)}" in guide
