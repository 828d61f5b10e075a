"""Versions come and go: what is served after each change, and what stays when a change fails."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from serve.catalog import Catalog, Route
from serve.errors import BundleError, LifecycleError, SettingsError, UnknownModelError
from serve.fair_queue import Priority
from serve.latents import Span
from serve.lifecycle import Lifecycle
from serve.manifest import MANIFEST_FILE, ONNX_FILE
from serve.metrics import Metrics
from serve.model import Model, joined_rows
from serve.repository import Repository, parse_policies
from serve.settings import Settings
from tests.bundle_copies import add_version, break_golden

TIMEOUT_S = 60


class Fixture:
    """A lifecycle over a folder, and what a test asks of it."""

    def __init__(self, models_dir: Path, **settings: Any) -> None:
        chosen = Settings(models_dir=models_dir, default_model="mlp", instances=1, max_batch_size=8, provider="cpu", **settings)
        self.registry = CollectorRegistry()
        self.catalog = Catalog("mlp")
        repository = Repository(models_dir, parse_policies(chosen.versions))
        self.lifecycle = Lifecycle(repository, self.catalog, chosen, Metrics(self.registry))

    def served(self, name: str = "mlp") -> list[int]:
        return self.catalog.versions(name)

    def route(self, name: str = "mlp") -> Route:
        return self.catalog.route(name)

    async def states(self, name: str = "mlp") -> dict[int, str]:
        return {status.version: status.state for status in await self.lifecycle.status() if status.name == name}

    async def released(self) -> None:
        """Wait until nothing drains."""
        while "DRAINING" in {status.state for status in await self.lifecycle.status()}:  # noqa: ASYNC110  # as an operator would
            await asyncio.sleep(0.01)

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def with_lifecycle(test: Callable[[Fixture], Awaitable[None]], models_dir: Path, **settings: Any) -> None:
    """Start a lifecycle, run the test on its event loop, and release everything."""

    async def run() -> None:
        fixture = Fixture(models_dir, **settings)
        await fixture.lifecycle.start()
        try:
            await asyncio.wait_for(test(fixture), TIMEOUT_S)
        finally:
            assert await fixture.lifecycle.close(30) == 0
        assert fixture.catalog.models() == []

    asyncio.run(run())


@pytest.fixture
def models(bundles: Path) -> Path:
    """The mlp alone: it loads in a twentieth of a second."""
    for name in ("dcgan", "cdcgan"):
        shutil.rmtree(bundles / name)
    return bundles


async def digits(model: Model, seed: int = 1) -> Any:
    with model.in_use():
        return joined_rows(await model.generate(Span(seed, 0, 2), False, Priority.INTERACTIVE, None))


def start_fails(models_dir: Path, error: type[Exception], match: str, **settings: Any) -> None:
    async def run() -> None:
        with pytest.raises(error, match=match):
            await Fixture(models_dir, **settings).lifecycle.start()

    asyncio.run(run())


def test_at_the_start_the_policy_picks_and_the_highest_is_the_default(models: Path) -> None:
    for version in (2, 3):
        add_version(models, "mlp", version)

    async def test(it: Fixture) -> None:
        assert it.served() == [2, 3]
        assert it.route() == Route(3)
        assert it.catalog.find("", 0).manifest.version == 3
        assert it.catalog.find("mlp", 2).manifest.version == 2
        with pytest.raises(UnknownModelError, match="model 'mlp' has no version 1; there are 2, 3"):
            it.catalog.find("mlp", 1)
        assert await it.states() == {1: "UNLOADED", 2: "READY", 3: "READY"}
        with pytest.raises(LifecycleError, match="has no earlier default"):
            await it.lifecycle.rollback("mlp")

    with_lifecycle(test, models, versions="latest:2", model_control="poll")


def test_with_mode_none_a_bad_bundle_an_empty_folder_or_a_missing_pin_stops_the_start(models: Path, tmp_path: Path) -> None:
    start_fails(models, BundleError, "mlp has no version 7; there are 1", versions="1+7")
    (tmp_path / "empty").mkdir()
    start_fails(tmp_path / "empty", BundleError, "holds no complete model; make export writes one")
    add_version(models, "mlp", 2)
    break_golden(models / "mlp" / "2")
    start_fails(models, BundleError, "model mlp/2 on cpu: golden sample")
    (models / "mlp").rename(models / "other")
    start_fails(models, SettingsError, "--default-model 'mlp' is not served; there are other")


def test_what_the_mode_does_not_allow_is_refused_and_says_what_would(models: Path) -> None:
    async def none(it: Fixture) -> None:
        for change in (it.lifecycle.load("mlp", 1), it.lifecycle.unload("mlp", 0)):
            with pytest.raises(LifecycleError, match="needs --model-control explicit, and it is none"):
                await change
        with pytest.raises(LifecycleError, match="SetDefault needs --model-control poll or explicit, and it is none"):
            await it.lifecycle.set_default("mlp", Route(1))

    with_lifecycle(none, models)

    async def poll(it: Fixture) -> None:
        with pytest.raises(LifecycleError, match="Load needs --model-control explicit, and it is poll"):
            await it.lifecycle.load("mlp", 1)

    with_lifecycle(poll, models, model_control="poll")


def test_polling_takes_a_version_once_it_has_settled_and_releases_the_old_one(models: Path) -> None:
    async def test(it: Fixture) -> None:
        old = it.catalog.find("mlp", 0)
        add_version(models, "mlp", 2)
        await it.lifecycle.poll()
        assert it.served() == [1], "it has been seen once only"
        await it.lifecycle.poll()
        assert it.served() == [2]
        assert it.route() == Route(2)
        await it.released()
        assert not any(thread.is_alive() for thread in old.batcher._threads)
        assert it.sample("digits_queue_images", model="mlp", version="1") is None
        assert it.sample("digits_model_traffic_share", model="mlp", version="2") == 1
        assert it.sample("digits_models_loaded") == 1
        shutil.rmtree(models / "mlp")
        await it.lifecycle.poll()
        assert it.served() == []
        with pytest.raises(UnknownModelError, match="model 'mlp' is not served; there are none at the moment"):
            it.catalog.find("", 0)

    with_lifecycle(test, models, model_control="poll")


def test_a_version_that_is_being_copied_is_never_picked_up_and_then_it_is(models: Path) -> None:
    """File by file, the manifest first, as cp -r may have it."""
    source = add_version(models, "mlp", 2).rename(models / ".source")

    async def test(it: Fixture) -> None:
        target = models / "mlp" / "2"
        target.mkdir()
        content = (source / ONNX_FILE).read_bytes()
        shutil.copy(source / MANIFEST_FILE, target)
        await it.lifecycle.poll()
        for size in (1, len(content) // 2, len(content) - 1):
            (target / ONNX_FILE).write_bytes(content[:size])
            await it.lifecycle.poll()
            assert it.served() == [1]
        assert await it.states() == {1: "READY", 2: "UNLOADED"}
        await it.lifecycle.poll()  # the copying has stopped half-way, it seems
        assert await it.states() == {1: "READY", 2: "FAILED"}
        shutil.copytree(source, target, dirs_exist_ok=True)
        await it.lifecycle.poll()
        await it.lifecycle.poll()
        assert it.served() == [2]

    with_lifecycle(test, models, model_control="poll")


@pytest.mark.parametrize("fault", ["golden", "digest", "bundle"])
def test_a_version_that_fails_leaves_the_old_one_serving_and_the_reason_everywhere(
    fault: str, models: Path, caplog: pytest.LogCaptureFixture
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

    async def test(it: Fixture) -> None:
        served = it.catalog.find("mlp", 0)
        spoil(add_version(models, "mlp", 2))
        for _ in range(5):
            await it.lifecycle.poll()
        assert it.catalog.find("mlp", 0) is served
        assert len(await digits(served)) == 2
        [failed] = [status for status in await it.lifecycle.status() if status.version == 2]
        assert failed.state == "FAILED"
        assert reasons[fault] in failed.reason
        assert caplog.text.count("mlp/2 cannot be loaded") == 1, "a version that has not changed is not tried again"
        assert it.sample("digits_model_loads_total", model="mlp", result=fault) == 1
        assert it.sample("digits_model_failed", model="mlp", version="2") == 1
        shutil.rmtree(models / "mlp" / "2")
        add_version(models, "mlp", 2)
        await it.lifecycle.poll()
        await it.lifecycle.poll()
        assert it.served() == [2]
        assert it.sample("digits_model_failed", model="mlp", version="2") is None

    with_lifecycle(test, models, model_control="poll")


def test_a_restart_beside_a_bad_version_serves_the_next_lower(models: Path) -> None:
    add_version(models, "mlp", 2)
    break_golden(add_version(models, "mlp", 3))

    async def test(it: Fixture) -> None:
        assert it.served() == [2]
        assert await it.states() == {1: "UNLOADED", 2: "READY", 3: "FAILED"}

    with_lifecycle(test, models, model_control="poll")


def test_polling_a_folder_that_is_gone_serves_on(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(it: Fixture) -> None:
        models.rename(models.with_name("gone"))  # noqa: ASYNC240  # nothing else runs on this loop
        await it.lifecycle.poll()
        assert it.served() == [1]
        assert "serving what was loaded" in caplog.text

    with_lifecycle(test, models, model_control="poll")


def test_an_empty_folder_is_waited_upon(models: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()

    async def test(it: Fixture) -> None:
        assert it.served() == []
        assert not it.catalog.ready("mlp")
        shutil.copytree(models / "mlp", empty / "mlp")
        await it.lifecycle.poll()
        await it.lifecycle.poll()
        assert it.catalog.ready("mlp")

    with_lifecycle(test, empty, model_control="poll")


def test_a_bundle_changed_on_disk_after_loading_does_no_harm_until_it_is_loaded_again(models: Path) -> None:
    async def test(it: Fixture) -> None:
        served = it.catalog.find("mlp", 0)
        before = await digits(served)
        (models / "mlp" / "1" / ONNX_FILE).write_bytes(b"junk")
        assert np.array_equal(await digits(it.catalog.find("mlp", 0)), before)
        with pytest.raises(LifecycleError, match="is not the file that was exported"):
            await it.lifecycle.load("mlp", 1)
        with pytest.raises(LifecycleError, match="is not the file that was exported"):
            await it.lifecycle.load("mlp", 0)
        assert it.catalog.find("mlp", 0) is served
        [status] = await it.lifecycle.status()
        assert status.state == "READY"
        assert "is not the file that was exported" in status.reason

    with_lifecycle(test, models, model_control="explicit")


def test_load_beside_set_default_rollback_and_unload(models: Path) -> None:
    for version in (2, 3):
        add_version(models, "mlp", version)

    async def test(it: Fixture) -> None:
        assert it.served() == [1], "pinned by policy"
        await it.lifecycle.load("mlp", 2)
        assert (it.served(), it.route()) == ([1, 2], Route(1))
        await it.lifecycle.set_default("mlp", Route(2))
        assert it.catalog.find("mlp", 0).manifest.version == 2
        with pytest.raises(LifecycleError, match="version 2 of mlp answers requests that name none; SetDefault first"):
            await it.lifecycle.unload("mlp", 2)
        await it.lifecycle.unload("mlp", 1)
        assert it.served() == [2]
        await it.lifecycle.rollback("mlp")
        assert it.route() == Route(1)
        assert it.served() == [1, 2], "rollback has loaded it again"
        with pytest.raises(LifecycleError, match="version 3 of 'mlp' is not served; there are \\[1, 2\\]"):
            await it.lifecycle.set_default("mlp", Route(3))
        with pytest.raises(LifecycleError, match="the repository has no version 9 of 'mlp'; there is 1, 2, 3"):
            await it.lifecycle.load("mlp", 9)
        with pytest.raises(LifecycleError, match=r"the repository has no version of '\.\./mlp'; there is no complete one"):
            await it.lifecycle.load("../mlp", 0)
        await it.lifecycle.unload("mlp", 0)
        assert it.served() == []
        with pytest.raises(LifecycleError, match="'mlp' version any is not served"):
            await it.lifecycle.unload("mlp", 0)
        await it.lifecycle.load("mlp", 0)
        assert it.served() == [1]

    with_lifecycle(test, models, versions="1", model_control="explicit")


def test_a_pinned_default_outlives_newer_versions_until_it_is_given_back_to_the_policy(models: Path) -> None:
    async def test(it: Fixture) -> None:
        await it.lifecycle.set_default("mlp", Route(1))
        add_version(models, "mlp", 2)
        await it.lifecycle.poll()
        await it.lifecycle.poll()
        assert (it.served(), it.route()) == ([1, 2], Route(1))
        await it.lifecycle.set_default("mlp", Route(0))
        assert (it.served(), it.route()) == ([2], Route(2))
        await it.lifecycle.rollback("mlp")
        assert (it.served(), it.route()) == ([1, 2], Route(1))

    with_lifecycle(test, models, model_control="poll")


def test_a_canary_gets_its_share_of_the_seeds_and_always_the_same_ones(models: Path) -> None:
    add_version(models, "mlp", 2)

    async def test(it: Fixture) -> None:
        await it.lifecycle.set_default("mlp", Route(1, 2, 0.25))

        def version(seed: int) -> int:
            return it.catalog.find("mlp", 0, lambda: seed).manifest.version

        picked = [version(seed) for seed in range(4000)]
        assert 0.22 < picked.count(2) / 4000 < 0.28
        assert picked == [version(seed) for seed in range(4000)]
        assert it.sample("digits_model_traffic_share", model="mlp", version="1") == 0.75
        assert it.sample("digits_model_traffic_share", model="mlp", version="2") == 0.25
        await it.lifecycle.set_default("mlp", Route(1, 2, 0.5))
        assert all(version(seed) == 2 for seed in range(4000) if picked[seed] == 2), "a growing canary keeps its seeds"
        with pytest.raises(LifecycleError, match="answers requests that name none"):
            await it.lifecycle.unload("mlp", 2)

    with_lifecycle(test, models, versions="latest:2", model_control="explicit")


def test_a_call_that_goes_on_for_long_keeps_its_model_until_it_ends(models: Path) -> None:
    async def test(it: Fixture) -> None:
        old = it.catalog.find("mlp", 0)
        with old.in_use():
            add_version(models, "mlp", 2)
            await it.lifecycle.load("mlp", 0)
            assert it.served() == [2]
            assert (await it.states())[1] == "DRAINING"
            for seed in range(20):
                assert len(await digits(old, seed)) == 2
        await it.released()
        assert (await it.states())[1] == "UNLOADED"

    with_lifecycle(test, models, model_control="explicit")


def test_a_change_goes_to_its_end_though_the_caller_leaves_and_changes_wait_for_each_other(models: Path) -> None:
    add_version(models, "mlp", 2)

    async def test(it: Fixture) -> None:
        leaving = asyncio.ensure_future(it.lifecycle.load("mlp", 2))
        await asyncio.sleep(0)
        leaving.cancel()
        await it.lifecycle.set_default("mlp", Route(2))  # would fail if it did not wait
        assert it.route() == Route(2)

    with_lifecycle(test, models, versions="1", model_control="explicit")


def test_a_version_loaded_again_after_its_files_changed_replaces_itself(models: Path) -> None:
    async def test(it: Fixture) -> None:
        old = it.catalog.find("mlp", 0)
        await it.lifecycle.load("mlp", 1)
        assert it.catalog.find("mlp", 0) is old, "the same bundle is not loaded twice"
        manifest = models / "mlp" / "1" / MANIFEST_FILE
        manifest.write_text(manifest.read_text().replace('"opset": ', '"opset": 1'))
        os.utime(manifest)
        await it.lifecycle.load("mlp", 1)
        assert it.catalog.find("mlp", 0) is not old
        assert it.sample("digits_model_ready", model="mlp", version="1") == 1
        await it.released()
        assert it.sample("digits_model_ready", model="mlp", version="1") == 1

    with_lifecycle(test, models, model_control="explicit")
