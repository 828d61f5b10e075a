"""What deploy/ holds is valid by the platform's own tools, and true of the program."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from export.cli import build_parser as export_parser
from export.watch import WatchMetrics
from serve.api.digits_v1 import SERVICE
from serve.config.settings import Settings, env_name, from_arguments
from serve.dataset import main as dataset_main
from serve.observability.metrics import Metrics
from serve.runtime.health import LIVENESS
from serve.runtime.server import DRAIN_OVERHEAD_S
from tests.deploy.tools import run
from tests.server_process import ServerProcess
from train.cli import build_parser as train_parser

DEPLOY = Path("deploy")
OVERLAYS = ("overlays/cpu", "overlays/gpu", "overlays/dev")
JOBS = ("jobs/train", "jobs/export", "jobs/dataset")
FOLDERS = (*OVERLAYS, *JOBS, "jobs/models-volume", "parity-watch", "parity-watch-secure", "monitoring")
KUBERNETES = ("1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
LOOSE = ("jobs/train-pytorchjob.yaml", "monitoring/keda-scaledobject.yaml")  # alternatives, in no kustomization

# What a custom resource must have, by its own published schema: group and version, and the fields it requires.
CUSTOM = {
    "PodMonitor": ("monitoring.coreos.com/v1", {"selector", "podMetricsEndpoints"}),
    "PrometheusRule": ("monitoring.coreos.com/v1", {"groups"}),
    "ScaledObject": ("keda.sh/v1alpha1", {"scaleTargetRef", "triggers"}),
    "PyTorchJob": ("kubeflow.org/v1", {"pytorchReplicaSpecs"}),
}
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


@cache
def rendered(folder: str) -> list[dict[str, Any]]:
    """A kustomization's objects."""
    done = run("kubectl", "kustomize", str(DEPLOY / folder))
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def everything() -> Iterator[tuple[str, dict[str, Any]]]:
    for folder in FOLDERS:
        for item in rendered(folder):
            yield folder, item
    for name in LOOSE:
        yield name, yaml.safe_load((DEPLOY / name).read_text())


def of_kind(folder: str, kind: str) -> dict[str, Any]:
    [item] = [item for item in rendered(folder) if item["kind"] == kind]
    return item


def containers(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The containers of a workload, whatever its kind."""
    return [container for pod in pod_specs(item) for container in pod["containers"]]


def pod_specs(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pods of a workload, whatever its kind."""
    spec = item.get("spec", {})
    templates = [spec.get("template")] + [each["template"] for each in spec.get("pytorchReplicaSpecs", {}).values()]
    return [template["spec"] for template in templates if template]


def settings_of(folder: str) -> Settings:
    """The settings a server in that overlay starts with."""
    data = {}
    for item in rendered(folder):
        if item["kind"] == "ConfigMap":
            data |= item["data"]
    return from_arguments([], data)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_valid(folder: str, version: str, tmp_path: Path) -> None:
    known = [item for item in rendered(folder) if item["kind"] not in CUSTOM]
    path = tmp_path / "objects.yaml"
    path.write_text(yaml.safe_dump_all(known))
    done = run("kubernetes-validate", "--strict", "--quiet", "-k", version, str(path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "dev"])
def test_the_page_is_off_unless_it_is_enabled(overlay: str) -> None:
    assert not settings_of(f"overlays/{overlay}").page


def complaints(items: Iterable[Mapping[str, Any]], folder: Path) -> list[str]:
    """What the published schemas of the Prometheus operator and KEDA say against them."""
    script = folder / "validate.mjs"
    shutil.copyfile("tests/deploy/validate_custom.mjs", script)
    (folder / "node_modules").symlink_to(Path("build/crd-schemas/node_modules").resolve())
    lines = "\n".join(json.dumps(item) for item in items)
    done = subprocess.run(["node", str(script)], input=lines, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_custom_resources_hold_to_their_published_schemas(tmp_path: Path) -> None:
    items = [item for _, item in everything() if item["kind"] in CUSTOM and item["kind"] != "PyTorchJob"]
    assert {item["kind"] for item in items} == {"PodMonitor", "PrometheusRule", "ScaledObject"}
    assert complaints(items, tmp_path) == []


def test_the_schemas_find_what_is_wrong(tmp_path: Path) -> None:
    [rule] = [item for _, item in everything() if item["kind"] == "PrometheusRule"]
    spoiled = json.loads(json.dumps(rule))
    spoiled["spec"]["groups"][0]["rules"][0]["expr"] = None
    [complaint] = complaints([spoiled], tmp_path)
    assert "/expr must be" in complaint


def test_custom_resources_have_what_their_schemas_require() -> None:
    seen = set()
    for where, item in everything():
        if item["kind"] in CUSTOM:
            version, required = CUSTOM[item["kind"]]
            assert item["apiVersion"] == version, where
            assert required <= item["spec"].keys(), where
            seen.add(item["kind"])
    assert seen == set(CUSTOM)


def test_checkov_finds_nothing_beyond_what_is_left_out_for_a_reason(tmp_path: Path) -> None:
    for folder in FOLDERS:
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


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_environment_is_the_programs_own_and_ports_and_probes_are_there(folder: str) -> None:
    known = {env_name(name) for name in Settings.__dataclass_fields__}
    for item in rendered(folder):
        if item["kind"] == "ConfigMap":
            assert item["data"].keys() <= known
    settings = settings_of(folder)
    [container] = containers(of_kind(folder, "Deployment"))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": settings.grpc_port, "http": settings.http_port}
    health = {"", SERVICE, LIVENESS}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if settings.tls_cert is None:
            assert container[probe]["grpc"]["port"] == settings.grpc_port
            assert container[probe]["grpc"]["service"] in health
        else:  # the kubelet's gRPC probes speak plaintext
            assert "grpc" not in container[probe]
            assert container[probe]["httpGet"]["path"] in ("/readyz", "/healthz")
    mounts = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
    for path in (settings.tls_cert, settings.tls_key, settings.tls_client_ca, settings.tokens_file):
        assert path is None or str(path.parent) in mounts
    assert settings.insecure == (settings.tls_cert is None)


@pytest.mark.parametrize("folder", OVERLAYS)
def test_draining_fits_into_the_grace_period(folder: str) -> None:
    settings = settings_of(folder)
    pod = of_kind(folder, "Deployment")["spec"]["template"]["spec"]
    asleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    longest = asleep + settings.drain_grace_s + settings.drain_deadline_s + DRAIN_OVERHEAD_S
    assert longest <= pod["terminationGracePeriodSeconds"]


def test_pods_are_restricted_and_memory_and_gpus_are_guaranteed() -> None:
    for where, item in everything():
        for container in containers(item):
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True, where
            assert security["allowPrivilegeEscalation"] is False, where
            assert security["capabilities"]["drop"] == ["ALL"], where
            resources = container["resources"]
            for name in resources["limits"]:
                assert resources["requests"][name] == resources["limits"][name], (where, name)
            assert "memory" in resources["limits"], where


def test_every_command_line_is_one_that_the_program_takes() -> None:
    parsers = {"train": train_parser(), "export": export_parser()}
    checked = 0
    for where, item in everything():
        for container in containers(item):
            if "command" not in container:
                continue
            module = container["command"][-1]
            if module == "serve.dataset":
                continue  # below
            parsers[module].parse_args(container["args"])
            checked += 1
            assert where
    assert checked == 6


def test_every_image_is_one_that_make_image_builds() -> None:
    """Issue: it built digits-train, and every manifest asked for digits-serve-train."""
    built = set()
    for arguments in ("RUNTIME=cpu", "RUNTIME=gpu", "IMAGE_TARGET=train"):
        lines = subprocess.run(["make", "-n", "image", arguments], capture_output=True, text=True, check=True).stdout
        built |= set(re.findall(r"name=(\S+);", lines))
    assert len(built) == 3
    wanted = {container["image"] for _, item in everything() for container in containers(item)}
    assert wanted <= built, f"nobody builds {sorted(wanted - built)}"
    assert built <= wanted


def test_pods_with_gpus_are_let_onto_the_nodes_that_keep_others_out() -> None:
    seen = 0
    for where, item in everything():
        for pod in pod_specs(item):
            wants = any("nvidia.com/gpu" in container["resources"]["limits"] for container in pod["containers"])
            tolerates = any(each["key"] == "nvidia.com/gpu" for each in pod.get("tolerations", ()))
            assert wants == tolerates, (where, item["metadata"]["name"])
            seen += wants
    assert seen == 4, "the server, the training job, and the training operator's two"


def test_a_roll_needs_no_gpu_more_than_there_are() -> None:
    rolling = of_kind("overlays/gpu", "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert (rolling["maxSurge"], rolling["maxUnavailable"]) == (0, 1)
    rolling = of_kind("overlays/cpu", "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert (rolling["maxSurge"], rolling["maxUnavailable"]) == (1, 0)


@pytest.mark.parametrize("folder", JOBS)
def test_an_eviction_is_no_failure_of_a_job(folder: str) -> None:
    spec = of_kind(folder, "Job")["spec"]
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "Ignore"
    assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "the API server wants it beside a failure policy"


def test_the_readmes_kubectl_commands_name_what_is_there() -> None:
    commands = re.findall(r"kubectl apply .*?-([fk]) (\S+)", (DEPLOY / "README.md").read_text())
    assert len(commands) > 7
    for flag, path in commands:
        assert (Path(path) / "kustomization.yaml").exists() if flag == "k" else Path(path).is_file(), path
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
    assert "10 digits by cdcgan/1" in capsys.readouterr().out


def queries() -> Iterator[tuple[str, str]]:
    """Every PromQL expression, and where it stands."""
    rules = yaml.safe_load((DEPLOY / "monitoring" / "prometheusrule.yaml").read_text())
    for group in rules["spec"]["groups"]:
        for rule in group["rules"]:
            yield rule.get("record") or rule["alert"], rule["expr"]
    for panel in json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    keda = yaml.safe_load((DEPLOY / "monitoring" / "keda-scaledobject.yaml").read_text())
    yield "keda", keda["spec"]["triggers"][0]["metadata"]["query"]
    autoscaler = of_kind("overlays/cpu", "HorizontalPodAutoscaler")
    yield "autoscaler", autoscaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    adapter = yaml.safe_load((DEPLOY / "monitoring" / "prometheus-adapter.yaml").read_text())
    yield "adapter", adapter["rules"]["custom"][0]["seriesQuery"]


def test_every_metric_that_is_asked_for_is_exported_or_recorded(shared_server: ServerProcess) -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    WatchMetrics(registry)
    exported = {"up"}
    for family in (*registry.collect(), *text_string_to_metric_families(shared_server.get("/metrics")[1])):
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}.get(family.type, [""])
        exported |= {family.name.removesuffix("_total") + suffix for suffix in suffixes}
    recorded = {name for name, _ in queries() if ":" in name}
    asked = 0
    for where, expression in queries():
        bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)|on \([^)]*\)', "", expression)
        for name in re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare):
            if re.fullmatch(r"(digits|grpc_server|process)_\w+|digits:[\w:]+|up", name):
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
    rules = yaml.safe_load((DEPLOY / "monitoring" / "prometheusrule.yaml").read_text())
    for group in rules["spec"]["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                anchor = rule["annotations"]["runbook"].partition("#")[2]
                assert f"### {anchor}" in text


def test_serving_in_the_image_needs_nothing_that_is_not_locked() -> None:
    code = "import serve.cli, serve.client, serve.admin, serve.dataset, serve.access.tokens, sys; print(*sys.modules)"
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
