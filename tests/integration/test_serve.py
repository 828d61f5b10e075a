"""The running server as its callers see it."""

from __future__ import annotations

import io
import json
import socket
import struct
import time
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from PIL import Image

from serve.client import DigitClient
from serve.client.command import as_text
from serve.engine.provider import EngineOptions
from serve.engine.session import Engine
from serve.latents import INDEX_LIMIT, Span, draw, draw_span
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from tests.server_process import ServerProcess
from tests.waiting import wait_until

MODELS = ("mlp", "dcgan", "cdcgan", "rpgan")


def refused(stub: Any, code: grpc.StatusCode, **fields: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest(**fields), timeout=20)
    assert caught.value.code() is code
    return str(caught.value.details())


def in_process(model: str, span: Span) -> np.ndarray[Any, Any]:
    bundle = read_bundle(BUNDLED_DIR / model / "1")
    rows = draw_span(span, bundle.manifest.latent_size, bundle.manifest.labels)
    return Engine(bundle.model, bundle.manifest, EngineOptions(), 64).compute(*rows)["pixels"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [1, 3, 100])
def test_digits_of_an_address_are_the_models_own_for_its_latents(client: DigitClient, model: str, count: int) -> None:
    digits = client.generate(count, model=model, seed=7, start=1000)
    assert (digits.model, digits.version, digits.seed, digits.start) == (model, 1, 7, 1000)
    expected = in_process(model, Span(7, 1000, count))
    assert int(np.abs(digits.pixels.astype(int) - expected.astype(int)).max()) <= 1


@pytest.mark.parametrize("model", MODELS)
def test_an_address_gives_the_same_pixels_in_any_company(client: DigitClient, model: str) -> None:
    whole = client.generate(200, model=model, seed=5, start=50).pixels.astype(int)
    alone = np.concatenate([client.generate(1, model=model, seed=5, start=50 + row).pixels for row in range(12)])
    streamed = np.concatenate([part.pixels for part in client.stream(200, model=model, seed=5, start=50, chunk=33)])
    assert int(np.abs(whole[:12] - alone).max()) <= 1
    assert int(np.abs(whole - streamed).max()) <= 1


def test_the_same_address_survives_a_restart_and_other_batch_bounds(client: DigitClient, start_server: Any) -> None:
    other = start_server("--instances=1", "--max-batch-size=5")
    with DigitClient(other.target) as elsewhere:
        ours, theirs = (
            connected.generate(64, seed=2**64 - 1, start=2**40).pixels.astype(int) for connected in (client, elsewhere)
        )
    assert int(np.abs(ours - theirs).max()) <= 1


def test_an_omitted_seed_is_drawn_and_returned_so_that_it_can_be_repeated(client: DigitClient) -> None:
    first = client.generate(4)
    assert first.seed is not None
    again = client.generate(4, seed=first.seed)
    assert int(np.abs(first.pixels.astype(int) - again.pixels).max()) <= 1
    assert client.generate(4).seed != first.seed


def test_seed_zero_is_a_seed(client: DigitClient) -> None:
    assert client.generate(2, seed=0).seed == 0


def test_the_default_model_answers_when_none_is_named(client: DigitClient) -> None:
    assert client.generate(1).model == client.list_models().default_model == "rpgan"


def test_explicit_latents_give_what_their_address_gives(client: DigitClient) -> None:
    rows = draw(3, 0, 20, 100)
    by_latents = client.generate(latents=rows, model="dcgan")
    assert by_latents.seed is None
    by_address = client.generate(20, seed=3, model="dcgan")
    assert int(np.abs(by_latents.pixels.astype(int) - by_address.pixels).max()) <= 1


def test_float_images_are_the_pixels_before_rounding(client: DigitClient) -> None:
    floats = client.generate(10, seed=1, as_float=True).pixels
    levels = client.generate(10, seed=1).pixels
    assert floats.dtype == np.float32
    assert float(np.abs(floats * 255 - levels).max()) <= 0.51


def test_png_is_one_picture_per_digit_and_grid_one_for_all(stub: Any) -> None:
    raw = stub.Generate(pb.GenerateRequest(count=5, seed=1), timeout=20)
    pixels = np.frombuffer(raw.images[0], np.uint8).reshape(5, 28, 28)
    png = stub.Generate(pb.GenerateRequest(count=5, seed=1, format=pb.IMAGE_FORMAT_PNG), timeout=20)
    assert len(png.images) == 5
    for content, digit in zip(png.images, pixels, strict=True):
        with Image.open(io.BytesIO(content)) as picture:
            assert int(np.abs(np.asarray(picture).astype(int) - digit).max()) <= 1
    grid = stub.Generate(pb.GenerateRequest(count=5, seed=1, format=pb.IMAGE_FORMAT_PNG_GRID), timeout=20)
    (content,) = grid.images
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (84, 56)


def test_answers_say_what_they_are_and_where_the_time_went(stub: Any) -> None:
    answer = stub.Generate(pb.GenerateRequest(count=3, start=9), timeout=20)
    assert (answer.count, answer.start, answer.height, answer.width) == (3, 9, 28, 28)
    assert answer.format == pb.IMAGE_FORMAT_UINT8
    assert 0 < answer.timing.compute_seconds < 5
    assert 0 <= answer.timing.queue_seconds < 5


def test_a_stream_is_chunks_in_order_that_add_up(client: DigitClient) -> None:
    parts = list(client.stream(1000, seed=4, start=5, chunk=128))
    assert [part.start for part in parts] == [5 + 128 * number for number in range(8)]
    assert [len(part.pixels) for part in parts] == [128] * 7 + [104]


def test_a_lone_stream_is_answered_though_its_chunks_are_as_large_as_the_queue(start_server: Any) -> None:
    """Issue: it was refused on an idle server, because it has several chunks under way; bulk work waits for room."""
    server = start_server("--max-queue-images=128", "--max-count=128", "--instances=1")
    with grpc.insecure_channel(server.target) as channel:
        request = pb.GenerateStreamRequest(count=1000, chunk=128, seed=3, model="dcgan")
        parts = list(pb_grpc.DigitGeneratorStub(channel).GenerateStream(request, timeout=60))
    assert [part.start for part in parts] == [128 * number for number in range(8)]
    assert sum(part.count for part in parts) == 1000


def test_without_a_server_the_client_says_so_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Issue: it waited its whole timeout and then said only «Deadline Exceeded»."""
    from serve.client.command import main  # noqa: PLC0415  # the module's name is taken by the fixture here

    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    began = time.monotonic()
    assert main(["--target", f"127.0.0.1:{port}", "--timeout=60"]) == 1
    assert time.monotonic() - began < 30
    said = capsys.readouterr().err
    assert said.startswith(f"error: 127.0.0.1:{port}: UNAVAILABLE: ")
    assert "Connection refused" in said
    assert said.endswith(f'is a server running there? make serve ARGS="--grpc-port {port}" starts one\n')
    assert said.count("\n") == 1


def test_models_are_listed_and_described(client: DigitClient) -> None:
    listed = client.list_models()
    assert [(model.name, model.version, model.ready, model.default_version) for model in listed.models] == [
        ("cdcgan", 1, True, True),
        ("dcgan", 1, True, True),
        ("mlp", 1, True, True),
        ("rpgan", 1, True, True),
    ]
    about = client.get_model("mlp")
    assert (about.architecture, about.latent_size, about.height, about.width) == ("mlp", 64, 28, 28)
    assert about.provider in ("cpu", "cuda")
    assert about.digest == read_bundle(BUNDLED_DIR / "mlp" / "1").digest
    assert about.batch_invariant
    assert about.limits.max_count == 4096
    assert json.loads(about.training_json)["config"]["learning_rate"] == 1e-5
    assert json.loads(about.parity_json)["worst_images"] <= 1e-5


INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
HUGE_ROW = np.full(100, -3e38, "<f4").tobytes()  # finite, and within the model it is not
NAN_ROW = struct.pack("<100f", *[0.0] * 57, float("nan"), *[0.0] * 42)


@pytest.mark.parametrize(
    ("code", "text", "fields"),
    [
        (INVALID, "count must be from 1 to 4096 for uint8, got 0", {"count": 0}),
        (INVALID, "count must be from 1 to 4096 for uint8, got 4097", {"count": 4097}),
        (INVALID, "count must be from 1 to 1024 for float32, got 1025", {"count": 1025, "format": pb.IMAGE_FORMAT_FLOAT32}),
        (INVALID, "count must be from 1 to 4096", {"count": 2**32 - 1}),
        (INVALID, "start + count must be at most 2^63", {"count": 2, "start": INDEX_LIMIT - 1}),
        (INVALID, "format 99 is unknown; there are", {"count": 1, "format": 99}),
        (INVALID, "priority 9 is unknown", {"count": 1, "priority": 9}),
        (INVALID, "latents has 399 bytes, which is no multiple of 4 (float32 values)", {"latents": bytes(399)}),
        (INVALID, "latents has 396 bytes, which is no multiple of 400 (100 float32 values a row)", {"latents": bytes(396)}),
        (INVALID, "count is 3, but latents holds 2 rows", {"latents": bytes(800), "count": 3}),
        (INVALID, "latents must be from -10000 to 10000, but row 0 value 57 is nan", {"latents": NAN_ROW}),
        (INVALID, "latents must be from -10000 to 10000, but row 1 value 0 is -3e+38", {"latents": bytes(400) + HUGE_ROW}),
        (INVALID, "seed, start and truncation cannot go with latents", {"latents": bytes(400), "seed": 1}),
        (MISSING, "model 'vae' is not served; there are cdcgan, dcgan, mlp, rpgan", {"count": 1, "model": "vae"}),
        (MISSING, "model 'mlp' has no version 9; there are 1", {"count": 1, "model": "mlp", "version": 9}),
        (MISSING, "model 'mlp' has no version -1", {"count": 1, "model": "mlp", "version": -1}),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_limit(stub: Any, code: Any, text: str, fields: dict[str, Any]) -> None:
    assert text in refused(stub, code, **fields)


@pytest.mark.parametrize(
    ("text", "fields"),
    [("count must be 1 or more", {"count": 0}), ("chunk must be from 1 to 4096", {"count": 9, "chunk": 5000})],
)
def test_a_bad_stream_request_is_refused_too(stub: Any, text: str, fields: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.GenerateStream(pb.GenerateStreamRequest(**fields), timeout=20))
    assert caught.value.code() is INVALID
    assert text in caught.value.details()


def test_a_message_that_does_not_parse_is_the_callers_fault(shared_server: ServerProcess) -> None:
    with grpc.insecure_channel(shared_server.target) as channel:
        call = channel.unary_unary("/digits.v1.DigitGenerator/Generate")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff\xff", timeout=20)
    assert caught.value.code() is INVALID
    assert "not a valid digits.v1.GenerateRequest message" in caught.value.details()


def test_health_is_told_overall_and_for_each_model(shared_server: ServerProcess) -> None:
    with grpc.insecure_channel(shared_server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "digits.v1.DigitGenerator", "digits.v1.DigitGenerator/mlp", "digits.v1.DigitGenerator/dcgan"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="vae"), timeout=20)
        assert caught.value.code() is MISSING


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_describes_every_service_with_its_methods(shared_server: ServerProcess, version: str) -> None:
    with grpc.insecure_channel(shared_server.target) as channel:
        call: Any = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )

        def ask(**request: str) -> Any:
            (answer,) = call(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=20)
            return answer

        names = {service.name for service in ask(list_services="").list_services_response.service}
        member = "digits.v1.DigitGenerator.Generate"  # as grpcurl's describe asks
        assert ask(file_containing_symbol=member).file_descriptor_response == (
            ask(file_containing_symbol="digits.v1.DigitGenerator").file_descriptor_response
        )
        assert ask(file_containing_symbol=f"{member}Nothing").error_response.error_code == MISSING.value[0]
        methods: dict[str, set[str]] = {}
        for name in names:
            for content in ask(file_containing_symbol=name).file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(content)
                for service in file.service:
                    methods[f"{file.package}.{service.name}"] = {method.name for method in service.method}
    assert (
        {
            "digits.v1.DigitGenerator",
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        == names
        <= methods.keys()
    )
    assert methods["digits.v1.DigitGenerator"] == {
        "Generate",
        "GenerateStream",
        "Interpolate",
        "ListModels",
        "GetModel",
        "Status",
    }
    assert "ModelInfer" in methods["inference.GRPCInferenceService"]


def test_http_says_alive_and_ready_and_nothing_else(shared_server: ServerProcess) -> None:
    assert shared_server.get("/healthz") == (200, "alive\n")
    assert shared_server.get("/readyz") == (200, "ready\n")
    assert shared_server.get("/admin")[0] == 404


def test_metrics_count_what_was_done(start_server: Any) -> None:
    server = start_server("--provider=cpu", "--max-batch-size=16", "--instances=1")
    with DigitClient(server.target) as client:
        client.generate(40, model="mlp")
        client.generate(1, model="dcgan", as_float=True)
        with pytest.raises(grpc.RpcError):
            client.generate(0)
    method = {"grpc_service": "digits.v1.DigitGenerator", "grpc_method": "Generate"}
    assert server.metric("grpc_server_started_total", **method) == 3
    assert server.metric("grpc_server_handled_total", **method, grpc_code="OK") == 2
    assert server.metric("grpc_server_handled_total", **method, grpc_code="INVALID_ARGUMENT") == 1
    assert server.metric("grpc_server_handling_seconds_count", **method) == 3
    assert server.metric("digits_images_total", model="mlp", format="uint8") == 40
    assert server.metric("digits_images_total", model="dcgan", format="float32") == 1
    assert server.metric("digits_batch_images_sum", model="mlp") == 40
    assert server.metric("digits_batch_images_count", model="mlp") == 3
    assert server.metric("digits_split_requests_total", model="mlp") == 1
    assert server.metric("digits_queue_wait_seconds_count", model="mlp") == 1
    assert server.metric("digits_compute_seconds_count", model="mlp") == 3
    assert server.metric("digits_encode_seconds_count", model="mlp") == 1
    assert server.metric("digits_models_loaded") == 4
    assert server.metric("digits_provider_info", provider="cpu") == 4
    assert server.metric("digits_model_ready", model="mlp") == 1
    assert server.metric("digits_queue_images") == 0
    assert server.metric("digits_queue_limit_images", model="mlp") == 16384


def test_the_golden_check_runs_again_through_the_live_batcher(start_server: Any) -> None:
    server = start_server("--self-check-interval-s=0.2")
    with DigitClient(server.target) as client:
        wait_until(lambda: client.generate(1) and server.metric("digits_self_checks_total", result="passed") >= 4)
    assert server.metric("digits_self_checks_total", result="breach") == 0


def test_the_clients_picture_and_text(shared_server: ServerProcess, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from serve.client.command import main  # noqa: PLC0415  # the module's name is taken by the fixture here

    out = tmp_path / "digits.png"
    assert main(["--target", shared_server.target, "--out", str(out), "--seed", "5"]) == 0
    with Image.open(out) as picture:
        assert picture.size == (140, 140)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 * 7 + 1
    assert "25 digits by rpgan/1, seed 5, from 0" in lines[-1]


def test_text_shows_the_pixels_where_they_are() -> None:
    pixels = np.zeros((1, 28, 28), np.uint8)
    pixels[0, 0, 0] = pixels[0, 27, 27] = 255
    lines = as_text(pixels, columns=5).splitlines()
    assert (lines[0][0], lines[6][13]) == (chr(0x2801), chr(0x2880))
    assert set("".join(lines)) == {chr(0x2800), chr(0x2801), chr(0x2880)}
