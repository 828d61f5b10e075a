"""What ``deploy/`` renders to, and the sets of it that live together in a namespace."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from serve.settings import Settings, from_arguments
from tests.deploy.tools import run

DEPLOY = Path("deploy")
OVERLAYS = ("overlays/cpu", "overlays/gpu", "overlays/dev")
JOBS = ("jobs/train", "jobs/export", "jobs/dataset")
WITH_COMPONENTS = {
    "overlays/cpu + components/keda": ("overlays/cpu", "components/keda"),
    "overlays/cpu + components/http-api": ("overlays/cpu", "components/http-api"),
    "overlays/cpu + components/models-image": ("overlays/cpu", "components/models-image"),
    "overlays/cpu + components/serving-file": ("overlays/cpu", "components/serving-file"),
    "overlays/gpu + components/gateway": ("overlays/gpu", "components/gateway"),
    "overlays/gpu + components/https-api": ("overlays/gpu", "components/https-api"),
}
FOLDERS = (
    *OVERLAYS, *JOBS, "jobs/trainjob", "jobs/models-volume", "parity-watch", "parity-watch-secure", "monitoring", "kserve",
    *WITH_COMPONENTS,
)  # fmt: skip
EVERYWHERE = ("monitoring", "jobs/models-volume", *JOBS)
# What is applied to one namespace, as deploy/README.md says.
TOGETHER: Mapping[str, Sequence[str]] = {
    "cpu, dev and the parity watch": ("overlays/cpu", "overlays/dev", "parity-watch", *EVERYWHERE),
    "gpu and the parity watch": ("overlays/gpu", "parity-watch-secure", "jobs/trainjob", *EVERYWHERE),
    "cpu with KEDA": ("overlays/cpu + components/keda", "parity-watch", *EVERYWHERE),
    "gpu behind a gateway": ("overlays/gpu + components/gateway", *EVERYWHERE),
    "cpu with the HTTP API": ("overlays/cpu + components/http-api", *EVERYWHERE),
    "gpu with the HTTP API over TLS": ("overlays/gpu + components/https-api", "parity-watch-secure", *EVERYWHERE),
    "cpu with a serving file": ("overlays/cpu + components/serving-file", *EVERYWHERE),
    "cpu with models from an image": ("overlays/cpu + components/models-image", *EVERYWHERE),
}

Object = dict[str, Any]


@cache
def _rendered(folder: str) -> list[Object]:
    if folder not in WITH_COMPONENTS:
        done = run("kubectl", "kustomize", str(DEPLOY / folder))
    else:
        overlay, component = WITH_COMPONENTS[folder]
        Path("build").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir="build") as scratch:  # beside deploy/, as an overlay of one's own would be
            kustomization = {"resources": [f"../../deploy/{overlay}"], "components": [f"../../deploy/{component}"]}
            (Path(scratch) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
            done = run("kubectl", "kustomize", scratch)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def rendered(folder: str) -> list[Object]:
    """A kustomization's objects, to do with as one likes."""
    return copy.deepcopy(_rendered(folder))


def together(name: str) -> list[Object]:
    """The objects of one of ``TOGETHER``."""
    return [item for folder in TOGETHER[name] for item in rendered(folder)]


def everything() -> Iterator[tuple[str, Object]]:
    for folder in FOLDERS:
        for item in rendered(folder):
            yield folder, item


def of_kind(folder: str, kind: str) -> Object:
    [item] = [item for item in rendered(folder) if item["kind"] == kind]
    return item


def pod_templates(item: Mapping[str, Any]) -> list[Object]:
    """The pods of a workload, whatever its kind: ``metadata`` and ``spec`` of each."""
    spec = item.get("spec", {})
    if item["kind"] == "TrainingRuntime":
        return [each["template"]["spec"]["template"] for each in spec["template"]["spec"]["replicatedJobs"]]
    if item["kind"] == "ServingRuntime":
        return [{"metadata": {}, "spec": spec}]
    return [spec["template"]] if "template" in spec else []


def pod_specs(item: Mapping[str, Any]) -> list[Object]:
    return [template["spec"] for template in pod_templates(item)]


def containers(item: Mapping[str, Any]) -> list[Object]:
    return [container for pod in pod_specs(item) for container in pod["containers"]]


def settings_of(items: Sequence[Object], container: Mapping[str, Any]) -> Settings:
    """The settings that a server in this container starts with."""
    data: dict[str, str] = {}
    maps = {item["metadata"]["name"]: item["data"] for item in items if item["kind"] == "ConfigMap"}
    for source in container.get("envFrom", ()):
        data |= maps[source["configMapRef"]["name"]]
    own = [each for each in container.get("env", ()) if each["name"].startswith("DIGITS_") and "value" in each]
    data |= {each["name"]: each["value"] for each in own}
    return from_arguments(container.get("args", []), data)
