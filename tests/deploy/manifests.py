"""What ``deploy/`` renders to, and the sets of it that live together in a namespace."""

from __future__ import annotations

import copy
import re
import shutil
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
# Overlays as deploy/README.md tells to write them: what they are above of, and their components.
OWN: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "cpu with KEDA": (("overlays/cpu",), ("components/keda",)),
    "cpu with models from an image": (("overlays/cpu",), ("components/models-image",)),
    "cpu with a serving file": (("overlays/cpu",), ("components/serving-file",)),
    "cpu on OpenShift": (
        ("overlays/cpu", "parity-watch"),
        ("components/tls", "components/tokens", "components/watch-access", "components/openshift"),
    ),
    "cpu with TLS, tokens and a watch": (
        ("overlays/cpu", "parity-watch"),
        ("components/tls", "components/tokens", "components/watch-access"),
    ),
    "cpu on spot nodes": (("overlays/cpu",), ("components/spot",)),
    "gpu behind a gateway": (("overlays/gpu",), ("components/gateway",)),
    "gpu with KEDA and certificates": (("overlays/gpu",), ("components/keda", "components/certificate")),
    "cpu with the HTTP API": (("overlays/cpu",), ("components/http-api",)),
    "gpu with the HTTP API over TLS": (("overlays/gpu", "parity-watch-secure"), ("components/https-api",)),
}
FOLDERS = (
    *OVERLAYS, *JOBS, "jobs/trainjob", "jobs/models-volume", "parity-watch", "parity-watch-secure", "monitoring", "kserve",
    *OWN,
)  # fmt: skip
EVERYWHERE = ("monitoring", "jobs/models-volume", *JOBS)
# What is applied to one namespace, as deploy/README.md says.
TOGETHER: Mapping[str, Sequence[str]] = {
    "cpu, dev and the parity watch": ("overlays/cpu", "overlays/dev", "parity-watch", *EVERYWHERE),
    "gpu and the parity watch": ("overlays/gpu", "parity-watch-secure", "jobs/trainjob", *EVERYWHERE),
    "all overlays and both watches": (*OVERLAYS, "parity-watch", "parity-watch-secure", "jobs/trainjob", *EVERYWHERE),
    "cpu with KEDA": ("cpu with KEDA", "parity-watch", *EVERYWHERE),
    **{name: (name, *EVERYWHERE) for name in OWN if name != "cpu with KEDA"},
}
PREFIX = "mine-"

Object = dict[str, Any]


@cache
def _rendered(folder: str) -> list[Object]:
    if folder in OWN:
        resources, components = OWN[folder]
        return kustomized(resources=resources, components=components)
    return _built(DEPLOY / folder)


def kustomized(
    *, resources: Sequence[str], components: Sequence[str] = (), below: Mapping[str, Any] | None = None, **fields: Any
) -> list[Object]:
    """The objects of an overlay of one's own, above folders of deploy/; ``below``: the fields of another one in between."""
    with tempfile.TemporaryDirectory() as scratch:
        deploy = Path(scratch) / "deploy"
        shutil.copytree(DEPLOY, deploy)  # an overlay of one's own lies beside it
        own = Path(scratch) / "own"
        own.mkdir()
        fields |= {"resources": [f"../deploy/{each}" for each in resources]}
        if below is not None:
            (Path(scratch) / "below").mkdir()
            (Path(scratch) / "below" / "kustomization.yaml").write_text(
                yaml.safe_dump({**below, "resources": fields["resources"]})
            )
            fields["resources"] = ["../below"]
        fields |= {"components": [f"../deploy/{each}" for each in components]}
        (own / "kustomization.yaml").write_text(yaml.safe_dump(fields))
        return _built(own)


def examples() -> list[Object]:
    """The objects in deploy/README.md's blocks of YAML."""
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)]


def _built(folder: Path) -> list[Object]:
    done = run("kubectl", "kustomize", str(folder))
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


@cache
def _prefixed(name: str) -> list[Object]:
    resources, components = [], []
    for folder in TOGETHER[name]:
        below, with_them = OWN.get(folder, ((folder,), ()))
        resources += below
        components += with_them
    return kustomized(resources=resources, components=components, namePrefix=PREFIX)


def prefixed(name: str) -> list[Object]:
    """The objects of one of ``TOGETHER`` from one kustomization, with a prefix before every name."""
    return copy.deepcopy(_prefixed(name))


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
    return [each for pod in pod_specs(item) for each in containers_of(pod)]


def containers_of(pod: Mapping[str, Any]) -> list[Object]:
    """Those that run before the others, and the others."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


def settings_of(items: Sequence[Object], container: Mapping[str, Any]) -> Settings:
    """The settings that a server in this container starts with."""
    data: dict[str, str] = {}
    maps = {item["metadata"]["name"]: item["data"] for item in items if item["kind"] == "ConfigMap"}
    for source in container.get("envFrom", ()):
        data |= maps[source["configMapRef"]["name"]]
    own = [each for each in container.get("env", ()) if each["name"].startswith("DIGITS_") and "value" in each]
    data |= {each["name"]: each["value"] for each in own}
    return _settings(tuple(container.get("args", [])), tuple(data.items()))


@cache
def _settings(arguments: Sequence[str], environment: Sequence[tuple[str, str]]) -> Settings:
    return from_arguments(arguments, dict(environment))
