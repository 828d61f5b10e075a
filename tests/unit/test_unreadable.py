"""Files and folders that cannot be read, or hang: what is served stays served, others go on, and nothing else answers."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.errors import BundleError, SettingsError, UnknownModelError
from serve.manifest import BUNDLED_DIR, MANIFEST_FILE
from serve.models import loader, reconcile
from serve.models.catalog import Catalog
from serve.models.repository import Repository
from serve.settings import Settings
from tests.bundle_copies import add_version, break_golden
from tests.unit.test_reconcile import Replica, models, start_fails, with_replica
from tests.waiting import wait_until

__all__ = ["models"]  # a fixture


def deny(monkeypatch: pytest.MonkeyPatch, *denied: Path) -> list[Path]:
    """Let these paths, and what is in them, be unreadable, as they are to whoever is not root; while they are in the list."""
    active = list(denied)

    def guard(honest: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(self: Path, *given: Any, **named: Any) -> Any:
            if any(self == each or each in self.parents for each in active):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
            return honest(self, *given, **named)

        return maybe

    monkeypatch.setattr(Path, "iterdir", guard(Path.iterdir))
    monkeypatch.setattr(Path, "stat", guard(Path.stat))
    return active


async def poll(it: Replica, times: int = 3) -> None:
    for _ in range(times):
        await it.reconciler.poll()


@pytest.mark.parametrize("name", [".#manifest.json", "note", MANIFEST_FILE])
def test_a_dangling_link_in_a_versions_folder_unloads_nothing_and_is_named_once(
    name: str, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Issue: an editor's lock file, which is a dangling link, unloaded a served model."""

    async def test(it: Replica) -> None:
        served = it.catalog.find("mlp", 0)
        link = models / "mlp" / "1" / name
        link.unlink(missing_ok=True)
        link.symlink_to("nobody@nowhere:1")
        await poll(it)
        assert it.catalog.find("mlp", 0) is served
        assert caplog.text.count(f"{link} cannot be read") == 1
        assert it.reconciler.status()[0].state == "READY"

    with_replica(test, models)


def test_a_model_whose_folder_cannot_be_read_stays_served_and_others_go_on(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(it: Replica) -> None:
        served = it.catalog.find("mlp", 0)
        active = deny(monkeypatch, models / "mlp")
        shutil.copytree(BUNDLED_DIR / "dcgan", models / "dcgan")
        await poll(it)
        assert it.catalog.find("mlp", 0) is served
        assert it.served("dcgan") == [1]
        assert caplog.text.count(f"{models / 'mlp'} cannot be read (Permission denied)") == 1
        active.clear()
        add_version(models, "mlp", 2)
        await poll(it, 2)
        assert it.served() == [2], "it is followed again"

    with_replica(test, models)


def test_a_version_whose_folder_cannot_be_read_is_passed_over_until_it_can(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    active = deny(monkeypatch, add_version(models, "mlp", 2))

    async def test(it: Replica) -> None:
        await poll(it)
        assert it.served() == [1]
        active.clear()
        await poll(it)
        assert it.served() == [2]

    with_replica(test, models)


def test_an_unreadable_folder_beside_the_models_does_not_keep_the_server_from_starting(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Issue: a backup of root's, or lost+found: no start, a traceback, and no model was updated any more."""
    for name in ("lost+found", "backup"):
        (models / name).mkdir()
    deny(monkeypatch, models / "lost+found", models / "backup")

    async def test(it: Replica) -> None:
        assert it.served() == [1]
        add_version(models, "mlp", 2)
        await poll(it)
        assert it.served() == [2]
        assert caplog.text.count("backup cannot be read") == 1

    with_replica(test, models)


def test_a_folder_of_models_that_cannot_be_read_is_one_line_at_the_start_and_serves_on_later(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "serving.json"

    async def test(it: Replica) -> None:
        deny(monkeypatch, models)
        await poll(it)
        assert it.served() == [1]
        assert caplog.text.count("cannot be read (Permission denied); make export writes one") == 1
        assert it.sample("digits_background_failures_total", task="reconcile") == 3

    with_replica(test, models, serving_file=elsewhere)
    start_fails(models, BundleError, r"--models-dir .* cannot be read \(Permission denied\)", serving_file=elsewhere)


def test_a_folder_that_became_empty_by_itself_is_not_believed(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Issue: a volume that was emptied or unmounted unserved everything, without an alert."""

    async def test(it: Replica) -> None:
        served = it.catalog.find("mlp", 0)
        (models / "mlp").rename(models / ".away")
        await poll(it)
        assert it.catalog.find("mlp", 0) is served
        assert caplog.text.count("holds no complete model any more; serving what was loaded") == 1
        (models / ".away").rename(models / "mlp")
        add_version(models, "mlp", 2)
        await poll(it)
        assert it.served() == [2]
        shutil.rmtree(models / "mlp")
        await it.want(versions=[])
        assert it.served() == [], "the desired state says so"
        assert caplog.text.count("holds no complete model any more") == 2, "said of this look too, and then no more"
        await poll(it)
        assert caplog.text.count("holds no complete model any more") == 2

    with_replica(test, models)


def test_a_serving_file_that_went_with_its_folder_stays_in_force(models: Path, tmp_path: Path) -> None:
    """A volume that is emptied has the desired state too: the canary got every request, and the default was unloaded."""
    add_version(models, "mlp", 2)
    wanted, beside = {"versions": [1, 2], "route": {"default": 1, "canary": 2, "canary_share": 0.1}}, tmp_path / "beside"

    def move(source: Path, target: Path) -> None:
        target.mkdir(exist_ok=True)
        for name in ("mlp", "serving.json"):
            (source / name).rename(target / name)

    async def test(it: Replica) -> None:
        await it.want(**wanted)
        await poll(it)
        for change in (lambda: move(models, beside), models.rmdir):  # emptied, and gone
            change()
            await poll(it)
            assert (it.served(), it.route().default) == ([1, 2], 1)
        move(beside, models)
        await poll(it)
        it.file.unlink()
        await poll(it)
        assert (it.served(), it.route().default) == ([2], 2), "gone alone, it is gone"

    with_replica(test, models)


@pytest.mark.parametrize("named", ["mlp", ""])
def test_a_default_model_that_is_gone_is_not_found_and_no_other_answers_for_it(named: str, models: Path) -> None:
    """Issue: requests that name no model were silently answered by another one."""

    async def test(it: Replica) -> None:
        shutil.copytree(BUNDLED_DIR / "dcgan", models / "dcgan")
        await poll(it)
        assert (it.catalog.names(), it.catalog.default_model) == (["dcgan", "mlp"], "mlp"), "also beside one that sorts before it"
        shutil.copytree(BUNDLED_DIR / "rpgan", models / "rpgan")
        await poll(it)
        assert it.catalog.default_model == "mlp", "and beside the usual one"
        shutil.rmtree(models / "mlp")
        await poll(it)
        assert it.catalog.names() == ["dcgan", "rpgan"]
        with pytest.raises(UnknownModelError, match="model 'mlp' is not served; there are dcgan, rpgan"):
            it.catalog.find("", 0)

    with_replica(test, models, default_model=named)


def test_the_usual_default_that_cannot_be_loaded_is_not_replaced_by_another_model(models: Path) -> None:
    shutil.copytree(BUNDLED_DIR / "rpgan", models / "rpgan")
    break_golden(models / "rpgan" / "1")

    async def test(it: Replica) -> None:
        assert (it.catalog.names(), it.catalog.default_model) == (["mlp"], "rpgan")

    with_replica(test, models, default_model="", wait_for_models=True)
    assert Catalog().default_model == "rpgan", "before there is any"


def test_a_look_that_hangs_is_given_up_and_the_next_waits_until_it_has_ended(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a network volume that is stuck. Changes of the desired state go on."""
    add_version(models, "mlp", 2)
    monkeypatch.setattr(reconcile, "LOOK_LIMIT_S", 0.2)

    async def test(it: Replica) -> None:
        honest, go_on = Repository.scan, threading.Event()
        monkeypatch.setattr(Repository, "scan", lambda self: (go_on.wait(30), honest(self))[1])
        await poll(it)
        monkeypatch.setattr(reconcile, "LOOK_LIMIT_S", 30.0)  # of the looks that do not hang
        # Not one for each poll; the other look's thread, of the serving file, may be ending.
        wait_until(lambda: [thread.name for thread in threading.enumerate()].count("daemon-look") == 1)
        assert "looking at the models folder takes longer than 0.2 s and is given up; serving what was loaded" in caplog.text
        assert caplog.text.count("looking at the models folder still hangs") == 1
        await it.want(route={"default": 2}, versions=[1, 2])
        assert it.served() == [1], "what cannot be looked at is not loaded"
        await it.want(versions=[])
        assert it.served() == []
        go_on.set()
        wait_until(lambda: "daemon-look" not in [thread.name for thread in threading.enumerate()])
        await it.want(versions=[1])
        await poll(it)
        assert it.served() == [1]

    with_replica(test, models, versions="1")


@pytest.mark.long
def test_a_load_that_hangs_is_given_up_and_other_models_go_on_meanwhile(
    models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader, "LOAD_LIMIT_S", 5.0)
    monkeypatch.setattr(reconcile, "LOAD_PATIENCE_S", 0.1)
    honest, go_on, closed = loader.open_model, threading.Event(), []

    def stuck(bundle: Any, *given: Any) -> Any:
        if bundle.manifest.name != "dcgan":
            return honest(bundle, *given)
        go_on.wait(30)
        model = honest(bundle, *given)
        close = model.batcher.close
        monkeypatch.setattr(model.batcher, "close", lambda timeout_s: closed.append(close(timeout_s)))
        return model

    async def test(it: Replica) -> None:
        monkeypatch.setattr(loader, "open_model", stuck)
        shutil.copytree(BUNDLED_DIR / "dcgan", models / "dcgan")
        await poll(it, 2)
        assert it.states("dcgan") == {1: "LOADING"}
        add_version(models, "mlp", 2)
        await poll(it, 2)
        while it.served() != [2]:
            await it.reconciler.poll()
        assert it.states("dcgan") == {1: "LOADING"}
        while it.states("dcgan") == {1: "LOADING"}:  # noqa: ASYNC110  # as an operator would
            await asyncio.sleep(0.02)
        assert it.states("dcgan") == {1: "FAILED"}
        assert "dcgan/1 cannot be loaded: loading dcgan/1 takes longer than 5 s and is given up" in caplog.text
        assert it.sample("digits_model_loads_total", model="dcgan", result="overdue") == 1
        await poll(it)
        assert caplog.text.count("is given up") == 1, "it is not tried again as it is"
        go_on.set()
        while not closed:  # noqa: ASYNC110  # it comes late, and is released
            await asyncio.sleep(0.02)
        assert closed == [0]
        assert it.served("dcgan") == []

    with_replica(test, models)


def test_closing_does_not_wait_for_a_load_that_hangs(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "LOAD_PATIENCE_S", 0.1)
    go_on = threading.Event()

    async def test(it: Replica) -> None:
        monkeypatch.setattr(loader, "open_model", lambda *_: go_on.wait(30))
        add_version(models, "mlp", 2)
        await poll(it, 2)
        assert it.states() == {1: "READY", 2: "LOADING"}
        assert await asyncio.wait_for(it.reconciler.close(30), 5) == 0
        assert it.states() == {1: "UNLOADED", 2: "UNLOADED"}
        monkeypatch.undo()
        await poll(it)
        assert it.served() == [], "nothing begins any more"

    try:
        with_replica(test, models)
    finally:
        go_on.set()


def test_a_process_whose_look_hangs_ends_all_the_same() -> None:
    """The interpreter joins the threads of executors, and not these."""
    code = "import threading; from serve.background import in_daemon_thread; in_daemon_thread('x', threading.Event().wait)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


@pytest.mark.timeout(30)
def test_a_pipe_as_serving_file_neither_blocks_the_start_nor_later_changes(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = models / "serving.json"

    async def test(it: Replica) -> None:
        os.mkfifo(pipe)
        add_version(models, "mlp", 2)
        await poll(it)
        assert it.served() == [2], "the models are followed"
        assert caplog.text.count(f"--serving-file {pipe} cannot be read (no regular file)") == 1
        assert it.sample("digits_serving_file_reads_total", result="failed") == 3

    with_replica(test, models)
    with pytest.raises(SettingsError, match=r"serving\.json cannot be read \(no regular file\)"):
        Replica(models)


def test_an_unusable_version_policy_is_refused_before_a_model_is_loaded(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(SettingsError, match="--versions: 'newest' is no policy; give latest, latest:N, or numbers as in"):
        Replica(models, versions="newest")
    assert "is loaded" not in caplog.text
    done = subprocess.run(
        [sys.executable, "-m", "serve", "--versions=newest", "--grpc-port=0", "--http-port=0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --versions: 'newest' is no policy; give latest, latest:N, or numbers as in 1+4\n"


def test_settings_alone_know_no_policies() -> None:
    assert Settings(versions="newest").versions == "newest"


def test_a_projected_volume_is_followed_when_its_link_is_swapped(models: Path, tmp_path: Path) -> None:
    """As the kubelet updates a ConfigMap that is mounted as a folder: files are links into ..data, a link to a dated folder."""
    add_version(models, "mlp", 2)
    mount = tmp_path / "mount"
    mount.mkdir()

    def project(stamp: str, text: str) -> None:
        (mount / stamp).mkdir()
        (mount / stamp / "serving.json").write_text(text)
        (mount / "..data_tmp").symlink_to(stamp)
        (mount / "..data_tmp").rename(mount / "..data")
        for old in mount.glob("..2*"):
            if old.name != stamp:
                shutil.rmtree(old)

    project("..2026_11_28_1", '{"models": {"mlp": {"versions": [1, 2], "route": {"default": 1}}}}')
    (mount / "serving.json").symlink_to("..data/serving.json")

    async def test(it: Replica) -> None:
        assert (it.served(), it.route().default) == ([1, 2], 1)
        project("..2026_11_28_2", '{"models": {"mlp": {"versions": [1, 2], "route": {"default": 2}}}}')
        await it.reconciler.poll()
        assert (it.served(), it.route().default) == ([1, 2], 2)
        project("..2026_11_28_3", '{"models": {"mlp": {"versions": [1]}}}')
        await it.reconciler.poll()
        assert (it.served(), it.route().default) == ([1], 1)

    with_replica(test, models, serving_file=mount / "serving.json")
