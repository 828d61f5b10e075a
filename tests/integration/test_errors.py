"""Errors as programs read them: with grpcio-status over gRPC, and the same fields in HTTP's JSON."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from serve.pb.inference import open_inference_pb2 as oip
from serve.pb.inference import open_inference_pb2_grpc as oip_grpc
from tests.server_process import ServerProcess


def of_grpc(call: Callable[[], object]) -> dict[str, Any]:
    """What a call's error says, in the names of HTTP's JSON. ``from_call`` itself compares code and text with the details."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    status = rpc_status.from_call(raised.value)
    assert status is not None, "no google.rpc.Status goes with the error"
    said: dict[str, Any] = {"error": status.message, "code": raised.value.code().name}
    for detail in status.details:
        message = getattr(error_details_pb2, detail.type_url.rpartition(".")[2])()
        assert detail.Unpack(message)
        if isinstance(message, error_details_pb2.ErrorInfo):
            said |= {"reason": message.reason, "domain": message.domain, **message.metadata}
        elif isinstance(message, error_details_pb2.BadRequest):
            [violation] = message.field_violations
            assert violation.description == status.message[: len(violation.description)] != ""
            said |= {"field": violation.field} if violation.field else {}
        else:
            said["retry_after_s"] = message.retry_delay.ToMilliseconds() / 1000
    return {name: float(value) if name in ("limit", "version") else value for name, value in said.items()}


def of_http(server: ServerProcess, path: str, body: bytes | None = None) -> dict[str, Any]:
    """What an answer's JSON says."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(f"http://{server.http}{path}", body, timeout=20)
    with raised.value as answer:
        said: dict[str, Any] = json.loads(answer.read())
    assert isinstance(said["error"], str), "as the Open Inference Protocol has it"
    return said


def infer(count: int, model: str = "mlp", version: str = "") -> tuple[oip.ModelInferRequest, bytes]:
    request = oip.ModelInferRequest(model_name=model, model_version=version)
    request.inputs.add(name="count", datatype="INT32", shape=[1]).contents.int_contents.append(count)
    tensor = {"name": "count", "datatype": "INT32", "shape": [1], "data": [count]}
    return request, json.dumps({"inputs": [tensor]}).encode()


@pytest.mark.parametrize(
    ("request_", "query", "about"),
    [
        (
            pb.GenerateRequest(model="mlp", count=4097),
            "count=4097&model=mlp",
            {
                "code": "INVALID_ARGUMENT",
                "reason": "INVALID_REQUEST",
                "field": "count",
                "limit": 4096,
                "model": "mlp",
                "version": 1,
            },
        ),
        (
            pb.GenerateRequest(model="mlp", count=2, start=(1 << 63) - 1),
            f"model=mlp&count=2&start={(1 << 63) - 1}",
            {"code": "INVALID_ARGUMENT", "reason": "INVALID_REQUEST", "field": "start", "limit": 1 << 63, "model": "mlp"},
        ),
        (
            pb.GenerateRequest(count=1, labels=[12]),
            "count=1&labels=12",
            {"code": "INVALID_ARGUMENT", "field": "labels", "limit": 9, "model": "rpgan", "version": 1},
        ),
        (
            pb.GenerateRequest(count=1, model="vae", version=3),
            "count=1&model=vae&version=3",
            {"code": "NOT_FOUND", "reason": "UNKNOWN_MODEL", "model": "vae"},
        ),
        (
            pb.GenerateRequest(count=1, model="mlp", version=9),
            "count=1&model=mlp&version=9",
            {"code": "NOT_FOUND", "reason": "UNKNOWN_MODEL", "model": "mlp", "version": 9},
        ),
    ],
)
def test_both_transports_name_what_is_wrong_for_programs(
    stub: Any, shared_server: ServerProcess, request_: pb.GenerateRequest, query: str, about: dict[str, Any]
) -> None:
    by_grpc = of_grpc(lambda: stub.Generate(request_, timeout=20))
    by_http = of_http(shared_server, f"/v1/digits?{query}")
    assert {name: by_grpc.get(name) for name in about} == about
    assert by_grpc["domain"] == "digits-serve"
    texts = [each.pop("error") for each in (by_grpc, by_http)]
    assert all(texts)
    assert by_grpc == by_http


def test_open_inference_tells_the_same_over_both_transports(shared_server: ServerProcess) -> None:
    with grpc.insecure_channel(shared_server.target) as channel:
        stub = oip_grpc.GRPCInferenceServiceStub(channel)
        for model, version, count in (("mlp", "", 0), ("mlp", "", 9999), ("vae", "", 1), ("mlp", "7", 1)):
            request, body = infer(count, model, version)
            by_grpc = of_grpc(lambda request=request: stub.ModelInfer(request, timeout=20))  # type: ignore[misc]
            path = f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"
            assert of_http(shared_server, path, body) == by_grpc
            assert by_grpc["model"] == model
        load = channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelLoad")
        unsupported = of_grpc(lambda: load(b"", timeout=20))
        assert (unsupported["code"], unsupported["reason"]) == ("UNIMPLEMENTED", "UNSUPPORTED")


def test_streams_and_methods_that_are_not_there_have_details_too(stub: Any, shared_server: ServerProcess) -> None:
    request = pb.GenerateStreamRequest(model="mlp", count=4, chunk=5000)
    assert of_grpc(lambda: list(stub.GenerateStream(request, timeout=20)))["field"] == "chunk"
    assert of_grpc(lambda: stub.GetModel(pb.GetModelRequest(model="vae"), timeout=20))["reason"] == "UNKNOWN_MODEL"
    with grpc.insecure_channel(shared_server.target) as channel:
        nowhere = channel.unary_unary("/digits.v1.DigitGenerator/Nowhere")
        assert of_grpc(lambda: nowhere(b"", timeout=20))["reason"] == "UNSUPPORTED"


def test_who_comes_too_often_is_told_when_to_come_again_and_of_which_limit(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--caller-requests-per-s=0.1")
    with grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        stub.Generate(pb.GenerateRequest(model="mlp", count=1), timeout=20)
        often = of_grpc(lambda: stub.Generate(pb.GenerateRequest(model="mlp", count=1), timeout=20))
    assert (often["code"], often["reason"], often["limit"]) == ("RESOURCE_EXHAUSTED", "CALLER_REQUESTS", 0.1)
    assert 0 < often["retry_after_s"] <= 10
    said = of_http(server, "/v1/digits?model=mlp")
    assert (said["reason"], said["limit"]) == ("CALLER_REQUESTS", 0.1)
    assert 0 < said["retry_after_s"] <= 10


def test_a_callers_token_is_spoken_of_by_reason(tmp_path: Any, start_server: Callable[..., ServerProcess]) -> None:
    (tmp_path / "tokens.json").write_text('{"tokens": []}')
    server = start_server(f"--tokens-file={tmp_path / 'tokens.json'}")
    with grpc.insecure_channel(server.target) as channel:
        stub, asked = pb_grpc.DigitGeneratorStub(channel), pb.GenerateRequest(count=1)
        missing = of_grpc(lambda: stub.Generate(asked, timeout=20))
        unknown = of_grpc(lambda: stub.Generate(asked, metadata=(("authorization", "Bearer a.b"),), timeout=20))
    assert [each["reason"] for each in (missing, unknown)] == ["TOKEN_MISSING", "TOKEN_UNKNOWN"]
    assert of_http(server, "/v1/digits")["reason"] == "TOKEN_MISSING"
