"""What deploy/ holds is valid by the platform's own tools, and true of the program."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from export.cli import build_parser as export_parser
from export.watch import WatchMetrics
from serve.dataset.command import main as dataset_main
from serve.observability.metrics import Metrics
from tests.deploy.manifests import (
    DEPLOY,
    FOLDERS,
    JOBS,
    OWN,
    TOGETHER,
    containers,
    everything,
    examples,
    of_kind,
    rendered,
    settings_of,
)
from tests.deploy.tools import run
from tests.server_process import ServerProcess
from train.cli import build_parser as train_parser

# From the least that is stated in deploy/README.md on.
KUBERNETES = ("1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
LEAST = {"cpu with models from an image": "1.33"}

# Custom resources, and who has their published schemas: npm's @kubernetes-models, or the makers' own Python packages.
BY_NODE = {"PodMonitor", "PrometheusRule", "ScaledObject", "GRPCRoute", "BackendTLSPolicy", "Certificate", "Gateway"}
BY_PYTHON = {"ServingRuntime", "InferenceService", "TrainingRuntime", "TrainJob"}
CUSTOM = BY_NODE | BY_PYTHON
# Checks that are left out, and why.
SKIPPED_CHECKS = {
    "CKV_K8S_43": "images are named by tag here; a digest is the registry's, and kustomize edit set image puts it in",
    "CKV_K8S_11": "no CPU limit on purpose: throttling costs callers latency, and the request guarantees the share",
    "CKV_K8S_15": "imagePullPolicy IfNotPresent: tags are releases and do not move",
    "CKV_K8S_21": "the namespace is the platform's choice: kubectl apply -n",
    "CKV2_K8S_6": "there is a NetworkPolicy for each workload; jobs need none of their own",
    "CKV_DOCKER_2": "no HEALTHCHECK: Kubernetes probes the health service",
    "CKV_DOCKER_7": "the base image is a build argument with a fixed tag",
}


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_valid(folder: str, version: str, tmp_path: Path) -> None:
    known = [item for item in rendered(folder) if item["kind"] not in CUSTOM]
    if not known or version_of(version) < version_of(LEAST.get(folder, version)):
        assert folder in LEAST or folder in ("jobs/trainjob", "kserve", "monitoring")
        return
    path = tmp_path / "objects.yaml"
    path.write_text(yaml.safe_dump_all(known))
    done = run("kubernetes-validate", "--strict", "--quiet", "-k", version, str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_states_the_least_version_that_is_tried() -> None:
    assert f"Kubernetes {KUBERNETES[0]} or newer" in (DEPLOY / "README.md").read_text()


def test_every_component_is_tried_in_an_overlay() -> None:
    used = {component for _, components in OWN.values() for component in components}
    used |= {"components/models-volume", "components/watch-models-volume"}
    assert {f"components/{path.name}" for path in (DEPLOY / "components").iterdir()} == used
    tried = {folder for folders in TOGETHER.values() for folder in folders}
    assert set(FOLDERS) - tried == {"kserve"}, "KServe's objects stand by themselves"


def complaints(items: Iterable[Mapping[str, Any]], folder: Path) -> list[str]:
    """What the custom resources' published schemas say against them."""
    by_kind = [(item, item["kind"] in BY_NODE) for item in items]
    found = []
    for by_node in (True, False):
        lines = "\n".join(json.dumps(item) for item, asked in by_kind if asked is by_node)
        if not lines:
            continue
        if by_node:
            script = folder / "validate.mjs"
            shutil.copyfile("tests/deploy/validate_custom.mjs", script)
            if not (folder / "node_modules").exists():
                (folder / "node_modules").symlink_to(Path("build/schemas/node_modules").resolve())
            command = ["node", str(script)]
        else:
            command = ["build/integrations/bin/python", "tests/deploy/validate_custom.py"]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        found += done.stdout.splitlines()
    return found


def test_custom_resources_hold_to_their_published_schemas(tmp_path: Path) -> None:
    items = [item for _, item in everything() if item["kind"] in CUSTOM]
    items += [each for each in examples() if each["kind"] != "Kustomization"]
    assert {item["kind"] for item in items} == CUSTOM
    assert complaints(items, tmp_path) == []


SPOILED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "PrometheusRule": (("spec", "groups", 0, "rules", 0, "expr"), None),
    "GRPCRoute": (("spec", "rules", 0, "backendRefs", 0, "port"), 0),
    "ScaledObject": (("spec", "triggers"), None),
    "TrainingRuntime": (("spec", "mlPolicy", "numberOfNodes"), 2),
    "ServingRuntime": (("spec", "containers", 0, "images"), "x"),
    "InferenceService": (("spec", "predictor", "model", "modelFormats"), {}),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_the_schemas_find_what_is_wrong(kind: str, tmp_path: Path) -> None:
    spoiled = next(item for _, item in everything() if item["kind"] == kind)
    path, value = SPOILED[kind]
    place: Any = spoiled
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert any(str(path[-1]) in complaint for complaint in complaints([spoiled], tmp_path))


def test_checkov_finds_nothing_beyond_what_is_left_out_for_a_reason(tmp_path: Path) -> None:
    for folder in FOLDERS:
        if "OpenShift" in folder:
            continue  # which wants to choose the uid itself: CKV_K8S_40
        known = [item for item in rendered(folder) if item["kind"] not in CUSTOM]
        (tmp_path / f"{folder.replace('/', '-')}.yaml").write_text(yaml.safe_dump_all(known))
    (tmp_path / "Dockerfile").write_text((DEPLOY / "Dockerfile").read_text())
    skip = ",".join(SKIPPED_CHECKS)
    frameworks = ("--framework", "kubernetes", "dockerfile")
    done = run("checkov", "-d", str(tmp_path), *frameworks, "--quiet", "--compact", "--skip-check", skip, "-o", "json")
    reports = json.loads(done.stdout)
    for report in reports if isinstance(reports, list) else [reports]:
        failed = [(each["check_id"], each["check_name"], each["resource"]) for each in report["results"]["failed_checks"]]
        assert not failed
        assert report["summary"]["passed"] > 20 or report["check_type"] == "dockerfile"


def test_hadolint_finds_nothing() -> None:
    done = run("hadolint", str(DEPLOY / "Dockerfile"))
    assert done.returncode == 0, done.stdout


def test_every_command_line_is_one_that_the_program_takes() -> None:
    parsers = {"train": train_parser(), "export": export_parser()}
    checked = 0
    for where, item in everything():
        for container in containers(item):
            module = container.get("command", ["serve"])[-1]
            if module == "serve":
                settings_of(rendered(where), container)
            elif module != "serve.dataset":  # below
                parsers[module].parse_args(container["args"])
            checked += 1
    assert checked == 23


def test_the_readmes_kubectl_commands_name_what_is_there() -> None:
    text = (DEPLOY / "README.md").read_text()
    commands = [each for each in re.findall(r"kubectl (?:apply|delete) .*?-([fk]) (\S+)", text) if not each[1].startswith("own")]
    assert len(commands) > 7
    for flag, path in commands:
        assert (Path(path) / "kustomization.yaml").exists() if flag == "k" else Path(path).is_file(), path
    for line in "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines():
        assert "kubectl" not in line or "# (run)" in line or "# (cluster)" in line, f"has it been run? {line}"
    applied = {str(Path(path).relative_to(DEPLOY)) for _, path in commands}
    assert {*JOBS, "jobs/models-volume"} <= applied


def test_the_dataset_jobs_shards_are_its_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [job] = [item for item in rendered("jobs/dataset") if item["metadata"]["name"] == "digits-dataset"]
    assert job["spec"]["completionMode"] == "Indexed"
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[arguments.index("--shards") + 1] == str(job["spec"]["completions"])
    shown = [*arguments]
    shown[shown.index("--out") + 1] = str(tmp_path)
    shown[shown.index("--count") + 1] = "80"
    assert dataset_main(shown) == 0
    assert "10 digits by rpgan/1" in capsys.readouterr().out


def queries() -> Iterator[tuple[str, str]]:
    """Every PromQL expression, and where it stands."""
    rules = yaml.safe_load((DEPLOY / "monitoring" / "prometheusrule.yaml").read_text())
    for group in rules["spec"]["groups"]:
        for rule in group["rules"]:
            yield rule.get("record") or rule["alert"], rule["expr"]
    for panel in json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    keda = yaml.safe_load((DEPLOY / "components" / "keda" / "scaledobject.yaml").read_text())
    yield "keda", keda["spec"]["triggers"][0]["metadata"]["query"]
    autoscaler = of_kind("overlays/cpu", "HorizontalPodAutoscaler")
    yield "autoscaler", autoscaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    adapter = yaml.safe_load((DEPLOY / "monitoring" / "prometheus-adapter.yaml").read_text())
    yield "adapter", adapter["rules"]["custom"][0]["seriesQuery"]


def test_every_metric_that_is_asked_for_is_exported_or_recorded(shared_server: ServerProcess) -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    WatchMetrics(registry)
    hpa = "kube_horizontalpodautoscaler"
    exported = {"up", f"{hpa}_status_current_replicas", f"{hpa}_spec_max_replicas", f"{hpa}_status_condition"}
    exported |= {"keda_scaled_object_errors_total"}
    for family in (*registry.collect(), *text_string_to_metric_families(shared_server.get("/metrics")[1])):
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}.get(family.type, [""])
        exported |= {family.name.removesuffix("_total") + suffix for suffix in suffixes}
    recorded = {name for name, _ in queries() if ":" in name}
    asked = 0
    for where, expression in queries():
        bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)|on \([^)]*\)', "", expression)
        for name in re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare):
            if re.fullmatch(r"(digits|grpc_server|http_server|process|kube|keda)_\w+|deployment\w*:[\w:]+|up", name):
                asked += 1
                assert name in exported | recorded, f"{where} asks for {name}"
    assert asked > 50


def test_the_autoscaler_goes_by_a_gauge(shared_server: ServerProcess) -> None:
    name = of_kind("overlays/cpu", "HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    families = text_string_to_metric_families(shared_server.get("/metrics")[1])
    assert [family.type for family in families if family.name == name] == ["gauge"]


def test_the_locks_hold_versions_and_hashes_only_and_what_the_project_asks_for() -> None:
    for name in ("serve.txt", "cpu.txt", "gpu.txt", "cuda.txt", "train.txt"):
        lines = (DEPLOY / "requirements" / name).read_text().splitlines()
        for line in lines:
            assert re.fullmatch(r"[a-z0-9._-]+==[\w.+!]+( ; [^\\]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
    serve = (DEPLOY / "requirements" / "serve.txt").read_text()
    assert not re.search(r"^(torch|onnx|torchvision|onnxruntime\S*)==", serve, re.MULTILINE), "serving needs no torch"
    for name, package in (("cpu.txt", "onnxruntime"), ("gpu.txt", "onnxruntime-gpu")):
        assert re.search(rf"^{package}==1\.31\.", (DEPLOY / "requirements" / name).read_text(), re.MULTILINE)
    assert re.search(r"^torch==2\.15\.", (DEPLOY / "requirements" / "train.txt").read_text(), re.MULTILINE)


def test_every_alert_has_a_runbook_in_the_readme() -> None:
    text = (DEPLOY / "README.md").read_text().lower()
    for group in of_kind("monitoring", "PrometheusRule")["spec"]["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                url = rule["annotations"]["runbook_url"]
                assert re.match("https://[a-z.]+/", url), "kustomization.yaml puts it in"
                assert f"### {url.partition('#')[2]}" in text


def test_serving_in_the_image_needs_nothing_that_is_not_locked() -> None:
    code = "import serve.cli, serve.client, serve.admin, serve.dataset.command, serve.access.tokens, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in done.stdout.split()}
    locked = {
        normal_name(line.partition("==")[0])
        for name in ("serve", "gpu")
        for line in (DEPLOY / "requirements" / f"{name}.txt").read_text().splitlines()
        if "==" in line and not line.startswith(" ")
    }
    # What a venv imports when it starts, and what grpc takes along where it is installed.
    modules -= {"_distutils_hack", "grpc_tools"}
    seen = set()
    for module, distributions in packages_distributions().items():
        # A name that several distributions share, as google is, needs one of them.
        owners = {normal_name(each) for each in distributions} - {"digits-serve"}
        if module in modules and owners:
            assert owners & locked, f"{module} is of {owners}, and none of them is locked"
            seen |= owners & locked
    assert {"numpy", "grpcio", "onnxruntime-gpu", "aiohttp", "msgspec"} <= seen


def normal_name(distribution: str) -> str:
    """As the package index compares them (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
