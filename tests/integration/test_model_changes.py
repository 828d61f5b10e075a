"""Models change under load, by the file and by the folder; no call fails, and callers see how things stand."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.admin import main
from serve.client import DigitClient
from serve.client.channel import CHANNEL_OPTIONS
from serve.manifest import BUNDLED_DIR, ONNX_FILE
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from tests.bundle_copies import add_version, break_golden
from tests.server_process import ServerProcess
from tests.waiting import wait_until

SWAPS = 50


@pytest.fixture
def models(bundles: Path) -> Path:
    """The mlp alone."""
    for name in ("dcgan", "cdcgan", "rpgan"):
        shutil.rmtree(bundles / name)
    return bundles


def admin(models: Path, *words: str) -> None:
    """Change the file in the models folder, as an operator does."""
    assert main([*words, f"--models-dir={models}"]) == 0


def versions_of(stub: Any) -> dict[int, str]:
    """The state of each version of the mlp, as a caller sees it."""
    listed = stub.Status(pb.StatusRequest(model="mlp")).versions
    return {each.version: pb.VersionState.Name(each.state).removeprefix("VERSION_STATE_") for each in listed}


@contextmanager
def load(target: str, callers: int = 4) -> Iterator[Counter[int]]:
    """Callers without retries who name no version; every call must succeed and be right. Yields calls by version."""
    versions: Counter[int] = Counter()
    failures: list[str] = []
    stop = threading.Event()
    begun = threading.Barrier(callers + 1)

    def call(number: int) -> None:
        with grpc.insecure_channel(target, CHANNEL_OPTIONS[1:]) as channel:
            stub = pb_grpc.DigitGeneratorStub(channel)
            request = pb.GenerateRequest(model="mlp", count=1 + 5 * number, seed=number)
            expected = np.frombuffer(stub.Generate(request, timeout=30).images[0], np.uint8).astype(int)
            begun.wait(60)
            while not stop.is_set():
                try:
                    answer = stub.Generate(request, timeout=30)
                except grpc.RpcError as error:
                    failures.append(f"{error.code().name}: {error.details()}")
                    return
                versions[answer.version] += 1
                if int(np.abs(np.frombuffer(answer.images[0], np.uint8) - expected).max()) > 1:
                    failures.append("wrong digits")

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    try:
        yield versions
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures, failures[:5]


@pytest.mark.long
def test_fifty_swaps_under_load_fail_no_call(models: Path, start_server: Callable[..., ServerProcess]) -> None:
    for version in range(2, 5):
        add_version(models, "mlp", version)
    server = start_server(f"--models-dir={models}", "--default-model=mlp", "--versions=1", "--poll-interval-s=0.05")
    with load(server.target) as versions:
        old = 1
        for swap in range(SWAPS):
            new = 1 + (swap + 1) % 4
            admin(models, "load", "mlp", f"--version={new}", "--versions=1")
            admin(models, "set-default", "mlp", f"--version={new}")
            seen = versions[new]
            wait_until(lambda: versions[new] > seen)  # noqa: B023  # called before the next turn
            admin(models, "unload", "mlp", f"--version={old}")
            wait_until(lambda: server.metric("digits_models_loaded") == 1)
            old = new
    assert set(versions) == {1, 2, 3, 4}
    assert server.metric("grpc_server_handled_total", grpc_method="Generate", grpc_code="OK") == server.metric(
        "grpc_server_handled_total", grpc_method="Generate"
    )
    assert server.metric("digits_model_loads_total", model="mlp", result="ok") == SWAPS + 1


def test_polling_swaps_under_load_and_a_bad_version_changes_nothing(
    models: Path, start_server: Callable[..., ServerProcess]
) -> None:
    flags = ("--default-model=mlp", "--poll-interval-s=0.05")
    server = start_server(f"--models-dir={models}", *flags)
    with grpc.insecure_channel(server.target) as channel, load(server.target) as versions:
        for version in range(2, 7):
            if version == 4:
                shutil.copytree(models / "mlp" / "3", models / "half")
                (models / "half" / ONNX_FILE).write_bytes(b"half a model")
                (models / "half").rename(models / "mlp" / "4")
                wait_until(lambda: server.metric("digits_model_failed", model="mlp", version="4") == 1)
                assert versions[4] == 0
                assert server.get("/readyz") == (200, "ready\n")
                continue
            add_version(models, "mlp", version)
            wait_until(lambda: versions[version])  # noqa: B023  # called before the next turn
        states = versions_of(pb_grpc.DigitGeneratorStub(channel))
    assert set(versions) == {1, 2, 3, 5, 6}
    assert (states[6], states[4]) == ("READY", "FAILED")


def test_the_canary_shows_in_the_answers_versions_the_list_and_the_metrics(
    models: Path, start_server: Callable[..., ServerProcess]
) -> None:
    add_version(models, "mlp", 2)
    admin(models, "set-default", "mlp", "--version=1")
    admin(models, "canary", "mlp", "--version=2", "--share=0.3")
    server = start_server(f"--models-dir={models}", "--default-model=mlp", "--versions=latest:2")
    with DigitClient(server.target) as client:
        by_seed = {seed: client.generate(1, seed=seed).version for seed in range(300)}
        assert 50 < list(by_seed.values()).count(2) < 130
        assert all(client.generate(3, seed=seed, start=5).version == version for seed, version in list(by_seed.items())[:50])
        assert all(next(client.stream(3, seed=seed)).version == version for seed, version in list(by_seed.items())[:50])
        rows = np.random.default_rng(1).standard_normal((40, 1, 64)).astype(np.float32)
        by_latents = [client.generate(latents=row).version for row in rows]
        assert set(by_latents) == {1, 2}
        assert by_latents == [client.generate(latents=row).version for row in rows]
        shares = {model.version: (model.default_version, model.traffic_share) for model in client.list_models().models}
        assert shares == {1: (True, 0.7), 2: (False, 0.3)}
        assert server.metric("digits_model_traffic_share", model="mlp", version="2") == 0.3
        assert server.metric("digits_images_total", model="mlp", version="2") > 50
        assert client.generate(1, seed=0, version=3 - by_seed[0]).version == 3 - by_seed[0]


@pytest.mark.parametrize("name", ["../mlp", "/etc/passwd", "..", "mlp\0", "MLP", "a" * 5000, "é", "mlp/1", "\n", "%2e%2e"])
def test_odd_model_names_are_not_found_and_touch_nothing(name: str, client: DigitClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.generate(1, model=name)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert len(caught.value.details()) < 300


def test_health_follows_the_models(models: Path, start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(f"--models-dir={models}", "--default-model=mlp", "--poll-interval-s=0.05")
    status = health_pb2.HealthCheckResponse
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def check(name: str) -> int | grpc.StatusCode:
            try:
                return health.Check(health_pb2.HealthCheckRequest(service=name)).status
            except grpc.RpcError as error:
                return error.code()

        assert [check(name) for name in ("", "digits.v1.DigitGenerator/mlp")] == [status.SERVING] * 2
        admin(models, "unload", "mlp")
        wait_until(lambda: check("digits.v1.DigitGenerator/mlp") is grpc.StatusCode.NOT_FOUND)
        assert check("digits.v1.DigitGenerator") == check("") == status.NOT_SERVING
        assert server.get("/readyz") == (503, "no model is served yet\n")
        assert server.get("/readyz/mlp") == (503, "not ready: mlp\n")
        admin(models, "load", "mlp")
        wait_until(lambda: check("digits.v1.DigitGenerator/mlp") == check("") == status.SERVING)


def test_status_of_a_server_that_serves_nothing_tells_why(
    models: Path, start_server: Callable[..., ServerProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue: the client's own health checking made status impossible when it is needed most."""
    shutil.rmtree(models / "mlp" / "1")
    shutil.copytree(BUNDLED_DIR / "mlp" / "1", models / "mlp" / "1")
    break_golden(models / "mlp" / "1")
    server = start_server(f"--models-dir={models}", "--wait-for-models")
    assert main(["status", f"--target={server.target}"]) == 0
    [_, line] = capsys.readouterr().out.splitlines()
    assert line.split()[:4] == ["mlp", "1", "failed", "0.0%"]
    assert "golden sample" in line
    [status] = json.loads(server.get("/v1/status")[1])["versions"]
    assert (status["state"], "golden sample" in status["reason"]) == ("FAILED", True)


def test_tritons_client_lists_and_is_told_that_a_file_says_what_is_served(
    models: Path, start_server: Callable[..., ServerProcess], by_triton: Callable[[str, str], dict[str, Any]]
) -> None:
    add_version(models, "mlp", 2)
    server = start_server(f"--models-dir={models}", "--default-model=mlp", "--versions=1")
    seen = by_triton("triton_operator.py", server.target)
    served = {"name": "mlp", "version": "1", "state": "READY"}
    unloaded = {"name": "mlp", "version": "2", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert seen["index"] == [served, unloaded]
    for refused in (seen["load"], seen["unload"]):
        assert refused[0] == "StatusCode.UNIMPLEMENTED"
        assert "serving.json" in refused[1]
    assert seen["ready"]
