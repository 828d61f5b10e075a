"""A served model that goes wrong after it was loaded: it stops answering, says so, and comes back when it is right."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from serve.batching.ticket import Priority, Ticket
from serve.engine.cuda_engine import CudaEngine
from serve.engine.provider import EngineOptions
from serve.engine.session import PIXELS, Engine
from serve.errors import DeviceLostError, EngineError, OutOfMemoryError, ProviderError, UnavailableError
from serve.latents import Span, draw
from serve.manifest import BUNDLED_DIR, Manifest
from serve.models.model import Model, open_model, ordered
from serve.models.repository import read_bundle
from serve.observability.metrics import Metrics, Served
from serve.settings import Settings
from tests.host_device import HostDevice
from tests.waiting import wait_until

MLP = BUNDLED_DIR / "mlp" / "1"
ALL = {"model": "mlp", "version": "1"}


def with_model(test: Callable[[Model, CollectorRegistry], Any], **settings: Any) -> None:
    """Run a coroutine function with an open mlp on an event loop."""

    async def run() -> None:
        registry = CollectorRegistry()
        chosen = Settings(instances=1, max_batch_size=16, **settings)
        metrics = Metrics(registry)
        model = await asyncio.to_thread(open_model, read_bundle(MLP), "cpu", chosen, metrics)
        metrics.read_served = lambda: [Served("mlp", "1", "cpu", "digest", model.gauges() | {"model_traffic_share": 1.0})]
        try:
            await asyncio.wait_for(test(model, registry), 60)
        finally:
            assert await asyncio.to_thread(model.batcher.close, 30) == 0

    asyncio.run(run())


def checks(registry: CollectorRegistry, result: str) -> float:
    return registry.get_sample_value("digits_self_checks_total", ALL | {"result": result}) or 0.0


async def digits(model: Model, count: int) -> NDArray[np.uint8]:
    ticket = await model.run(Ticket(Span(1, 0, count), PIXELS, Priority.INTERACTIVE, None))
    return np.concatenate(ordered(ticket, "pixels"))


def test_a_breach_stops_the_model_is_counted_names_the_row_and_ends_when_it_passes_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = Engine.run
    wrong = [False]

    def run(self: Engine, feeds: Any, outputs: Any) -> Any:
        rows = honest(self, feeds, outputs)
        if wrong[0]:
            rows["pixels"] = rows["pixels"].copy()
            rows["pixels"][2 % len(rows["pixels"])] ^= 0x40
        return rows

    monkeypatch.setattr(Engine, "run", run)

    async def test(model: Model, registry: CollectorRegistry) -> None:
        await model.self_check()
        assert model.ready
        wrong[0] = True
        await model.self_check()
        assert not model.ready
        assert registry.get_sample_value("digits_model_ready", ALL) == 0
        assert "golden sample 2 differs by up to 64 levels" in caplog.text
        with pytest.raises(UnavailableError, match="mlp/1 fails its golden check"):
            await digits(model, 1)
        wrong[0] = False
        await model.self_check()
        assert model.ready
        assert len(await digits(model, 3)) == 3
        assert (checks(registry, "passed"), checks(registry, "breach")) == (2, 1)

    with_model(test)


def test_a_self_check_that_finds_the_queue_full_is_skipped_and_no_breach() -> None:
    async def test(model: Model, registry: CollectorRegistry) -> None:
        caller = asyncio.ensure_future(digits(model, 4096))
        await asyncio.sleep(0)  # lets the caller submit
        await model.self_check()
        assert len(await caller) == 4096
        assert model.ready
        assert checks(registry, "skipped") + checks(registry, "passed") == 1

    with_model(test, max_queue_images=4096)


def test_a_model_is_released_once_what_it_runs_has_come_back() -> None:
    async def test(model: Model, registry: CollectorRegistry) -> None:
        assert model.in_use.enter()
        running = asyncio.ensure_future(digits(model, 4096))
        running.add_done_callback(lambda _: model.in_use.leave())
        await asyncio.sleep(0)  # lets it submit
        assert await model.release(30) == 0
        assert len(await running) == 4096
        await model.self_check()  # of a model that is released: nothing
        assert [checks(registry, result) for result in ("passed", "failed", "skipped", "breach")] == [0, 0, 0, 0]

    with_model(test)


def test_a_run_that_raises_reaches_its_callers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Engine.run
    fail = [False]

    def run(self: Engine, feeds: Any, outputs: Any) -> Any:
        if fail[0]:
            raise RuntimeError("CUDA failure 700")
        return honest(self, feeds, outputs)

    monkeypatch.setattr(Engine, "run", run)

    async def test(model: Model, registry: CollectorRegistry) -> None:
        fail[0] = True
        with pytest.raises(EngineError):
            await digits(model, 3)
        fail[0] = False
        assert len(await digits(model, 3)) == 3
        assert model.ready
        assert registry.get_sample_value("digits_run_failures_total", ALL | {"reason": "raised"}) == 1

    with_model(test)


@pytest.mark.parametrize("name", ["mlp", "dcgan", "cdcgan", "rpgan"])
def test_one_bucket_gives_identical_pixels_whoever_the_batch_mates_are(name: str) -> None:
    bundle = read_bundle(BUNDLED_DIR / name / "1")
    engine = Engine(bundle.model, bundle.manifest, EngineOptions(), 64)
    size, labels = bundle.manifest.latent_size, np.arange(16) % 10 if bundle.manifest.labels else None
    mine = draw(5, 77, 4, size)
    first = engine.compute(np.concatenate([mine, draw(1, 0, 12, size)]), labels)["pixels"][:4]
    shifted = None if labels is None else np.roll(labels, 12)
    second = engine.compute(np.concatenate([draw(2, 0, 12, size), mine]), shifted)["pixels"][12:]
    assert np.array_equal(first, second)


@pytest.mark.parametrize("cores", [1, 2, 32])
def test_instances_follow_the_usable_cores_and_the_batch_size_the_bundle(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: the batch size was tuned at the start by whatever else the machine did, so that replicas differed."""
    monkeypatch.setattr("serve.models.model.usable_cores", lambda: cores)

    async def run() -> None:
        metrics = Metrics(CollectorRegistry())
        for name, size in (("mlp", 64), ("dcgan", 8), ("cdcgan", 8), ("rpgan", 8)):
            bundle = read_bundle(BUNDLED_DIR / name / "1")
            model = await asyncio.to_thread(open_model, bundle, "cpu", Settings(), metrics)
            limits = model.batcher.limits
            assert (limits.instances, limits.max_batch_size) == (cores, size)
            assert await asyncio.to_thread(model.batcher.close, 30) == 0

    asyncio.run(run())


def test_all_instances_of_a_cpu_model_share_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: on a 32-core node sessions of their own took 1.5 GB."""
    made: list[Engine] = []
    honest = Engine.__init__

    def init(self: Engine, *arguments: Any) -> None:
        made.append(self)
        honest(self, *arguments)

    monkeypatch.setattr(Engine, "__init__", init)

    async def run() -> None:
        metrics, chosen = Metrics(CollectorRegistry()), Settings(instances=16)
        model = await asyncio.to_thread(open_model, read_bundle(MLP), "cpu", chosen, metrics)
        assert (model.batcher.live_instances, len(made)) == (16, 1)
        assert await asyncio.to_thread(model.batcher.close, 30) == 0

    asyncio.run(run())


class Spoilt(CudaEngine):
    """An engine on host memory that fails when it is warmed."""

    lost: ClassVar[Exception]

    def warm(self) -> dict[int, bool]:
        raise self.lost


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OutOfMemoryError("mlp/1: Failed to allocate"),
            r"Failed to allocate; name a smaller --max-batch-size or a larger --gpu-mem",
        ),
        (DeviceLostError("mlp/1: CUDA failure 700"), "CUDA failure 700; use --provider cpu, or mend CUDA"),
    ],
)
def test_an_engine_that_fails_before_it_serves_is_closed_and_the_way_out_is_told(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue: it lived on in the traceback until a full collection; with retries under memory shortage that fed itself."""
    devices: list[HostDevice] = []

    def make_engine(model: bytes, manifest: Manifest, options: EngineOptions, largest: int) -> Engine:
        Spoilt.lost = error
        devices.append(device := HostDevice())
        return Spoilt(model, manifest, EngineOptions(), largest, device)

    monkeypatch.setattr("serve.models.model.make_engine", make_engine)
    with pytest.raises(ProviderError, match=said) as caught:
        open_model(read_bundle(MLP), "cuda", Settings(instances=2), Metrics(CollectorRegistry()))
    assert caught.tb is not None, "what holds the engine's frames"
    wait_until(lambda: len(devices) == 2 and not any(device.streams or device.locked for device in devices))


@pytest.mark.parametrize(("draws", "value"), [(True, 1.0), (False, 0.0)])
def test_the_metrics_tell_who_draws_the_latents(draws: bool, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: where the device was refused its kernel, batches took 1.4 to 2.9 times as long, and one line of the log told."""

    def make_engine(model: bytes, manifest: Manifest, options: EngineOptions, largest: int) -> Engine:
        engine = CudaEngine(model, manifest, EngineOptions(), largest, HostDevice())
        monkeypatch.setattr(CudaEngine, "warm", lambda engine: {})
        monkeypatch.setattr(CudaEngine, "draws_latents", draws)
        return engine

    monkeypatch.setattr("serve.models.model.make_engine", make_engine)
    model = open_model(read_bundle(MLP), "cuda", Settings(instances=2), Metrics(CollectorRegistry()))
    assert model.gauges()["device_latents"] == value
    assert model.batcher.close(30) == 0


@pytest.mark.parametrize(
    ("odd_size", "named"), [(1, "of 1 and of 16"), (7, "of 7 and of 16"), (16, "of 7 and of 16"), (None, "")]
)
def test_a_model_whose_bits_depend_on_the_batch_serves_and_says_so(
    odd_size: int | None, named: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stand-in computes batches of one size with another last bit."""
    honest = Engine.run

    def run(self: Engine, feeds: Any, outputs: Any = PIXELS) -> Any:
        rows = honest(self, feeds, outputs)
        if len(feeds["latents"]) == odd_size and "images" in rows:
            rows["images"] = np.nextafter(rows["images"], np.float32(2))
        return rows

    monkeypatch.setattr(Engine, "run", run)

    async def test(model: Model, registry: CollectorRegistry) -> None:
        assert model.ready
        assert len(await digits(model, 3)) == 3
        assert model.batch_invariant == (odd_size is None)
        assert registry.get_sample_value("digits_model_batch_invariant", ALL) == (odd_size is None)
        assert ("mlp/1 is not batch-invariant" in caplog.text, named in caplog.text) == (odd_size is not None, True)

    with_model(test)
