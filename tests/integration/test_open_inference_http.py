"""The Open Inference Protocol over HTTP: the answers of the service over gRPC, to tritonclient and to hand-made requests."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest

from serve.api.http import DIGITS, INTERPOLATION
from serve.client import DigitClient
from tests.server_process import ServerProcess


@pytest.fixture(scope="module")
def seen(shared_server: ServerProcess, by_triton: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
    """What tritonclient saw."""
    return by_triton("triton_http_caller.py", shared_server.http)


@pytest.fixture(scope="module")
def openapi(shared_server: ServerProcess) -> dict[str, Any]:
    """The description that the server gives of itself."""
    status, text = shared_server.get("/openapi.json")
    assert status == 200
    described: dict[str, Any] = json.loads(text)
    return described


def post(server: ServerProcess, body: bytes, path: str = "/v2/models/mlp/infer", **headers: str) -> tuple[int, Any, bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://{server.http}{path}", body, named)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def infer(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": inputs, **more}).encode()


BIGGEST_SEED = 2**64 - 1
COUNT = {"name": "count", "datatype": "INT32", "shape": [1], "data": [2]}
SEED = {"name": "seed", "datatype": "UINT64", "shape": [1], "data": [BIGGEST_SEED]}


def test_health_and_metadata(seen: dict[str, Any]) -> None:
    assert (seen["live"], seen["ready"], seen["model_ready"]) == (True, True, [True, True, False])
    assert seen["server"]["name"] == "digits-serve"
    assert seen["server"]["extensions"] == ["binary_tensor_data"]
    model = seen["model"]
    assert (model["name"], model["versions"], model["platform"]) == ("mlp", ["1"], "onnxruntime_onnx")
    assert {"name": "latents", "datatype": "FP32", "shape": [-1, 64]} in model["inputs"]
    assert {"name": "pixels", "datatype": "UINT8", "shape": [-1, 28, 28]} in model["outputs"]


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_gets_the_digits_of_the_address_in_either_form(
    seen: dict[str, Any], binary: bool, shared_server: ServerProcess
) -> None:
    with DigitClient(shared_server.target) as client:
        own = client.generate(5, model="mlp", seed=BIGGEST_SEED, start=1000).pixels.astype(int)
    pixels, images = np.array(seen[f"pixels {binary}"]), np.array(seen[f"images {binary}"])
    assert int(np.abs(pixels - own).max()) <= 1
    assert images.shape == (5, 1, 28, 28)
    assert float(np.abs(images[:, 0] * 255 - own).max()) <= 1
    assert seen[f"answer {binary}"] == ["abc", "1", BIGGEST_SEED]


def test_latents_and_refusals(seen: dict[str, Any], shared_server: ServerProcess) -> None:
    rows = np.linspace(-2, 2, 3 * 64, dtype=np.float32).reshape(3, 64)
    with DigitClient(shared_server.target) as client:
        own = client.generate(latents=rows, model="mlp").pixels.astype(int)
    assert int(np.abs(np.array(seen["latents"]) - own).max()) <= 1
    status, text = seen["refused"]
    assert status == "400"
    assert "count must be from 1 to" in text


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"{", 400, "the request is not an inference request in JSON"),
        (b"[" * 100_000, 400, "the request is not an inference request in JSON"),
        (b"{}", 400, "missing required field `inputs`"),
        (infer(), 400, "count is missing"),
        (infer(COUNT, COUNT), 400, "count is given twice"),
        (infer(COUNT | {"name": "size"}), 400, "'size' is unknown"),
        (infer(COUNT | {"datatype": "INT64"}), 400, "count must be INT32, got 'INT64'"),
        (infer(COUNT | {"shape": [2]}), 400, "needs 2 values, got 1"),
        (infer(COUNT | {"shape": [1 << 62, 1 << 62]}), 400, "values, got 1"),
        (infer(COUNT | {"data": [1.5]}), 400, "count: data must be a list of whole numbers"),
        (infer(COUNT | {"data": [True]}), 400, "count: data must be a list of whole numbers"),
        (infer(COUNT | {"data": [1 << 40]}), 400, "count: data must be a list of whole numbers"),
        (infer(COUNT, SEED | {"data": [-1]}), 400, "seed: data must be a list of whole numbers"),
        (infer(COUNT, SEED | {"data": "7"}), 400, "seed: data must be a list of whole numbers"),
        (infer(COUNT | {"data": None}), 400, "count: data must be a list"),
        (infer(COUNT, outputs=[{"name": "faces"}]), 400, "outputs: 'faces' is unknown"),
        (infer(COUNT, outputs=[{"name": "labels"}]), 400, "outputs: labels cannot be had of mlp"),
        (infer(COUNT, parameters={"sequence_id": 7}), 400, "parameters: sequence_id is not supported"),
        (infer(COUNT | {"parameters": {"shared_memory_region": "x"}}), 400, "shared_memory_region is not supported"),
        (infer(COUNT | {"data": None, "parameters": {"binary_data_size": 9}}), 400, "no binary_data_size of the bytes"),
        (infer(COUNT) + b"more", 400, "the request is not an inference request in JSON"),
        (b" " * (5 << 20), 400, "the request is larger than"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(body: bytes, status: int, text: str, shared_server: ServerProcess) -> None:
    got, _, answer = post(shared_server, body)
    assert got == status
    assert text in json.loads(answer)["error"]


def test_bytes_that_do_not_fit_the_header_are_refused(shared_server: ServerProcess) -> None:
    head = infer(COUNT | {"data": None, "parameters": {"binary_data_size": 4}})
    raw = np.int32(2).tobytes()
    status, _, answer = post(shared_server, head + raw, Inference_Header_Content_Length=str(len(head)))
    assert status == 200
    assert json.loads(answer)["outputs"][0]["shape"] == [2, 28, 28]
    for content, length, text in (
        (head + raw + b"?", str(len(head)), "1 bytes follow the last tensor"),
        (head + raw[:3], str(len(head)), "no binary_data_size of the bytes that follow"),
        (head + raw, "-1", "must be from 0 to the body's"),
        (head + raw, str(len(head) + 99), "must be from 0 to the body's"),
    ):
        status, _, answer = post(shared_server, content, Inference_Header_Content_Length=length)
        assert (status, text in json.loads(answer)["error"]) == (400, True), answer


def test_null_is_what_is_not_there(shared_server: ServerProcess) -> None:
    """As MLServer's client writes a request."""
    absent = {"id": None, "parameters": None}
    count = COUNT | {"parameters": None}
    body = infer(count, SEED | {"parameters": {"content_type": None}}, outputs=[{"name": "pixels", "parameters": None}], **absent)
    expected = infer(COUNT, SEED)
    for with_null in (body, infer(COUNT, SEED, outputs=None, **absent)):
        status, _, answer = post(shared_server, with_null)
        assert (status, json.loads(answer)) == (200, json.loads(post(shared_server, expected)[2]))


def test_a_drawn_seed_is_one_that_javascripts_numbers_keep(shared_server: ServerProcess) -> None:
    for _ in range(20):  # of which one in 2,048 would be small by chance
        drawn = json.loads(post(shared_server, infer(COUNT))[2])["parameters"]["seed"]
        assert drawn == int(float(drawn)) <= 2**53


def test_a_whole_answer_in_bytes_by_one_parameter(shared_server: ServerProcess) -> None:
    status, headers, answer = post(shared_server, infer(COUNT, SEED, parameters={"binary_data_output": True}))
    assert status == 200
    size = int(headers["Inference-Header-Content-Length"])
    [output] = json.loads(answer[:size])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(answer) - size == 2 * 784


def test_what_the_description_names_is_there(openapi: dict[str, Any], shared_server: ServerProcess) -> None:
    for path, known in {"/v1/digits": DIGITS, "/v1/interpolation": INTERPOLATION}.items():
        assert {each["name"] for each in openapi["paths"][path]["get"]["parameters"]} == set(known)
    for path, methods in openapi["paths"].items():
        real = path.replace("{model}", "mlp").replace("{version}", "1")
        for method in methods:
            status = post(shared_server, b"", real)[0] if method == "post" else shared_server.get(real)[0]
            assert status in (200, 400), path
    assert shared_server.get("/v2/models/vae")[0] == shared_server.get("/v2/models/mlp/versions/9")[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "schema"),
    [
        ("/v1/digits?count=2", None, "Digits"),
        ("/v1/digits?count=2&model=mlp", None, "Digits"),
        ("/v1/interpolation?seed=1&to_seed=2&steps=3", None, "Digits"),
        ("/v1/status", None, "Status"),
        ("/v1/digits?count=0", None, "Error"),
        ("/nowhere", None, "Error"),
        ("/v2", None, "Server"),
        ("/v2/models/cdcgan", None, "Model"),
        ("/v2/models/mlp/infer", infer(COUNT), "InferenceResponse"),
        ("/v2/models/mlp/infer", b"{", "Error"),
    ],
)
def test_answers_are_as_the_description_says(
    path: str, body: bytes | None, schema: str, openapi: dict[str, Any], shared_server: ServerProcess
) -> None:
    text = shared_server.get(path)[1] if body is None else post(shared_server, body, path)[2]
    wanted = {"$ref": f"#/components/schemas/{schema}", "components": openapi["components"]}
    jsonschema.Draft202012Validator(wanted).validate(json.loads(text))


STRING, STRINGS = {"type": "string"}, {"type": "array", "items": {"type": "string"}}


def an_object(optional: dict[str, Any], **required: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**optional, **required}}


TENSOR = {"name": STRING, "datatype": STRING, "shape": {"type": "array", "items": {"type": "integer"}}}
DATA = {"type": "array", "items": {"type": ["array", "number", "string", "boolean"]}}
AN_ERROR = an_object({}, error=STRING)
# What the protocol's published description requires: kserve/open-inference-protocol, open_inference_rest.yaml (2.0).
REQUIRED: dict[tuple[str, str], tuple[bytes | None, int, Any]] = {
    ("GET", "/v2/health/live"): (None, 200, None),
    ("GET", "/v2/health/ready"): (None, 200, None),
    ("GET", "/v2/models/mlp/versions/1/ready"): (None, 200, None),
    ("GET", "/v2/"): (None, 200, an_object({}, name=STRING, version=STRING, extensions=STRINGS)),
    ("GET", "/v2/models/mlp/versions/1"): (
        None,
        200,
        an_object(
            {
                "versions": STRINGS,
                "inputs": {"type": "array", "items": an_object({}, **TENSOR)},
                "outputs": {"type": "array", "items": an_object({}, **TENSOR)},
            },
            name=STRING,
            platform=STRING,
        ),
    ),
    ("POST", "/v2/models/mlp/versions/1/infer"): (
        infer(COUNT, id="42", outputs=[{"name": "pixels"}]),
        200,
        an_object(
            {"model_version": STRING, "id": {"const": "42"}, "parameters": {"type": "object"}},
            model_name=STRING,
            outputs={"type": "array", "minItems": 1, "items": an_object({"parameters": {"type": "object"}}, **TENSOR, data=DATA)},
        ),
    ),
    ("POST", "/v2/models/mlp/infer"): (infer({**COUNT, "data": [0]}), 400, AN_ERROR),
}


@pytest.mark.parametrize(("method", "path"), REQUIRED)
def test_answers_are_as_the_protocols_published_description_requires(
    method: str, path: str, shared_server: ServerProcess
) -> None:
    body, wanted, schema = REQUIRED[method, path]
    if method == "GET":
        status, text = shared_server.get(path)
    else:
        status, _, answer = post(shared_server, body or b"", path)
        text = answer.decode()
    assert status == wanted, text
    if schema is not None:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
