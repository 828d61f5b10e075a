"""The ServingRuntime's own command, called by KServe's client, beside KServe's own server called the same way."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.client import DigitClient
from serve.manifest import BUNDLED_DIR
from tests.deploy.manifests import containers, of_kind, rendered, settings_of
from tests.deploy.relations import failing_s, memory_complaints, stopping_s
from tests.server_process import ServerProcess
from tests.waiting import wait_until

PYTHON, PEER = "build/integrations/bin/python", "tests/deploy/kserve_peer.py"


def called(target: str) -> dict[str, Any]:
    done = subprocess.run([PYTHON, PEER, "call", target], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@contextmanager
def kserves_own() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([PYTHON, PEER, "serve", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: listens(port))
            yield f"localhost:{port}"
        finally:
            process.terminate()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.timeout(180)
def test_kserves_client_is_answered_as_by_kserves_own_server(tmp_path: Path) -> None:
    [container] = containers(of_kind("kserve", "ServingRuntime"))
    shutil.copytree(BUNDLED_DIR / "mlp", tmp_path / "models")  # as KServe lays out pvc://digits-models/mlp
    flags = [f"--models-dir={tmp_path / 'models'}" if each.startswith("--models-dir") else each for each in container["args"]]
    server = ServerProcess(*flags, "--provider=cpu", "--instances=2", "--grpc-port=0")
    try:
        target = f"localhost:{server.target.rpartition(':')[2]}"
        ours = called(target)
        with kserves_own() as other:
            theirs = called(other)
        pixels = np.array(ours.pop("pixels"))
        assert np.array(theirs.pop("pixels")).shape == pixels.shape
        assert ours == theirs
        rows = np.linspace(-2, 2, 3 * 64, dtype=np.float32).reshape(3, 64)
        with DigitClient(target) as client:
            assert int(np.abs(pixels - client.generate(latents=rows, model="mlp").pixels.astype(int)).max()) <= 1
    finally:
        server.kill()


def test_a_pod_of_kserves_has_the_memory_and_the_time_to_stop_that_the_server_takes() -> None:
    [container] = containers(of_kind("kserve", "ServingRuntime"))
    settings = settings_of(rendered("kserve"), container)
    assert list(memory_complaints(container, settings)) == []
    assert failing_s(container["livenessProbe"]) >= stopping_s(settings)
    longest_s = container["lifecycle"]["preStop"]["sleep"]["seconds"] + stopping_s(settings)
    for item in rendered("kserve"):
        if item["kind"] == "InferenceService":
            assert item["spec"]["predictor"]["terminationGracePeriodSeconds"] >= longest_s


def test_there_is_an_inference_service_for_every_bundled_model() -> None:
    services = {
        item["metadata"]["name"]: item["spec"]["predictor"] for item in rendered("kserve") if item["kind"] == "InferenceService"
    }
    assert set(services) == {path.name for path in BUNDLED_DIR.iterdir() if path.is_dir()}
    runtime = of_kind("kserve", "ServingRuntime")
    formats = [(each["name"], each["version"]) for each in runtime["spec"]["supportedModelFormats"]]
    for name, predictor in services.items():
        model = predictor["model"]
        assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
        assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
        assert model["runtime"] == runtime["metadata"]["name"]
        assert model["storageUri"] == f"pvc://digits-models/{name}"
    [container] = containers(runtime)
    assert container["ports"][0]["containerPort"] == container["readinessProbe"]["grpc"]["port"] == 50051
