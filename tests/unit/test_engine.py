"""The binding path both providers share, with the CPU in CUDA's place: fixed buffers, buckets, padding, captures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.binding import NO_GRAPH, Binding, Buffers
from serve.cuda import CaptureGate
from serve.engine import Engine, EngineOptions
from serve.errors import EngineError, ProviderError
from serve.latents import Span, draw, draw_span
from serve.repository import BUNDLED_DIR, read_bundle

POWERS = EngineOptions(powers=True)


@pytest.fixture(scope="module", params=["mlp", "dcgan", "cdcgan"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_engine(name: str, options: EngineOptions, largest: int = 16) -> Engine:
    bundle = read_bundle(BUNDLED_DIR / name / "1")
    return Engine(bundle.model, bundle.manifest, options, largest)


def rows(engine: Engine, seed: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """A tape's first rows, with labels for a conditional model."""
    return draw_span(Span(seed, 0, count), engine.manifest.latent_size, engine.manifest.labels)


@pytest.mark.parametrize(
    ("largest", "count", "powers", "exact"), [(16, 1, 1, 1), (16, 3, 4, 3), (16, 9, 16, 9), (12, 9, 12, 9), (12, 12, 12, 12)]
)
def test_a_batch_is_padded_to_a_power_of_two_or_the_largest(largest: int, count: int, powers: int, exact: int) -> None:
    assert make_engine("mlp", POWERS, largest).bucket(count) == powers
    assert make_engine("mlp", EngineOptions(), largest).bucket(count) == exact


@pytest.mark.parametrize(("largest", "buckets"), [(1, [1]), (16, [16, 8, 4, 2, 1]), (12, [12, 8, 4, 2, 1])])
def test_every_bucket_is_warmed_the_largest_first(largest: int, buckets: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("mlp", POWERS, largest)
    seen: list[int] = []
    honest = Engine.run

    def run(self: Engine, count: int, want_images: bool = False) -> Any:
        seen.append(self.bucket(count))
        return honest(self, count, want_images)

    monkeypatch.setattr(Engine, "run", run)
    engine.warm()
    assert list(dict.fromkeys(seen)) == buckets
    assert {engine.bucket(count) for count in range(1, largest + 1)} <= set(seen)


def test_padded_rows_never_leak_and_the_batch_is_what_an_unpadded_one_is(name: str) -> None:
    padded, plain = make_engine(name, POWERS), make_engine(name, EngineOptions())
    padded.compute(*rows(padded, 99, 16))  # what an earlier batch left behind
    for count in range(1, 17):
        given = rows(padded, count, count)
        got, expected = padded.compute(*given, want_images=True), plain.compute(*given, want_images=True)
        assert got.pixels.shape == (count, 28, 28)
        assert got.images is not None
        assert expected.images is not None
        assert got.images.shape == (count, 1, 28, 28)
        assert np.abs(got.images - expected.images).max() <= 1e-5
        assert (got.bucket, expected.bucket) == (padded.bucket(count), count)
        assert not padded.latents(16)[count : got.bucket].any(), "the padding is blank, not somebody's latents"


def test_memory_that_cannot_be_had_is_one_line_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> Buffers:
        raise EngineError("page-locking 3 MB failed: out of memory\nand a trace")

    monkeypatch.setattr("serve.engine.Buffers", none_left)
    with pytest.raises(ProviderError, match=r"^model mlp/1: no memory on cpu for batches of 16 \(page-locking 3 MB .*--max-"):
        make_engine("mlp", EngineOptions())


def test_what_a_run_returned_is_never_written_again(name: str) -> None:
    engine = make_engine(name, POWERS)
    first = engine.compute(*rows(engine, 1, 5), want_images=True)
    assert first.images is not None
    pixels, images = first.pixels.copy(), first.images.copy()
    engine.compute(*rows(engine, 2, 16), want_images=True)
    assert np.array_equal(first.pixels, pixels)
    assert np.array_equal(first.images, images)


def test_buffers_stay_where_they_are(name: str) -> None:
    engine = make_engine(name, POWERS)
    engine.warm()
    addresses = {output: engine._buffers.address(output) for output in ("latents", "labels", "pixels", "images")}
    bindings = dict(engine._bindings)
    for count in (1, 7, 16, 3):
        engine.compute(*rows(engine, 1, count))
    assert addresses == {output: engine._buffers.address(output) for output in addresses}
    assert engine._bindings == bindings, "each bucket is bound once"


def test_more_rows_than_the_largest_batch_go_through_in_pieces(name: str) -> None:
    engine = make_engine(name, POWERS, 8)
    given = rows(engine, 3, 37)
    in_pieces = engine.compute(*given, want_images=True)
    at_once = make_engine(name, POWERS, 64).compute(*given, want_images=True)
    assert in_pieces.images is not None
    assert at_once.images is not None
    assert np.abs(in_pieces.images - at_once.images).max() <= 1e-5


def test_labels_choose_the_digit_and_go_through_with_their_rows() -> None:
    engine = make_engine("cdcgan", EngineOptions())
    latents = np.repeat(rows(engine, 4, 1)[0], 10, axis=0)
    ten = engine.compute(latents, np.arange(10))
    assert ten.labels is not None
    assert ten.labels.tolist() == list(range(10))
    assert len({digit.tobytes() for digit in ten.pixels}) == 10, "one latent vector, ten digits"
    for label in (3, 8):
        [alone] = engine.compute(latents[:1], np.array([label])).pixels
        assert np.abs(alone.astype(np.int16) - ten.pixels[label]).max() <= 1


@pytest.mark.parametrize(("model", "labels"), [("mlp", np.zeros(1, np.int64)), ("cdcgan", None)])
def test_labels_go_to_conditional_models_and_to_no_other(model: str, labels: NDArray[np.int64] | None) -> None:
    engine = make_engine(model, EngineOptions())
    assert (engine.labels(3) is None) == (model == "mlp")
    with pytest.raises(ValueError, match=f"model {model} takes (0|10) labels"):
        engine.compute(draw(1, 0, 1, engine.manifest.latent_size), labels)


def captured(monkeypatch: pytest.MonkeyPatch, run: Callable[[Callable[..., None], Binding, int], None]) -> Engine:
    """An engine that captures on the CPU, where ``run`` stands for how a capture and its replays behave."""
    plain = Binding.run

    def behave(self: Binding, graph_id: int = NO_GRAPH) -> None:
        if graph_id == NO_GRAPH:
            plain(self)
        else:
            run(plain, self, graph_id)

    monkeypatch.setattr(Binding, "run", behave)
    engine = make_engine("mlp", POWERS, 4)
    for bucket in engine.buckets():
        engine._capture(bucket)
    return engine


def test_a_graph_that_replays_rightly_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def run(plain: Callable[..., None], binding: Binding, graph_id: int) -> None:
        used.append(graph_id)
        plain(binding)

    engine = captured(monkeypatch, run)
    assert engine.captures == {4: True, 2: True, 1: True}
    used.clear()
    for count in (1, 2, 3, 4):
        engine.compute(draw(1, 0, count, 64))
    assert used == [1, 2, 4, 4]
    used.clear()
    engine.compute(draw(1, 0, 4, 64), want_images=True)
    assert used == [], "images are rare: they run without a graph"


def test_a_graph_that_returns_its_first_result_for_ever_is_found_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As onnxruntime #20050 had it."""
    once: set[int] = set()

    def run(plain: Callable[..., None], binding: Binding, graph_id: int) -> None:
        if graph_id not in once:
            once.add(graph_id)
            plain(binding)

    engine = captured(monkeypatch, run)
    assert engine.captures == {4: False, 2: False, 1: False}
    assert "mlp/1, batch of 4: runs without a CUDA graph" in caplog.text
    assert engine.compute(draw(7, 0, 3, 64)).pixels.any()


def test_a_capture_that_fails_leaves_the_bucket_running_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(plain: Callable[..., None], binding: Binding, graph_id: int) -> None:
        if graph_id == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand a trace")
        plain(binding)

    engine = captured(monkeypatch, run)
    assert engine.captures == {4: True, 2: False, 1: True}
    assert "batch of 2: runs without a CUDA graph (operation not permitted when stream is capturing)" in caplog.text
    expected = make_engine("mlp", POWERS, 4).compute(draw(7, 0, 2, 64)).pixels
    assert np.array_equal(engine.compute(draw(7, 0, 2, 64)).pixels, expected)


def test_nothing_runs_while_a_graph_is_captured() -> None:
    gate = CaptureGate()
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def long_run() -> None:
        with gate.run():
            inside.set()
            assert leave.wait(30)
            order.append("run ends")

    def capture() -> None:
        with gate.capture():
            order.append("capture")

    def late_run() -> None:
        with gate.run():
            order.append("late run")

    first = threading.Thread(target=long_run)
    first.start()
    assert inside.wait(30)
    with gate.run():
        order.append("side by side")
    capturing = threading.Thread(target=capture)
    capturing.start()
    while not gate._capturing:
        pass
    late = threading.Thread(target=late_run)
    late.start()
    leave.set()
    for thread in (first, capturing, late):
        thread.join(30)
    assert order == ["side by side", "run ends", "capture", "late run"]
