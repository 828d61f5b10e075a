"""Versions come and go: what is served after each change, what stays when a change fails, what outlives the process."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from serve.batching.ticket import Priority, Ticket
from serve.engine.session import PIXELS
from serve.errors import BundleError, ProviderError, SettingsError, UnknownModelError
from serve.latents import Span
from serve.manifest import MANIFEST_FILE, ONNX_FILE
from serve.models import loader
from serve.models.catalog import Catalog
from serve.models.model import Model, ordered
from serve.models.reconcile import Reconciler
from serve.models.repository import Repository
from serve.models.serving_file import Route, parse_serving_state, watched_serving_file
from serve.observability.metrics import Metrics
from serve.settings import Settings
from tests.bundle_copies import add_version, break_golden

TIMEOUT_S = 60


class Replica:
    """One process's reconciler over a folder, and what a test asks of it."""

    def __init__(self, models_dir: Path, **settings: Any) -> None:
        settings = {"default_model": "mlp", **settings}
        chosen = Settings(models_dir=models_dir, instances=1, max_batch_size=8, provider="cpu", **settings)
        self.registry = CollectorRegistry()
        self.catalog = Catalog(chosen.default_model)
        self.file = chosen.serving_file or models_dir / "serving.json"
        repository = Repository(models_dir)
        watched = watched_serving_file(self.file)
        self.reconciler = Reconciler(repository, watched, self.catalog, chosen, Metrics(self.registry))

    def served(self, name: str = "mlp") -> list[int]:
        return self.catalog.versions(name)

    def route(self, name: str = "mlp") -> Route:
        return self.catalog.route(name)

    async def want(self, name: str = "mlp", **state: Any) -> None:
        """Write into the file what is wanted of one model, and poll."""
        self.file.write_text(json.dumps({"models": {name: state}}))
        await self.reconciler.poll()

    def states(self, name: str = "mlp") -> dict[int, str]:
        return {status.version: status.state for status in self.reconciler.status() if status.model == name}

    async def released(self) -> None:
        """Wait until nothing drains."""
        while "DRAINING" in {status.state for status in self.reconciler.status()}:  # noqa: ASYNC110  # as an operator would
            await asyncio.sleep(0.01)

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def with_replica(test: Callable[[Replica], Awaitable[None]], models_dir: Path, **settings: Any) -> None:
    """Start a lifecycle, run the test on its event loop, and release everything."""

    async def run() -> None:
        replica = Replica(models_dir, **settings)
        await replica.reconciler.start()
        try:
            await asyncio.wait_for(test(replica), TIMEOUT_S)
        finally:
            assert await replica.reconciler.close(30) == 0
        assert replica.catalog.models() == []

    asyncio.run(run())


@pytest.fixture
def models(bundles: Path) -> Path:
    """The mlp alone: it loads in a twentieth of a second."""
    for name in ("dcgan", "cdcgan", "rpgan"):
        shutil.rmtree(bundles / name)
    return bundles


async def digits(model: Model, seed: int = 1) -> Any:
    return np.concatenate(ordered(await model.run(Ticket(Span(seed, 0, 2), PIXELS, Priority.INTERACTIVE, None)), "pixels"))


def start_fails(models_dir: Path, error: type[Exception], match: str, **settings: Any) -> None:
    async def run() -> None:
        with pytest.raises(error, match=match):
            await Replica(models_dir, **settings).reconciler.start()

    asyncio.run(run())


def test_at_the_start_the_policy_picks_and_the_highest_is_the_default(models: Path) -> None:
    for version in (2, 3):
        add_version(models, "mlp", version)

    async def test(it: Replica) -> None:
        assert it.served() == [2, 3]
        assert it.route() == Route(3)
        assert it.catalog.find("", 0).manifest.version == 3
        assert it.catalog.find("mlp", 2).manifest.version == 2
        with pytest.raises(UnknownModelError, match="model 'mlp' has no version 1; there are 2, 3"):
            it.catalog.find("mlp", 1)
        assert it.states() == {1: "UNLOADED", 2: "READY", 3: "READY"}

    with_replica(test, models, versions="latest:2")


def test_a_bad_bundle_an_empty_folder_or_a_missing_pin_stops_the_start(models: Path, tmp_path: Path) -> None:
    start_fails(models, BundleError, "mlp has no version 7; there are 1", versions="1+7")
    (tmp_path / "empty").mkdir()
    start_fails(tmp_path / "empty", BundleError, "holds no complete model; make export writes one")
    add_version(models, "mlp", 2)
    break_golden(models / "mlp" / "2")
    start_fails(models, BundleError, "model mlp/2 on cpu, batches of 8: golden sample")
    (models / "mlp").rename(models / "other")
    start_fails(models, SettingsError, "--default-model 'mlp' is not served; there are other")


def test_polling_takes_a_version_once_it_has_settled_and_releases_the_old_one(models: Path) -> None:
    async def test(it: Replica) -> None:
        old = it.catalog.find("mlp", 0)
        add_version(models, "mlp", 2)
        await it.reconciler.poll()
        assert it.served() == [1], "it has been seen once only"
        await it.reconciler.poll()
        assert it.served() == [2]
        assert it.route() == Route(2)
        await it.released()
        assert not any(thread.is_alive() for thread in old.batcher._threads)
        assert it.sample("digits_queue_images", model="mlp", version="1") is None
        assert it.sample("digits_model_traffic_share", model="mlp", version="2") == 1
        assert it.sample("digits_models_loaded") == 1
        shutil.rmtree(models / "mlp" / "2")
        await it.reconciler.poll()
        assert it.served() == [2], "one look at a network volume may fail"
        await it.reconciler.poll()
        assert it.served() == [1]

    with_replica(test, models)


def test_a_version_that_is_being_copied_is_never_picked_up_and_then_it_is(models: Path) -> None:
    """File by file, the manifest first, as cp -r may have it."""
    source = add_version(models, "mlp", 2).rename(models / ".source")

    async def test(it: Replica) -> None:
        target = models / "mlp" / "2"
        target.mkdir()
        content = (source / ONNX_FILE).read_bytes()
        shutil.copy(source / MANIFEST_FILE, target)
        await it.reconciler.poll()
        for size in (1, len(content) // 2, len(content) - 1):
            (target / ONNX_FILE).write_bytes(content[:size])
            await it.reconciler.poll()
            assert it.served() == [1]
        assert it.states() == {1: "READY", 2: "UNLOADED"}
        await it.reconciler.poll()  # the copying has stopped half-way, it seems
        assert it.states() == {1: "READY", 2: "FAILED"}
        shutil.copytree(source, target, dirs_exist_ok=True)
        await it.reconciler.poll()
        await it.reconciler.poll()
        assert it.served() == [2]

    with_replica(test, models)


@pytest.mark.parametrize("fault", ["golden", "digest", "bundle"])
def test_a_version_that_fails_leaves_the_old_one_serving_and_the_reason_everywhere(
    fault: str, models: Path, caplog: pytest.LogCaptureReplica
) -> None:
    reasons = {
        "golden": "golden sample",
        "digest": "is not the file that was exported",
        "bundle": "manifest.json is not valid JSON",
    }

    def spoil(folder: Path) -> None:
        if fault == "golden":
            break_golden(folder)
        elif fault == "digest":
            (folder / ONNX_FILE).write_bytes(b"x")
        else:
            (folder / MANIFEST_FILE).write_text("{")

    async def test(it: Replica) -> None:
        served = it.catalog.find("mlp", 0)
        spoil(add_version(models, "mlp", 2))
        for _ in range(5):
            await it.reconciler.poll()
        assert it.catalog.find("mlp", 0) is served
        assert len(await digits(served)) == 2
        [failed] = [status for status in it.reconciler.status() if status.version == 2]
        assert failed.state == "FAILED"
        assert reasons[fault] in failed.reason
        assert caplog.text.count("mlp/2 cannot be loaded") == 1, "a version that has not changed is not tried again"
        assert it.sample("digits_model_loads_total", model="mlp", result=fault) == 1
        assert it.sample("digits_model_failed", model="mlp", version="2") == 1
        shutil.rmtree(models / "mlp" / "2")
        add_version(models, "mlp", 2)
        await it.reconciler.poll()
        await it.reconciler.poll()
        assert it.served() == [2]
        assert it.sample("digits_model_failed", model="mlp", version="2") is None

    with_replica(test, models)


def test_a_restart_beside_a_bad_version_serves_the_next_lower(models: Path) -> None:
    add_version(models, "mlp", 2)
    break_golden(add_version(models, "mlp", 3))

    async def test(it: Replica) -> None:
        assert it.served() == [2]
        assert it.states() == {1: "UNLOADED", 2: "READY", 3: "FAILED"}

    with_replica(test, models, wait_for_models=True)


def test_polling_a_folder_that_is_gone_serves_on(models: Path, caplog: pytest.LogCaptureReplica) -> None:
    async def test(it: Replica) -> None:
        models.rename(models.with_name("gone"))  # noqa: ASYNC240  # nothing else runs on this loop
        await it.reconciler.poll()
        assert it.served() == [1]
        assert "serving what was loaded" in caplog.text

    with_replica(test, models)


def test_an_empty_folder_is_waited_upon(models: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()

    async def test(it: Replica) -> None:
        assert it.served() == []
        assert not it.catalog.ready("mlp")
        shutil.copytree(models / "mlp", empty / "mlp")
        await it.reconciler.poll()
        await it.reconciler.poll()
        assert it.catalog.ready("mlp")

    with_replica(test, empty, wait_for_models=True)


def test_a_bundle_changed_on_disk_after_loading_does_no_harm(models: Path) -> None:
    async def test(it: Replica) -> None:
        served = it.catalog.find("mlp", 0)
        before = await digits(served)
        (models / "mlp" / "1" / ONNX_FILE).write_bytes(b"junk")
        for _ in range(3):
            await it.reconciler.poll()
        assert it.catalog.find("mlp", 0) is served
        assert np.array_equal(await digits(served), before)
        assert it.states() == {1: "READY"}

    with_replica(test, models)


def test_the_file_loads_beside_moves_the_default_and_unloads(models: Path) -> None:
    for version in (2, 3):
        add_version(models, "mlp", version)

    async def test(it: Replica) -> None:
        assert it.served() == [1], "pinned by policy"
        await it.want(versions=[1, 2], route={"default": 1})
        assert (it.served(), it.route()) == ([1, 2], Route(1))
        await it.want(versions=[1, 2], route={"default": 2})
        assert it.catalog.find("mlp", 0).manifest.version == 2
        await it.want(versions=[2], route={"default": 2})
        assert it.served() == [2]
        await it.want(versions=[2], route={"default": 1})
        assert it.route() == Route(1)
        assert it.served() == [1, 2], "the route needs it"
        await it.want(versions=[2], route={"default": 9})
        assert (it.served(), it.route()) == ([1, 2], Route(1)), "there is no version 9"
        await it.want(versions=[])
        assert it.served() == []
        with pytest.raises(UnknownModelError, match="model 'mlp' is not served; there are none at the moment"):
            it.catalog.find("", 0)
        await it.want()
        assert it.served() == [1]

    with_replica(test, models, versions="1")


def test_a_pinned_default_outlives_newer_versions_until_it_is_given_back_to_the_policy(models: Path) -> None:
    async def test(it: Replica) -> None:
        await it.want(route={"default": 1})
        add_version(models, "mlp", 2)
        await it.reconciler.poll()
        await it.reconciler.poll()
        assert (it.served(), it.route()) == ([1, 2], Route(1))
        await it.want()
        assert (it.served(), it.route()) == ([2], Route(2))

    with_replica(test, models)


def test_a_canary_gets_its_share_of_the_seeds_and_always_the_same_ones(models: Path) -> None:
    add_version(models, "mlp", 2)

    async def test(it: Replica) -> None:
        await it.want(route={"default": 1, "canary": 2, "canary_share": 0.25})

        def version(seed: int) -> int:
            return it.catalog.find("mlp", 0, lambda: seed).manifest.version

        picked = [version(seed) for seed in range(4000)]
        assert 0.22 < picked.count(2) / 4000 < 0.28
        assert picked == [version(seed) for seed in range(4000)]
        assert it.sample("digits_model_traffic_share", model="mlp", version="1") == 0.75
        assert it.sample("digits_model_traffic_share", model="mlp", version="2") == 0.25
        await it.want(route={"default": 1, "canary": 2, "canary_share": 0.5})
        assert all(version(seed) == 2 for seed in range(4000) if picked[seed] == 2), "a growing canary keeps its seeds"

    with_replica(test, models, versions="latest:2")


def test_a_call_that_goes_on_for_long_keeps_its_model_until_it_ends(models: Path) -> None:
    async def test(it: Replica) -> None:
        old = it.catalog.find("mlp", 0)
        assert old.in_use.enter()
        add_version(models, "mlp", 2)
        await it.reconciler.poll()
        await it.reconciler.poll()
        assert it.served() == [2]
        assert it.states()[1] == "DRAINING"
        for seed in range(20):
            assert len(await digits(old, seed)) == 2
        assert not old.in_use.enter(), "a call that comes late finds another version"
        old.in_use.leave()
        await it.released()
        assert it.states()[1] == "UNLOADED"

    with_replica(test, models)


def test_one_look_that_misses_a_version_unloads_nothing(models: Path) -> None:
    """Issue: one failing look at a network volume unloaded a served model."""
    add_version(models, "mlp", 2)

    async def test(it: Replica) -> None:
        served = it.catalog.find("mlp", 0)
        (models / "mlp").rename(models / ".away")
        await it.reconciler.poll()
        (models / ".away").rename(models / "mlp")
        for _ in range(3):
            await it.reconciler.poll()
            assert it.catalog.find("mlp", 0) is served

    with_replica(test, models)


def test_changes_outlive_the_process_and_reach_every_replica(models: Path) -> None:
    """Issue: routes, canary and rollback lived in one process: one random pod changed, and forgot it at a restart."""
    for version in (2, 3):
        add_version(models, "mlp", version)

    async def test(it: Replica) -> None:
        other = Replica(models, versions="1")
        await other.reconciler.start()
        await it.want(route={"default": 1, "canary": 2, "canary_share": 0.25})
        await other.reconciler.poll()
        assert (other.served(), other.route()) == ([1, 2], Route(1, 2, 0.25))
        restarted = Replica(models, versions="1")
        await restarted.reconciler.start()
        assert (restarted.served(), restarted.route()) == ([1, 2], Route(1, 2, 0.25))
        await it.want(versions=[])
        for replica in (other, restarted):
            await replica.reconciler.poll()
            assert replica.served() == []
            assert await replica.reconciler.close(30) == 0

    with_replica(test, models, versions="1")


def test_a_change_of_the_file_is_reconciled_and_a_bad_file_changes_nothing(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for version in (2, 3):
        add_version(models, "mlp", version)

    def wanted(text: str, it: Replica) -> None:
        it.file.write_text(text)

    async def test(it: Replica) -> None:
        assert it.served() == [3]
        wanted(json.dumps({"models": {"mlp": {"versions": "latest:2", "route": {"default": 2}}}}), it)
        await it.reconciler.poll()
        assert (it.served(), it.route()) == ([2, 3], Route(2))
        spoilt_files = ("{", '{"models": {"mlp": {"versions": [0]}}}', '{"models": {"mlp": {"red": 1}}}', '{"schema_version": 9}')
        for spoilt in spoilt_files:
            wanted(spoilt, it)
            await it.reconciler.poll()
            assert (it.served(), it.route()) == ([2, 3], Route(2))
        assert caplog.text.count("what was read before stays in force") == 4
        assert it.sample("digits_serving_file_reads_total", result="failed") == 4
        wanted(json.dumps({"models": {"mlp": {"versions": [1]}}}), it)
        await it.reconciler.poll()
        assert (it.served(), it.route()) == ([1], Route(1))
        it.file.unlink()
        await it.reconciler.poll()
        assert it.served() == [1], "seen missing once only"
        await it.reconciler.poll()
        assert it.served() == [3]

    with_replica(test, models)


def test_a_version_that_is_wanted_and_fails_leaves_what_is_served(models: Path) -> None:
    break_golden(add_version(models, "mlp", 2))

    async def test(it: Replica) -> None:
        served = it.catalog.find("mlp", 0)
        it.file.write_text(json.dumps({"models": {"mlp": {"versions": [2], "route": {"default": 2}}}}))
        for _ in range(3):
            await it.reconciler.poll()
            assert it.catalog.find("mlp", 0) is served
        assert it.states()[2] == "FAILED"

    with_replica(test, models, versions="1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"models": {"MLP": {}}}', "here: 'MLP' is no model name"),
        ('{"models": {"mlp": {"versions": "newest"}}}', "here: model mlp: 'newest' is no version policy"),
        ('{"models": {"mlp": {"route": {"default": 1, "canary": 2}}}}', "here: model mlp: a canary needs a share"),
        ('{"models": {"mlp": {"route": {"default": 2, "canary": 2, "canary_share": 0.5}}}}', "another version than the default"),
        ('{"models": {"mlp": {"route": {"default": 1, "canary": 2, "canary_share": 1.0}}}}', r"here: Expected `float` < 1\.0"),
        ("[]", "here: Expected `object`, got `array`"),
    ],
)
def test_a_desired_state_that_is_off_is_refused_by_field(content: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_serving_state(content.encode(), "here")


def test_a_version_that_failed_is_tried_again_when_its_models_desired_state_changes(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an operator has made room on the device: its files are as they were."""
    add_version(models, "mlp", 2)
    honest = loader.open_model

    def full(*_: Any) -> Model:
        raise ProviderError("no room on the device")

    async def test(it: Replica) -> None:
        monkeypatch.setattr(loader, "open_model", full)
        await it.want(versions=[1, 2])
        assert it.states() == {1: "READY", 2: "FAILED"}
        monkeypatch.setattr(loader, "open_model", honest)
        await it.reconciler.poll()
        assert it.states()[2] == "FAILED"
        await it.want(versions=[2])
        assert it.states() == {1: "DRAINING", 2: "READY"}

    with_replica(test, models, versions="1")


def test_a_released_model_is_gone_at_once_and_not_at_the_next_garbage_collection(models: Path) -> None:
    """Fifty swaps grew by 6 MB each between two collections."""
    add_version(models, "mlp", 2)

    async def test(it: Replica) -> None:
        gc.collect()
        gc.disable()
        try:
            model = it.catalog.find("mlp", 1)
            engine = model.batcher._instances[0]._make_engine()
            gone = [weakref.ref(model), weakref.ref(engine), weakref.ref(engine._session)]  # type: ignore[attr-defined]
            del model, engine
            await it.want(versions=[2])
            await it.released()
            assert [reference() for reference in gone] == [None] * 3
        finally:
            gc.enable()

    with_replica(test, models, versions="1")
