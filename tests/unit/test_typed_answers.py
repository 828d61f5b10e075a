"""Open Inference answers with typed contents: what protobuf would have made, and large ones not on the event loop."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from serve.api import open_inference
from serve.api.open_inference import OpenInferenceService
from serve.core.request import Digits
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle
from serve.pb.inference import open_inference_pb2 as pb

CDCGAN = read_bundle(BUNDLED_DIR / "cdcgan" / "1")


class FakeCore:
    """Answers with digits made by the generator of random numbers, pixels and images apart so that both can be told."""

    def __init__(self, count: int) -> None:
        chance = np.random.default_rng(1)
        self.pixels = [chance.integers(0, 256, (part, 28, 28)).astype(np.uint8) for part in (count // 2, count - count // 2)]
        self.images = [chance.random((count, 1, 28, 28), np.float32)]
        self.labels = chance.integers(0, 10, count)

    async def generate(self, request: Any, account: Any) -> Digits:
        model = cast(Any, SimpleNamespace(manifest=CDCGAN.manifest))
        return Digits(
            model=model, encoding="uint8", seed=7, start=0, count=len(self.labels), pixels=self.pixels,
            images=self.images, labels=self.labels, queued_at=0.0, queue_seconds=0.0, compute_seconds=0.0,
        )  # fmt: skip


def ask(core: FakeCore, names: list[str]) -> pb.ModelInferResponse:
    request = pb.ModelInferRequest(model_name="cdcgan")
    for name, kind, contents in (
        ("seed", "UINT64", pb.InferTensorContents(uint64_contents=[7])),
        ("count", "INT32", pb.InferTensorContents(int_contents=[len(core.labels)])),
    ):
        request.inputs.add(name=name, datatype=kind, shape=[1], contents=contents)
    for name in names:
        request.outputs.add(name=name)
    call = cast(Any, SimpleNamespace(deadline=None, account=None, encoded=lambda digits, seconds: None))
    service = OpenInferenceService(cast(Any, core), lambda: True, cast(Any, None), list)
    return pb.ModelInferResponse.FromString(asyncio.run(service.model_infer(request, call)))


@pytest.mark.parametrize("count", [2, 300])
def test_typed_contents_hold_the_values(count: int) -> None:
    core = FakeCore(count)
    answer = ask(core, ["labels", "pixels", "images"])
    assert [output.name for output in answer.outputs] == ["labels", "pixels", "images"]
    labels, pixels, images = answer.outputs
    assert list(labels.contents.int64_contents) == core.labels.tolist()
    assert list(pixels.contents.uint_contents) == np.concatenate(core.pixels).ravel().tolist()
    assert np.array_equal(np.array(images.contents.fp32_contents, np.float32), core.images[0].ravel())
    assert (list(pixels.shape), list(images.shape)) == ([count, 28, 28], [count, 1, 28, 28])
    assert not answer.raw_output_contents


def test_a_large_typed_answer_is_not_made_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: one of 4,096 digits held the event loop for 108 ms."""
    threads: list[threading.Thread] = []
    honest = open_inference._encode

    def recorded(*arguments: Any) -> bytes:
        threads.append(threading.current_thread())
        return honest(*arguments)

    monkeypatch.setattr(open_inference, "_encode", recorded)
    ask(FakeCore(4096), ["pixels"])
    ask(FakeCore(2), ["pixels"])
    assert threads[0] is not threading.main_thread()
    assert threads[1] is threading.main_thread()
