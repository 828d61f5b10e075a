"""Both engines, the CUDA engine with host memory in its device's place: buffers, buckets, padding, captures."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from serve.engine import device_buffers
from serve.engine.cuda_engine import CudaEngine
from serve.engine.device_buffers import NO_GRAPH, Binding
from serve.engine.provider import EngineOptions
from serve.engine.session import PIXELS_AND_IMAGES, Engine
from serve.errors import DeviceLostError, EngineError, GoldenError, OutOfMemoryError, ProviderError
from serve.latents import Span, draw, draw_span
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle
from tests.host_device import HostDevice

POWERS = EngineOptions(pad_to_powers=True)


@pytest.fixture(scope="module", params=["mlp", "dcgan", "cdcgan", "rpgan"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_engine(name: str, options: EngineOptions, largest: int = 16) -> Engine:
    bundle = read_bundle(BUNDLED_DIR / name / "1")
    return Engine(bundle.model, bundle.manifest, options, largest)


def make_buffered(name: str, largest: int = 16, device: HostDevice | None = None) -> CudaEngine:
    """The CUDA engine, on the CPU."""
    bundle = read_bundle(BUNDLED_DIR / name / "1")
    return CudaEngine(bundle.model, bundle.manifest, POWERS, largest, device or HostDevice())


ENGINES = [lambda name, largest=16: make_engine(name, POWERS, largest), make_buffered]
either = pytest.mark.parametrize("make", ENGINES, ids=["cpu", "cuda"])


def rows(engine: Engine, seed: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """A stream's first rows, with labels for a conditional model."""
    return draw_span(Span(seed, 0, count), engine.manifest.latent_size, engine.manifest.labels)


@pytest.mark.parametrize(
    ("largest", "count", "powers", "exact"), [(16, 1, 1, 1), (16, 3, 4, 3), (16, 9, 16, 9), (12, 9, 12, 9), (12, 12, 12, 12)]
)
def test_a_batch_is_padded_to_a_power_of_two_or_the_largest(largest: int, count: int, powers: int, exact: int) -> None:
    assert make_engine("mlp", POWERS, largest).bucket(count) == powers
    assert make_engine("mlp", EngineOptions(), largest).bucket(count) == exact


@either
@pytest.mark.parametrize(("largest", "buckets"), [(1, [1]), (16, [16, 8, 4, 2, 1]), (12, [12, 8, 4, 2, 1])])
def test_every_bucket_is_warmed_the_largest_first(
    make: Callable[..., Engine], largest: int, buckets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make("mlp", largest)
    seen: list[int] = []
    honest = type(engine).run

    def run(self: Any, feeds: Any, outputs: Any) -> Any:
        seen.append(self.bucket(len(feeds["latents"])))
        return honest(self, feeds, outputs)

    monkeypatch.setattr(type(engine), "run", run)
    engine.warm()
    assert list(dict.fromkeys(seen)) == buckets
    assert {engine.bucket(count) for count in range(1, largest + 1)} <= set(seen)


@either
def test_padded_rows_never_leak_and_the_batch_is_what_an_unpadded_one_is(make: Callable[..., Engine], name: str) -> None:
    padded, plain = make(name), make_engine(name, EngineOptions())
    padded.compute(*rows(padded, 99, 16))  # what an earlier batch left behind
    for count in range(1, 17):
        given = rows(padded, count, count)
        got, expected = padded.compute(*given, PIXELS_AND_IMAGES), plain.compute(*given, PIXELS_AND_IMAGES)
        assert got["pixels"].shape == (count, 28, 28)
        assert got["images"].shape == (count, 1, 28, 28)
        assert np.abs(got["images"] - expected["images"]).max() <= 1e-5
    buffered = make_buffered(name)
    buffered.compute(*rows(buffered, 99, 16))
    buffered.compute(*rows(buffered, 1, 3))
    assert not buffered._buffers.host["latents"][3:4].any(), "the padding is blank, not somebody's latents"


@either
@pytest.mark.parametrize("wrong", [16, 4, 1])
def test_the_golden_check_finds_one_bucket_that_is_off(
    make: Callable[..., Engine], name: str, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has kernels of its own: ONNX Runtime may have taken TF32 for one alone."""
    engine = make(name)
    engine.check_golden()
    honest = type(engine).run

    def run(self: Engine, feeds: Any, outputs: Any = ("pixels",)) -> Any:
        made = honest(self, feeds, outputs)
        if self.bucket(len(feeds["latents"])) == wrong:
            made["pixels"] ^= np.uint8(1) * (np.arange(784).reshape(28, 28) % 100 == 0)  # one of a hundred, by a level
        return made

    monkeypatch.setattr(type(engine), "run", run)
    with pytest.raises(GoldenError, match=rf"batches of {wrong}: golden sample \d+ differs by up to 1 levels"):
        engine.check_golden()


@either
def test_a_digits_bits_do_not_depend_on_its_batch(
    make: Callable[..., Engine], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(name)
    sizes: list[int] = []
    honest = type(engine).run
    monkeypatch.setattr(
        type(engine), "run", lambda self, feeds, outputs: (sizes.append(len(feeds["latents"])), honest(self, feeds, outputs))[1]
    )
    assert engine.batch_difference() is None
    assert {engine.bucket(size) for size in sizes} == {1, 2, 4, 8, 16}, "every bucket"
    assert sizes[0] == 16
    assert 7 in sizes
    sizes.clear()
    assert make(name, 1).batch_difference() is None, "there is nothing to compare"


@either
def test_only_the_outputs_asked_for_come_back_and_no_input_does(make: Callable[..., Engine]) -> None:
    engine = make("cdcgan")
    feeds = engine.allocate(3)
    assert {name: (array.shape, array.dtype.name) for name, array in feeds.items()} == {
        "latents": ((3, 100), "float32"), "labels": ((3,), "int64"),
    }  # fmt: skip
    feeds["latents"][:], feeds["labels"][:] = rows(engine, 1, 3)
    assert list(engine.run(feeds)) == ["pixels"]
    assert list(engine.run(feeds, ("images",))) == ["images"]


def test_one_session_serves_many_threads_at_once(name: str) -> None:
    engine = make_engine(name, EngineOptions(), 64)
    given = [rows(engine, seed, 24) for seed in range(8)]
    expected = [engine.compute(*each)["pixels"] for each in given]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(10):
            if np.abs(engine.compute(*given[number])["pixels"].astype(int) - expected[number]).max() > 1:
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_memory_that_cannot_be_had_is_one_line_with_the_way_out() -> None:
    class Full(HostDevice):
        def lock_pages(self, array: NDArray[Any]) -> None:
            raise EngineError("page-locking 3 MB failed: out of memory\nand a trace")

    full = Full()
    with pytest.raises(ProviderError, match=r"^model mlp/1: no memory on cpu for batches of 16 \(page-locking 3 MB .*--max-"):
        make_buffered("mlp", device=full)
    assert not full.streams


def test_page_locks_go_with_their_engine() -> None:
    device = HostDevice()
    engine = make_buffered("cdcgan", device=device)
    assert len(device.locked) == 4
    del engine
    assert device.locked == []


@either
def test_what_a_run_returned_is_never_written_again(make: Callable[..., Engine], name: str) -> None:
    engine = make(name)
    first = engine.compute(*rows(engine, 1, 5), PIXELS_AND_IMAGES)
    kept = {output: array.copy() for output, array in first.items()}
    engine.compute(*rows(engine, 2, 16), PIXELS_AND_IMAGES)
    for output, array in first.items():
        assert np.array_equal(array, kept[output])


def test_large_answers_are_lent_and_their_memory_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy on the host; a slot that somebody reads is never written, whatever runs meanwhile, and there are few."""
    monkeypatch.setattr(device_buffers, "LENT_BYTES", 2 * 784)
    device = HostDevice()
    engine = make_buffered("mlp", 4, device)
    inputs, slots = 1, device_buffers.SLOTS
    plain = make_engine("mlp", POWERS, 4)
    held, places = [], set()
    for index in range(7):
        pixels = engine.run({"latents": draw(3, 4 * index, 4, 64)})["pixels"]
        places.add(pixels.ctypes.data)
        held.append(pixels[1:])  # a view keeps its slot as well
    assert len(device.locked) == inputs + slots + 1, "and one of the images"
    assert len(places & set(device.locked)) == slots - 1, "the last slot is never lent: the others were copied out of it"
    for index, pixels in enumerate(held):
        assert np.array_equal(pixels, plain.compute(draw(3, 4 * index, 4, 64))["pixels"][1:])
    held.clear()
    del pixels
    again = [engine.run({"latents": draw(3, 0, 4, 64)})["pixels"] for _ in range(2)]
    assert {each.ctypes.data for each in again} <= set(device.locked), "what came back is lent again"
    assert len(device.locked) == inputs + slots + 1
    small = engine.run({"latents": draw(3, 0, 1, 64)})["pixels"]
    assert small.ctypes.data not in device.locked, "one digit is copied"
    engine.close()
    assert not device.locked
    assert np.array_equal(again[0], plain.compute(draw(3, 0, 4, 64))["pixels"]), "lent memory outlives its engine"


def test_buffers_stay_where_they_are(name: str) -> None:
    engine = make_buffered(name)
    engine.warm()
    addresses = {output: engine._buffers.address(output) for output in engine._buffers.specs}
    bindings = dict(engine._bindings)
    for count in (1, 7, 16, 3):
        engine.compute(*rows(engine, 1, count))
    assert addresses == {output: engine._buffers.address(output) for output in addresses}
    assert engine._bindings == bindings, "each bucket is bound once"


def test_inputs_filled_in_place_are_run_as_they_are(name: str) -> None:
    engine = make_buffered(name)
    given = rows(engine, 5, 6)
    feeds = engine.allocate(6)
    feeds["latents"][:] = given[0]
    if given[1] is not None:
        feeds["labels"][:] = given[1]
    assert np.array_equal(engine.run(feeds)["pixels"], engine.compute(*given)["pixels"])


@either
def test_more_rows_than_the_largest_batch_go_through_in_pieces(make: Callable[..., Engine], name: str) -> None:
    engine = make(name, 8)
    given = rows(engine, 3, 37)
    in_pieces = engine.compute(*given, PIXELS_AND_IMAGES)
    at_once = make(name, 64).compute(*given, PIXELS_AND_IMAGES)
    assert np.abs(in_pieces["images"] - at_once["images"]).max() <= 1e-5


@either
def test_what_a_run_is_timed_with_is_drawn(make: Callable[..., Engine], name: str) -> None:
    """Issue: the headline rates were of latents that were all zero."""
    feeds = make(name).sample(5)
    assert all(row.std() > 0.5 for row in feeds["latents"])
    assert ("labels" in feeds) == (name in ("cdcgan", "rpgan"))


def test_labels_choose_the_digit() -> None:
    engine = make_engine("cdcgan", EngineOptions())
    latents = np.repeat(rows(engine, 4, 1)[0], 10, axis=0)
    ten = engine.compute(latents, np.arange(10))["pixels"]
    assert len({digit.tobytes() for digit in ten}) == 10, "one latent vector, ten digits"
    for label in (3, 8):
        [alone] = engine.compute(latents[:1], np.array([label]))["pixels"]
        assert np.abs(alone.astype(np.int16) - ten[label]).max() <= 1


@pytest.mark.parametrize(("model", "labels"), [("mlp", np.zeros(1, np.int64)), ("cdcgan", None)])
def test_labels_go_to_conditional_models_and_to_no_other(model: str, labels: NDArray[np.int64] | None) -> None:
    engine = make_engine(model, EngineOptions())
    assert ("labels" in engine.allocate(3)) == (model == "cdcgan")
    with pytest.raises(ValueError, match=f"model {model} takes (0|10) labels"):
        engine.compute(draw(1, 0, 1, engine.manifest.latent_size), labels)


def captured(monkeypatch: pytest.MonkeyPatch, run: Callable[[Callable[..., None], Binding, int], None]) -> CudaEngine:
    """An engine that captures on the CPU, where ``run`` stands for how a capture and its replays behave."""
    plain = Binding.run

    def behave(self: Binding, graph_id: int = NO_GRAPH, *, wait: bool = True) -> None:
        if graph_id == NO_GRAPH:
            plain(self)
        else:
            run(plain, self, graph_id)

    monkeypatch.setattr(Binding, "run", behave)
    engine = make_buffered("mlp", 4)
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
    assert used == [2, 4, 8, 8], "a bucket's graph of the pixels alone is its own"
    used.clear()
    engine.compute(draw(1, 0, 4, 64), outputs=PIXELS_AND_IMAGES)
    assert used == [9], "and so is the one with the images"


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
    assert engine.compute(draw(7, 0, 3, 64))["pixels"].any()


def test_a_capture_that_fails_leaves_the_bucket_running_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(plain: Callable[..., None], binding: Binding, graph_id: int) -> None:
        if graph_id == 2 * 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand a trace")
        plain(binding)

    engine = captured(monkeypatch, run)
    assert engine.captures == {4: True, 2: False, 1: True}
    assert "batch of 2: runs without a CUDA graph (operation not permitted when stream is capturing)" in caplog.text
    expected = make_engine("mlp", POWERS, 4).compute(draw(7, 0, 2, 64))["pixels"]
    assert np.array_equal(engine.compute(draw(7, 0, 2, 64))["pixels"], expected)


def test_runs_are_not_waited_for_once_they_have_been_seen_to_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes into the stream between its copies; what is waited for is the stream, once."""
    plain, waited = Binding.run, []

    def run(self: Binding, graph_id: int = NO_GRAPH, *, wait: bool = True) -> None:
        waited.append(wait)
        plain(self, graph_id, wait=wait)

    monkeypatch.setattr(Binding, "run", run)
    engine = make_buffered("mlp", 4)
    engine.warm()
    assert waited[0] is True, "at first it is"
    waited.clear()
    expected = make_engine("mlp", POWERS, 4).compute(draw(7, 0, 3, 64))["pixels"]
    assert np.array_equal(engine.compute(draw(7, 0, 3, 64))["pixels"], expected)
    assert waited[:1] == [False]


def test_a_run_whose_answer_comes_too_late_is_found_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the stream's order is not kept, an answer is the one before."""
    plain, late = Binding.run, []

    def run(self: Binding, graph_id: int = NO_GRAPH, *, wait: bool = True) -> None:
        if wait:
            plain(self, graph_id)
        else:
            late.append(self)

    monkeypatch.setattr(Binding, "run", run)
    engine = make_buffered("mlp", 4)
    engine.warm()
    assert late
    assert "mlp/1, batch of 4: every run is waited for (" in caplog.text
    late.clear()
    expected = make_engine("mlp", POWERS, 4).compute(draw(7, 0, 3, 64))["pixels"]
    assert np.array_equal(engine.compute(draw(7, 0, 3, 64))["pixels"], expected)
    assert not late


@pytest.mark.parametrize(
    ("count", "bucket"), [(1, 1), (2, 8), (8, 8), (9, 64), (65, 512), (513, 1024), (1025, 2048), (4096, 4096)]
)
def test_cuda_has_few_buckets(count: int, bucket: int) -> None:
    assert EngineOptions(provider="cuda").bucket(count, 4096) == bucket
    assert EngineOptions(provider="cuda").bucket(min(count, 100), 100) == min(bucket, 100)


def test_a_bundle_may_name_its_own_buckets() -> None:
    """Issue: 65 rows were run as 512, which takes a model with convolutions four times as long."""
    bundle = read_bundle(BUNDLED_DIR / "mlp" / "1")
    manifest = msgspec.structs.replace(bundle.manifest, cuda_buckets=(1, 3, 12))
    engine = CudaEngine(bundle.model, manifest, POWERS, 16, HostDevice())
    engine.options = EngineOptions(provider="cuda")
    assert [engine.bucket(count) for count in (1, 2, 3, 4, 12, 13)] == [1, 3, 3, 12, 12, 16]
    assert engine.buckets() == [16, 12, 3, 1]


@pytest.mark.parametrize(("name", "bucket"), [("mlp", 512), ("dcgan", 128), ("cdcgan", 128), ("rpgan", 128)])
def test_bundled_models_with_convolutions_have_buckets_between_64_and_512(name: str, bucket: int) -> None:
    manifest = read_bundle(BUNDLED_DIR / name / "1").manifest
    options = EngineOptions(provider="cuda")
    assert options.bucket(65, 1024, manifest.cuda_buckets) == bucket
    assert options.bucket(513, 1024, manifest.cuda_buckets) == 1024


class FailingDevice(HostDevice):
    """Whose copies fail from some moment on, as CUDA's do for good after one error."""

    failing = False

    def copy_to_device(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        if self.failing:
            raise EngineError("cudaMemcpyAsync failed: cudaErrorIllegalAddress")
        super().copy_to_device(to, source, size_bytes, stream)

    def unlock_pages(self, array: NDArray[Any]) -> None:
        if self.failing:
            raise EngineError("cudaHostUnregister failed: cudaErrorIllegalAddress")
        super().unlock_pages(array)

    def close_stream(self, stream: int) -> None:
        if self.failing:
            raise EngineError("cudaStreamDestroy failed: cudaErrorIllegalAddress")
        super().close_stream(stream)


def test_a_device_that_fails_is_lost_and_its_engine_is_closed_without_it() -> None:
    device = FailingDevice()
    engine = make_buffered("mlp", 4, device)
    engine.compute(draw(1, 0, 2, 64))
    device.failing = True
    with pytest.raises(DeviceLostError, match="mlp/1 on CUDA: cudaMemcpyAsync failed: cudaErrorIllegalAddress"):
        engine.compute(draw(1, 0, 2, 64))
    engine.close()


def test_a_device_lost_while_an_engine_is_made_is_told_by_its_cause() -> None:
    class Lost(FailingDevice):
        def lock_pages(self, array: NDArray[Any]) -> None:
            self.failing = True
            raise EngineError("cudaHostRegister failed: cudaErrorIllegalAddress")

    with pytest.raises(ProviderError, match=r"no memory on cpu for batches of 4 \(cudaHostRegister failed"):
        make_buffered("mlp", 4, Lost())


ARENA_FULL = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running ConvTranspose node. Name:'c' "
    "Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRaw() "
    "Failed to allocate memory for requested buffer of size 8388608000\n"
)
CUDNN_FULL = "CUDNN failure 4004: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0"  # cudnn_graph.h of version 9


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=box", "CUDA failure 2: out of memory"),
        (ARENA_FULL, "Failed to allocate memory for requested buffer of size 8388608000"),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0"),
        (CUDNN_FULL, CUDNN_FULL),
    ],
)
def test_memory_that_lacks_for_a_run_is_no_lost_device(raised: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: it ended the process, or was no error that anybody knew."""
    engine = make_buffered("mlp", 4)
    honest = Binding.run

    def fail(self: Binding, graph_id: int = NO_GRAPH, *, wait: bool = True) -> None:
        raise RuntimeError(raised)

    monkeypatch.setattr(Binding, "run", fail)
    with pytest.raises(OutOfMemoryError) as caught:
        engine.compute(draw(1, 0, 2, 64))
    assert str(caught.value) == f"mlp/1: {said}"
    monkeypatch.setattr(Binding, "run", honest)
    assert engine.compute(draw(1, 0, 2, 64))["pixels"].any(), "the next one may have it"


@pytest.mark.parametrize("error", [OutOfMemoryError("cudaHostRegister failed: cudaErrorMemoryAllocation"), MemoryError()])
def test_answers_are_copied_where_no_more_slots_can_be_locked(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: slots were page-locked while it served, and a failure of the host's memory ended the process."""
    monkeypatch.setattr(device_buffers, "LENT_BYTES", 784)

    class Full(HostDevice):
        full = False

        def lock_pages(self, array: NDArray[Any]) -> None:
            if self.full:
                raise error
            super().lock_pages(array)

    device = Full()
    engine, plain = make_buffered("mlp", 4, device), make_engine("mlp", POWERS, 4)
    device.full = True
    held = [engine.run({"latents": draw(3, 4 * index, 4, 64)})["pixels"] for index in range(5)]
    for index, pixels in enumerate(held):
        assert np.array_equal(pixels, plain.compute(draw(3, 4 * index, 4, 64))["pixels"])
    assert not {each.ctypes.data for each in held} & set(device.locked)


class Lost(HostDevice):
    """Whose stream fails for good once a kernel or a capture has."""

    lost = False

    def wait(self, stream: int) -> None:
        if self.lost:
            raise EngineError("cudaStreamSynchronize failed: cudaErrorIllegalAddress")
        super().wait(stream)


def test_a_device_lost_at_a_capture_is_not_taken_for_a_capture_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: the engine counted as ready."""
    device = Lost()
    engine = make_buffered("mlp", 4, device)

    def run(self: Binding, graph_id: int = NO_GRAPH, *, wait: bool = True) -> None:
        device.lost = True
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0")

    honest = Binding.run
    monkeypatch.setattr(
        Binding, "run", lambda *given, **named: (honest if given[1:] in ((), (NO_GRAPH,)) else run)(*given, **named)
    )
    with pytest.raises(DeviceLostError, match=r"mlp/1 on CUDA: cudaStreamSynchronize .*after CUDA failure 700"):
        engine._capture(4)
    assert engine.captures == {4: False}


def test_a_device_lost_while_a_capture_is_tried_is_not_taken_for_a_wrong_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_buffered("mlp", 4)
    samples = engine._samples(4)

    def run(self: CudaEngine, feeds: Any, outputs: Any = ()) -> Any:
        raise DeviceLostError("gone")

    monkeypatch.setattr(engine, "_samples", lambda bucket: samples)
    monkeypatch.setattr(CudaEngine, "run", run)
    with pytest.raises(DeviceLostError, match="gone"):
        engine._capture(4)


def test_a_device_lost_while_latents_are_tried_is_not_taken_for_one_that_cannot_draw() -> None:
    class Overwriting(Lost):
        def compile(self, source: str, function: str, definitions: Any) -> Any:
            self.lost = True
            raise EngineError("cuModuleLoadData failed: CUDA_ERROR_ILLEGAL_ADDRESS")

    engine = make_buffered("mlp", 4, Overwriting())
    with pytest.raises(DeviceLostError, match="after cuModuleLoadData failed"):
        engine._begin_drawing()


def test_a_cuda_failure_of_onnx_runtime_is_the_devices_and_another_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_buffered("mlp", 4)
    said = ["CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=box"]

    def fail(self: Binding, graph_id: int = NO_GRAPH, *, wait: bool = True) -> None:
        raise RuntimeError(said[0])

    monkeypatch.setattr(Binding, "run", fail)
    with pytest.raises(DeviceLostError, match=r"mlp/1: CUDA failure 700\b"):
        engine.compute(draw(1, 0, 2, 64))
    said[0] = "Invalid rank for input"
    with pytest.raises(RuntimeError, match="Invalid rank"):
        engine.compute(draw(1, 0, 2, 64))


@pytest.mark.parametrize(("last_line", "said"), [("del memory", "released"), ("", "")])
def test_page_locks_are_not_undone_at_the_interpreters_end_but_before(last_line: str, said: str) -> None:
    """The modules that this takes are gone by then."""
    script = f"""
import os
import numpy as np
from serve.engine.device_buffers import PairedMemory
from tests.host_device import HostDevice

class Heard(HostDevice):
    def unlock_pages(self, array, write=os.write):
        write(1, b"released")

memory = PairedMemory(Heard(), 0)
memory.add("latents", np.zeros(4, np.float32))
{last_line}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_what_an_engine_holds_is_released_once() -> None:
    device = HostDevice()
    engine = make_buffered("mlp", 4, device)
    engine.compute(draw(1, 0, 2, 64))
    assert device.locked
    engine.close()
    assert not device.locked
    assert not device.streams, "the stream too"
    del engine  # unlocks nothing again
