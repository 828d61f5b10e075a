"""The ServingRuntime's own command, called by KServe's client, beside KServe's own server called the same way."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.client import DigitClient
from serve.manifest import BUNDLED_DIR
from tests.certificates import Certificates
from tests.deploy.manifests import containers, of_kind, rendered, settings_of
from tests.deploy.relations.network import CALLER, DNS, NEIGHBOUR, PROMETHEUS, STRANGERS, is_let
from tests.deploy.relations.objects import selects
from tests.deploy.relations.table import failing_s, memory_complaints, stopping_s
from tests.server_process import ServerProcess
from tests.waiting import wait_until

PYTHON, PEER = "build/integrations/bin/python", "tests/deploy/kserve_peer.py"


def called(*words: str) -> dict[str, Any]:
    done = subprocess.run([PYTHON, PEER, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@contextmanager
def kserves_own() -> Iterator[tuple[str, str]]:
    """Its addresses: gRPC's, and REST's."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as another:
        ports = [free.getsockname()[1] for free in (one, another)]
    command = [PYTHON, PEER, "serve", *map(str, ports)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: all(map(listens, ports)))
            yield f"localhost:{ports[0]}", f"http://localhost:{ports[1]}"
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
        target, http_port = f"localhost:{server.target.rpartition(':')[2]}", server.http.rpartition(":")[2]
        ours = called("call", target), called("rest", f"http://localhost:{http_port}")
        with kserves_own() as (other, rest):
            theirs = called("call", other), called("rest", rest)
        rows = np.linspace(-2, 2, 3 * 64, dtype=np.float32).reshape(3, 64)
        with DigitClient(target) as client:
            digits = client.generate(latents=rows, model="mlp").pixels.astype(int)
        for our, their in zip(ours, theirs, strict=True):
            pixels = np.array(our.pop("pixels"))
            assert np.array(their.pop("pixels")).shape == pixels.shape
            assert our == their
            assert int(np.abs(pixels - digits).max()) <= 1
        assert "digits_images_total" in server.get("/metrics")[1]
    finally:
        server.kill()


def test_kserves_rest_client_gets_digits_over_tls_with_a_token(tmp_path: Path, add_token: Callable[..., str]) -> None:
    tokens, token, certificates = tmp_path / "tokens.json", add_token("kserve"), Certificates(tmp_path)
    server = ServerProcess(*certificates.flags, f"--tokens-file={tokens}")
    try:
        seen = called("rest", f"https://localhost:{server.https.rpartition(':')[2]}", str(certificates.ca), token)
        assert np.array(seen.pop("pixels")).shape == (3, 28, 28)
        assert (seen["live"], seen["ready"], seen["model ready"], seen["both forms"]) == (True, True, True, True)
        assert (seen["unknown model"], seen["without a token"]) == (404, 401)
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


def test_kserves_pods_are_watched_and_let_in_as_the_overlays_are() -> None:
    [container], policy = containers(of_kind("kserve", "ServingRuntime")), of_kind("kserve", "NetworkPolicy")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    of_monitor = of_kind_named("monitoring", "PodMonitor", "digits-serve")["spec"]
    settings = settings_of(rendered("kserve"), container)
    assert settings.metrics
    assert settings.load_reports
    assert 0 < settings.max_connection_age_s <= 600
    instances = set()
    for item in rendered("kserve"):
        if item["kind"] != "InferenceService":
            continue
        labels = item["spec"]["predictor"]["labels"]
        instances.add(labels["app.kubernetes.io/instance"])
        assert selects(of_monitor["selector"], labels)
        assert selects(policy["spec"]["podSelector"], labels)
        assert not any(  # no traffic of an overlay beside it comes here
            selects(each["spec"]["selector"], labels) for each in rendered("overlays/cpu") if each["kind"] == "Service"
        )
    assert len(instances) == len(list(BUNDLED_DIR.iterdir()))
    assert of_monitor["podMetricsEndpoints"][0]["port"] in ports
    for peer in (CALLER, NEIGHBOUR, PROMETHEUS, *STRANGERS):
        wanted = set() if peer in STRANGERS else {"http"} if peer is PROMETHEUS else {"h2c", "http"}
        assert {name for name, number in ports.items() if is_let([policy], "Ingress", peer, ports, number)} == wanted, peer.name
    assert is_let([policy], "Egress", DNS, {}, 53, protocol="UDP")
    assert not any(is_let([policy], "Egress", peer, {}, 443) for peer in STRANGERS)


def of_kind_named(folder: str, kind: str, name: str) -> dict[str, Any]:
    [found] = [item for item in rendered(folder) if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


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
    settings = settings_of(rendered("kserve"), container)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"h2c": settings.grpc_port, "http": settings.http_port}
    assert next(iter(ports)) == "h2c", "what KServe routes to is as it was"
    assert container["readinessProbe"]["grpc"]["port"] == settings.grpc_port
    assert (settings.http_api, settings.page) == (True, False)
    assert runtime["spec"]["annotations"] == {
        "prometheus.kserve.io/port": str(settings.http_port),
        "prometheus.kserve.io/path": "/metrics",
    }
    assert set(runtime["spec"]["protocolVersions"]) == {"v2", "grpc-v2"}
    for item in rendered("kserve"):
        if item["kind"] == "InferenceService":
            assert item["metadata"]["annotations"]["serving.kserve.io/enable-prometheus-scraping"] == "true"
