"""Asking a conditional model for digits: by label, by address, truncated, on the way from one to another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from serve.client import DigitClient
from serve.client.command import main
from serve.latents import Span, draw_span, slerp
from serve.manifest import BUNDLED_DIR, QUALITY_FILE
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.inference import open_inference_pb2 as oip
from serve.pb.inference import open_inference_pb2_grpc as oip_grpc
from tests.comparing import apart
from tests.server_process import ServerProcess

INVALID = grpc.StatusCode.INVALID_ARGUMENT
Z = 100


@pytest.fixture(scope="module")
def inference(shared_server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(shared_server.target) as channel:
        yield oip_grpc.GRPCInferenceServiceStub(channel)


def test_a_label_for_all_a_label_for_each_and_the_tapes_own(client: DigitClient) -> None:
    sevens = client.generate(12, seed=5, labels=7)
    assert sevens.labels.tolist() == [7] * 12
    each = client.generate(10, seed=5, labels=range(10))
    assert each.labels.tolist() == list(range(10))
    assert apart(each.pixels[7], sevens.pixels[7]) <= 1, "the label changes the digit, the address stays"
    own = client.generate(200, seed=5)
    assert own.labels.tolist() == draw_span(Span(5, 0, 200), Z, 10)[1].tolist()
    for index in (0, 113):
        again = client.generate(1, seed=5, start=index, labels=int(own.labels[index]))
        assert apart(again.pixels[0], own.pixels[index]) <= 1


def test_explicit_latents_with_labels_are_the_address_with_them(client: DigitClient) -> None:
    rows = client.latents(3, 10, 4)
    assert rows.tobytes() == draw_span(Span(3, 10, 4), Z, 10)[0].tobytes()
    digits = client.generate(latents=rows, labels=[1, 2, 3, 4])
    assert digits.labels.tolist() == [1, 2, 3, 4]
    assert apart(digits.pixels, client.generate(4, seed=3, start=10, labels=[1, 2, 3, 4]).pixels) <= 1


def test_a_stream_goes_through_its_labels_in_turn_by_index(client: DigitClient) -> None:
    chunks = list(client.stream(50, seed=2, start=3, labels=[4, 5, 6], chunk=8))
    labels = np.concatenate([chunk.labels for chunk in chunks])
    assert labels.tolist() == [[4, 5, 6][index % 3] for index in range(3, 53)]
    own = np.concatenate([chunk.labels for chunk in client.stream(50, seed=2, start=3, chunk=8)])
    assert own.tolist() == draw_span(Span(2, 3, 50), Z, 10)[1].tolist()


def test_truncation_takes_variety_away_and_keeps_the_address(client: DigitClient) -> None:
    def variety(truncation: float) -> float:
        return float(client.generate(200, seed=1, labels=4, truncation=truncation).pixels.std(axis=0).mean())

    spreads = [variety(truncation) for truncation in (0.1, 0.5, 1.0, 0.0)]
    assert spreads == sorted(spreads)
    assert spreads[0] < spreads[-1] / 2
    rows, _ = draw_span(Span(1, 0, 5, truncation=0.5), Z, 10)
    by_latents = client.generate(latents=rows, labels=4)
    assert apart(by_latents.pixels, client.generate(5, seed=1, labels=4, truncation=0.5).pixels) <= 1


def test_interpolation_begins_and_ends_at_its_addresses(client: DigitClient) -> None:
    begin, end = (5, 0), (6, 9)
    way = client.interpolate(begin, end, 9, labels=3)
    assert way.labels.tolist() == [3] * 9
    assert way.seed is None
    for step, (seed, index) in ((0, begin), (8, end)):
        assert apart(way.pixels[step], client.generate(1, seed=seed, start=index, labels=3).pixels[0]) <= 1
    rows = slerp(client.latents(*begin)[0], client.latents(*end)[0], 9)
    assert apart(way.pixels, client.generate(latents=rows, labels=3).pixels) <= 1
    moved = np.abs(np.diff(way.pixels.astype(int), axis=0)).mean(axis=(1, 2))
    whole = np.abs(way.pixels[0].astype(int) - way.pixels[-1]).mean()
    assert moved.max() < whole, "it goes by steps and does not jump"


def test_interpolation_without_labels_has_those_of_the_nearer_end(client: DigitClient) -> None:
    ends = [int(client.generate(1, seed=seed).labels[0]) for seed in (1, 2)]
    assert client.interpolate((1, 0), (2, 0), 5).labels.tolist() == [ends[0]] * 3 + [ends[1]] * 2
    assert len(client.interpolate((1, 0), (2, 0), 4, model="mlp").labels) == 0


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("model dcgan/1 is unconditional and takes no labels", {"count": 1, "model": "dcgan", "labels": [1]}),
        ("labels must be from 0 to 9 for model rpgan/1, got 10", {"count": 1, "labels": [10]}),
        ("labels must be from 0 to 9 for model rpgan/1, got 4294967295", {"count": 1, "labels": [2**32 - 1]}),
        ("labels has 2 entries for 3 digits; give one for all, or one for each", {"count": 3, "labels": [1, 2]}),
        ("labels are needed with latents", {"latents": bytes(400)}),
        ("truncation must be 0.01 or more, or 0 for none, got -1", {"count": 1, "truncation": -1}),
        ("truncation must be 0.01 or more, or 0 for none, got nan", {"count": 1, "truncation": float("nan")}),
        ("truncation must be 0.01 or more, or 0 for none, got inf", {"count": 1, "truncation": float("inf")}),
        ("seed, start and truncation cannot go with latents", {"latents": bytes(400), "truncation": 1, "labels": [1]}),
    ],
)
def test_what_a_model_cannot_be_asked_for_is_named(stub: Any, text: str, fields: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest(**fields), timeout=20)
    assert (caught.value.code(), text in caught.value.details()) == (INVALID, True), caught.value.details()


ENDS = {"begin": pb.Address(), "end": pb.Address()}


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("steps must be from 2 to 4096 for uint8, got 1", {"steps": 1, **ENDS}),
        ("steps must be from 2 to 1024 for float32, got 1025", {"steps": 1025, "format": pb.IMAGE_FORMAT_FLOAT32, **ENDS}),
        ("end is missing", {"steps": 3, "begin": pb.Address(seed=1)}),
        ("start + count must be at most 2^63", {"steps": 3, "begin": pb.Address(index=2**63), "end": pb.Address()}),
        ("labels has 2 entries", {"steps": 3, "begin": pb.Address(), "end": pb.Address(), "labels": [1, 2]}),
    ],
)
def test_a_bad_interpolation_is_refused(stub: Any, text: str, fields: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Interpolate(pb.InterpolateRequest(**fields), timeout=20)
    assert (caught.value.code(), text in caught.value.details()) == (INVALID, True), caught.value.details()


def test_a_stream_with_labels_out_of_range_is_refused(client: DigitClient) -> None:
    with pytest.raises(grpc.RpcError, match="labels must be from 0 to 9"):
        list(client.stream(10, labels=[3, 11]))


def test_a_model_says_what_can_be_asked_for_and_how_good_it_is(client: DigitClient) -> None:
    about = {name: client.get_model(name) for name in ("rpgan", "cdcgan", "dcgan", "mlp")}
    assert {name: each.labels for name, each in about.items()} == {"rpgan": 10, "cdcgan": 10, "dcgan": 0, "mlp": 0}
    for name, each in about.items():
        assert each.quality_json == (BUNDLED_DIR / name / "1" / QUALITY_FILE).read_text()
        tolerance = each.tolerance
        assert (tolerance.images, tolerance.pixel_levels, tolerance.pixel_identical_share) == (1e-5, 1, 0.999)
        assert (json.loads(each.quality_json)["model"]["label_accuracy"] is not None) is (each.labels > 0)


def infer(inference: Any, outputs: tuple[str, ...], model: str = "cdcgan", **tensors: Any) -> Any:
    kinds = {"seed": ("UINT64", "<u8"), "count": ("INT32", "<i4"), "latents": ("FP32", "<f4"), "labels": ("INT64", "<i8"),
             "truncation": ("FP32", "<f4")}  # fmt: skip
    arrays = {name: np.asarray(values, kinds[name][1]) for name, values in tensors.items()}
    tensor = oip.ModelInferRequest.InferInputTensor
    request = oip.ModelInferRequest(
        model_name=model,
        inputs=[tensor(name=name, datatype=kinds[name][0], shape=array.shape) for name, array in arrays.items()],
        outputs=[oip.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        raw_input_contents=[array.tobytes() for array in arrays.values()],
    )
    answer = inference.ModelInfer(request, timeout=20)
    kinds_out = {"pixels": np.uint8, "labels": np.dtype("<i8")}
    return {
        output.name: np.frombuffer(raw, kinds_out[output.name]).reshape(list(output.shape))
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


def test_the_open_inference_protocol_takes_and_gives_labels(client: DigitClient, inference: Any) -> None:
    asked = infer(inference, ("pixels", "labels"), seed=[5], count=[3], labels=[7, 1, 0], truncation=[1.5])
    assert asked["labels"].tolist() == [7, 1, 0]
    assert apart(asked["pixels"], client.generate(3, seed=5, labels=[7, 1, 0], truncation=1.5, model="cdcgan").pixels) <= 1
    own = infer(inference, ("labels",), seed=[5], count=[20])
    assert own["labels"].tolist() == draw_span(Span(5, 0, 20), Z, 10)[1].tolist()
    rows = client.latents(8, 0, 2)
    explicit = infer(inference, ("pixels",), latents=rows, labels=[3])
    assert apart(explicit["pixels"], client.generate(2, seed=8, labels=3, model="cdcgan").pixels) <= 1
    metadata = inference.ModelMetadata(oip.ModelMetadataRequest(name="cdcgan"), timeout=20)
    assert {"labels"} <= {item.name for item in metadata.inputs} & {item.name for item in metadata.outputs}
    metadata = inference.ModelMetadata(oip.ModelMetadataRequest(name="mlp"), timeout=20)
    assert "labels" not in {item.name for item in (*metadata.inputs, *metadata.outputs)}


@pytest.mark.parametrize(
    ("text", "model", "outputs", "tensors"),
    [
        ("labels are needed with latents", "cdcgan", (), {"latents": np.zeros((2, Z))}),
        ("labels must be from 0 to 9 for model cdcgan/1, got -1", "cdcgan", (), {"seed": [1], "count": [1], "labels": [-1]}),
        ("labels must have shape [1] or [n], got [1, 1]", "cdcgan", (), {"seed": [1], "count": [1], "labels": [[1]]}),
        ("mlp/1 is unconditional and takes no labels", "mlp", (), {"seed": [1], "count": [1], "labels": [1]}),
        ("labels cannot be had of mlp, which is unconditional", "mlp", ("labels",), {"seed": [1], "count": [1]}),
        ("truncation must be 0.01 or more", "cdcgan", (), {"seed": [1], "count": [1], "truncation": [-3.0]}),
    ],
)
def test_the_open_inference_protocol_refuses_by_name(
    inference: Any, text: str, model: str, outputs: tuple[str, ...], tensors: dict[str, Any]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        infer(inference, outputs, model, **tensors)
    assert (caught.value.code(), text in caught.value.details()) == (INVALID, True), caught.value.details()


def test_the_command_line_asks_for_digits(
    shared_server: ServerProcess, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--target", shared_server.target, "--count", "3", "--seed", "4", "--out", str(tmp_path / "digits.png")]
    assert main([*flags, "--digit", "7", "--truncation", "0.8"]) == 0
    assert "3 digits by rpgan/1, seed 4" in capsys.readouterr().out
    assert main([*flags, "--digit", "12"]) == 2
    assert "labels must be from 0 to 9 for model rpgan/1, got 12" in capsys.readouterr().err
