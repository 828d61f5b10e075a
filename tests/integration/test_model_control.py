"""Models change under load, by the own API, by the command line, by polling and by Triton's client; no call fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
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

from serve.client import DigitClient
from serve.client.channel import CHANNEL_OPTIONS
from serve.manifest import ONNX_FILE
from serve.pb.digits.v1 import control_pb2 as pb
from serve.pb.digits.v1 import control_pb2_grpc as pb_grpc
from serve.pb.digits.v1 import digits_pb2, digits_pb2_grpc
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


@contextmanager
def control(server: ServerProcess) -> Iterator[pb_grpc.ModelControlStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield pb_grpc.ModelControlStub(channel)


@contextmanager
def load(target: str, callers: int = 4) -> Iterator[Counter[int]]:
    """Callers without retries who name no version; every call must succeed and be right. Yields calls by version."""
    versions: Counter[int] = Counter()
    failures: list[str] = []
    stop = threading.Event()
    begun = threading.Barrier(callers + 1)

    def call(number: int) -> None:
        with grpc.insecure_channel(target, CHANNEL_OPTIONS[1:]) as channel:
            stub = digits_pb2_grpc.DigitGeneratorStub(channel)
            request = digits_pb2.GenerateRequest(model="mlp", count=1 + 5 * number, seed=number)
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


def test_fifty_swaps_under_load_fail_no_call(models: Path, start_server: Callable[..., ServerProcess]) -> None:
    for version in range(2, 5):
        add_version(models, "mlp", version)
    server = start_server(f"--models-dir={models}", "--default-model=mlp", "--versions=1")
    with control(server) as stub, load(server.target) as versions:
        old = 1
        for swap in range(SWAPS):
            new = 1 + (swap + 1) % 4
            stub.Load(pb.LoadRequest(model="mlp", version=new), timeout=60)
            stub.SetDefault(pb.SetDefaultRequest(model="mlp", version=new), timeout=60)
            seen = versions[new]
            wait_until(lambda: versions[new] > seen)  # noqa: B023  # called before the next turn
            stub.Unload(pb.UnloadRequest(model="mlp", version=old), timeout=60)
            old = new
    assert set(versions) == {1, 2, 3, 4}
    assert server.metric("grpc_server_handled_total", grpc_method="Generate", grpc_code="OK") == server.metric(
        "grpc_server_handled_total", grpc_method="Generate"
    )
    assert server.metric("digits_model_loads_total", model="mlp", result="ok") == SWAPS + 1
    wait_until(lambda: server.metric("digits_models_loaded") == 1)


def test_polling_swaps_under_load_and_a_bad_version_changes_nothing(
    models: Path, start_server: Callable[..., ServerProcess]
) -> None:
    flags = ("--default-model=mlp", "--poll-interval-s=0.05")
    server = start_server(f"--models-dir={models}", *flags)
    with control(server) as stub, load(server.target) as versions:
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
        states = {each.version: pb.VersionState.Name(each.state) for each in stub.Status(pb.StatusRequest()).versions}
    assert set(versions) == {1, 2, 3, 5, 6}
    assert states[6] == "VERSION_STATE_READY"
    assert states[4] == "VERSION_STATE_FAILED"


def test_the_canary_shows_in_the_answers_versions_the_list_and_the_metrics(
    models: Path, start_server: Callable[..., ServerProcess]
) -> None:
    add_version(models, "mlp", 2)
    server = start_server(f"--models-dir={models}", "--default-model=mlp", "--versions=latest:2")
    with control(server) as stub, DigitClient(server.target) as client:
        stub.SetDefault(pb.SetDefaultRequest(model="mlp", version=1, canary_version=2, canary_share=0.3))
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pb.SetDefaultRequest(model="mlp", version=1, canary_version=2), "canary_version and canary_share go together"),
        (pb.SetDefaultRequest(model="mlp", version=1, canary_share=0.5), "canary_version and canary_share go together"),
        (pb.SetDefaultRequest(model="mlp", version=1, canary_version=2, canary_share=1.5), "canary_share must be over 0"),
        (pb.SetDefaultRequest(model="mlp", version=1, canary_version=2, canary_share=float("nan")), "canary_share must be"),
        (pb.SetDefaultRequest(model="mlp", version=2, canary_version=2, canary_share=0.5), "version must be named beside"),
        (pb.SetDefaultRequest(model="mlp", version=-1), "a version must be 1 or more"),
        (pb.SetDefaultRequest(version=1), "a model name is needed"),
    ],
)
def test_an_unusable_change_names_the_field(change: pb.SetDefaultRequest, message: str, shared_server: ServerProcess) -> None:
    with control(shared_server) as stub, pytest.raises(grpc.RpcError) as caught:
        stub.SetDefault(change)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.details()


@pytest.mark.parametrize("name", ["../mlp", "/etc/passwd", "..", "mlp\0", "MLP", "a" * 5000, "é", "mlp/1", "\n", "%2e%2e"])
def test_odd_model_names_are_not_found_and_touch_nothing(name: str, explicit_server: ServerProcess) -> None:
    with control(explicit_server) as stub, DigitClient(explicit_server.target) as client:
        for call, code in (
            (lambda: stub.Load(pb.LoadRequest(model=name)), grpc.StatusCode.FAILED_PRECONDITION),
            (lambda: stub.Unload(pb.UnloadRequest(model=name)), grpc.StatusCode.FAILED_PRECONDITION),
            (lambda: stub.Rollback(pb.RollbackRequest(model=name)), grpc.StatusCode.FAILED_PRECONDITION),
            (lambda: client.generate(1, model=name), grpc.StatusCode.NOT_FOUND),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is code
            assert len(caught.value.details()) < 300


@pytest.fixture(scope="module")
def explicit_server() -> Iterator[ServerProcess]:
    server = ServerProcess()
    yield server
    server.kill()


def test_health_follows_the_models(models: Path, start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(f"--models-dir={models}", "--default-model=mlp")
    status = health_pb2.HealthCheckResponse
    with control(server) as stub, grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def check(name: str) -> int:
            return health.Check(health_pb2.HealthCheckRequest(service=name)).status

        assert [check(name) for name in ("", "digits.v1.DigitGenerator/mlp")] == [status.SERVING] * 2
        stub.Unload(pb.UnloadRequest(model="mlp"))
        wait_until(lambda: check("digits.v1.DigitGenerator/mlp") == status.SERVICE_UNKNOWN)
        assert check("digits.v1.DigitGenerator") == check("") == status.NOT_SERVING
        others = [name for name in ("cdcgan", "dcgan", "rpgan") if (models / name).exists()]
        assert server.get("/readyz") == ((200, "ready\n") if others else (503, "no model is served yet\n"))
        assert server.get("/readyz/mlp") == (503, "not ready: mlp\n")
        stub.Load(pb.LoadRequest(model="mlp"))
        wait_until(lambda: check("digits.v1.DigitGenerator/mlp") == check("") == status.SERVING)


def test_the_command_line_administers(models: Path, start_server: Callable[..., ServerProcess]) -> None:
    add_version(models, "mlp", 2)
    break_golden(add_version(models, "mlp", 3))
    server = start_server(f"--models-dir={models}", "--default-model=mlp", "--versions=1")

    def admin(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "serve.admin", words[0], "--target", server.target, *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    status, text = admin("status")
    assert status == 0
    assert [line.split()[:4] for line in text.splitlines()[1:]] == [
        ["mlp", "1", "ready", "100.0%"], ["mlp", "2", "unloaded", "0.0%"], ["mlp", "3", "unloaded", "0.0%"],
    ]  # fmt: skip
    assert admin("load", "mlp", "--version", "2")[0] == 0
    assert " 2  ready     25.0%" in admin("set-default", "mlp", "--version", "1", "--canary", "2", "--share", "0.25")[1]
    assert " 1  ready    100.0%" in admin("rollback", "mlp")[1]
    assert " 2  unloaded" in admin("unload", "mlp", "--version", "2")[1].replace("draining", "unloaded")
    status, text = admin("load", "mlp", "--version", "3")
    assert status == 1
    assert text.count("\n") == 1
    assert "FAILED_PRECONDITION: model mlp/3 on cpu: golden sample" in text
    assert " 3  failed" in admin("status", "mlp")[1]


def test_a_server_that_serves_nothing_can_be_administered_and_its_health_listed(
    models: Path, start_server: Callable[..., ServerProcess]
) -> None:
    """Issue: the client's own health checking made the first load impossible, and status when it is needed most."""
    server = start_server(f"--models-dir={models}", "--versions=1")

    def administer(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "serve.admin", *words, f"--target={server.target}", "--timeout=30"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    names = {path.name for path in models.iterdir() if path.is_dir()}
    for name in names:
        assert administer("unload", name).returncode == 0
    with grpc.insecure_channel(server.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def serving() -> set[str]:
            listed = stub.List(health_pb2.HealthListRequest()).statuses
            return {name for name, each in listed.items() if each.status == health_pb2.HealthCheckResponse.SERVING}

        wait_until(lambda: "digits.v1.DigitGenerator" not in serving())
        status = administer("status")
        assert status.returncode == 0, status.stderr
        assert "unloaded" in status.stdout
        assert administer("load", sorted(names)[0]).returncode == 0
        wait_until(lambda: {"digits.v1.DigitGenerator", "liveness"} <= serving())


def test_tritons_client_lists_loads_and_unloads(
    models: Path, start_server: Callable[..., ServerProcess], by_triton: Callable[[str, str], dict[str, Any]]
) -> None:
    add_version(models, "mlp", 2)
    server = start_server(f"--models-dir={models}", "--default-model=mlp", "--versions=1")
    seen = by_triton("triton_administrator.py", server.target)
    served = {"name": "mlp", "version": "1", "state": "READY"}
    unloaded = {"name": "mlp", "version": "2", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert seen["index"] == [served, unloaded]
    assert seen["ready_after_unload"] is False
    assert seen["state_after_unload"] in ("UNAVAILABLE", "UNLOADING")
    assert seen["ready_after_load"] is True
    assert seen["unknown"][0] == "StatusCode.FAILED_PRECONDITION"
    assert seen["config"] == ["StatusCode.INVALID_ARGUMENT", seen["config"][1]]
    assert "parameters: 'config' is unknown" in seen["config"][1]
