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
from tests.deploy.relations.kserve import complaints, deployments
from tests.deploy.relations.objects import selects
from tests.deploy.test_relations import find, put
from tests.server_process import ServerProcess
from tests.waiting import wait_until

PYTHON, PEER = "build/integrations/bin/python", "tests/deploy/kserve_peer.py"


def called(*words: str) -> dict[str, Any]:
    done = subprocess.run([PYTHON, PEER, *words], capture_output=True, text=True, timeout=240, check=False)
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


@pytest.mark.timeout(600)
def test_kserves_client_is_answered_as_by_kserves_own_server(tmp_path: Path) -> None:
    [container] = containers(of_kind("kserve", "ServingRuntime"))
    shutil.copytree(BUNDLED_DIR / "mlp", tmp_path / "models")  # as KServe lays out pvc://digits-models/mlp
    flags = [f"--models-dir={tmp_path / 'models'}" if each.startswith("--models-dir") else each for each in container["args"]]
    server = ServerProcess(*flags, "--instances=2", "--grpc-port=0")
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


FOLDERS = ("kserve", "monitoring", "jobs/models-volume")


def together() -> list[dict[str, Any]]:
    return [item for folder in FOLDERS for item in rendered(folder)]


def test_kserves_pods_fit_together_with_what_is_around_them() -> None:
    assert len(list(deployments(together()))) == len(list(BUNDLED_DIR.iterdir()))
    assert complaints(together()) == []


def runtime(*path: Any, value: Any) -> Callable[[Any], None]:
    """Sets what lies at a path below the runtime's container."""
    return lambda items: put("spec", "containers", 0, *path, value=value)(find(items, "ServingRuntime"))


def flag(given: str, *others: str) -> Callable[[Any], None]:
    """Puts other flags in the place of one of the runtime's."""

    def change(items: Any) -> None:
        arguments = find(items, "ServingRuntime")["spec"]["containers"][0]["args"]
        arguments.remove(given)
        arguments.extend(others)

    return change


BREAKAGES: dict[str, Callable[[Any], None]] = {
    "ready without a model": runtime("readinessProbe", "grpc", "service", value="liveness"),
    "an empty volume is an error": flag("--wait-for-models"),
    "connections that stay": flag("--max-connection-age-s=300", "--max-connection-age-s=0"),
    "no load reports": flag("--load-reports", "--load-reports=false"),
    "refusing at once": flag("--drain-grace-s=5", "--drain-grace-s=0"),
    "no preStop": runtime("lifecycle", "preStop", value={}),
    "liveness that does not wait for a drain": runtime("livenessProbe", "failureThreshold", value=2),
    "64 MiB": runtime("resources", value={"requests": {"cpu": "2", "memory": "64Mi"}, "limits": {"memory": "64Mi"}}),
    "another port": runtime("ports", 0, "containerPort", value=50052),
    "another folder": flag("--models-dir=/mnt/models", "--models-dir=/mnt/model"),
    "the image of another tag": runtime("image", value="digits-serve:latest"),
    "any node": lambda items: find(items, "ServingRuntime")["spec"].pop("nodeSelector"),
    "a writable root": runtime("securityContext", "readOnlyRootFilesystem", value=False),
    "reflection": flag("--reflection=false", "--reflection"),
    "half a minute to end": lambda items: put("spec", "predictor", "terminationGracePeriodSeconds", value=30)(
        find(items, "InferenceService", "mlp")
    ),
    "an account's token": lambda items: find(items, "InferenceService", "mlp")["spec"]["predictor"].pop(
        "automountServiceAccountToken"
    ),
    "pods without a policy": lambda items: find(items, "InferenceService", "mlp")["spec"]["predictor"]["labels"].pop(
        "app.kubernetes.io/component"
    ),
    "a policy of nobody": lambda items: put("spec", "podSelector", "matchLabels", value={"app.kubernetes.io/component": "x"})(
        find(items, "NetworkPolicy", "digits-serve-kserve")
    ),
    "everybody is let in": lambda items: find(items, "NetworkPolicy", "digits-serve-kserve")["spec"]["ingress"].append({}),
    "scaled to none": lambda items: put("spec", "predictor", "minReplicas", value=0)(find(items, "InferenceService", "mlp")),
    "another claim": lambda items: put("spec", "predictor", "model", "storageUri", value="pvc://models/mlp")(
        find(items, "InferenceService", "mlp")
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_breakage_is_found(breakage: str) -> None:
    items = together()
    BREAKAGES[breakage](items)
    assert complaints(items)


def test_every_pod_is_told_apart_from_others_and_from_the_overlays() -> None:
    predictors = [item["spec"]["predictor"] for item in rendered("kserve") if item["kind"] == "InferenceService"]
    assert len({each["labels"]["app.kubernetes.io/instance"] for each in predictors}) == len(predictors)
    services = [item["spec"]["selector"] for item in rendered("overlays/cpu") if item["kind"] == "Service"]
    assert not any(selects(selector, each["labels"]) for selector in services for each in predictors)


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
