"""What the platform makes of fields that look harmless: who can read a mount, when pods are rolled, who is scraped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from serve.api.digits_v1 import SERVICE
from serve.api.open_inference import SERVICE as INFERENCE
from serve.ports.health import HEALTH
from tests.deploy.manifests import DEPLOY, Object, containers, containers_of, examples, pod_specs, settings_of
from tests.deploy.relations.objects import claims_of, flags_of, labels_of, of, selects, servers, title, workloads
from tests.deploy.relations.promises import seconds

COUNTER = re.compile(r".*_(total|count|sum|bucket)")
# Of which flags each program writes into the folders, by words of its command line. The others read alone.
WRITES = {
    ("serve.dataset", "write"): ("--out",),
    ("export", "run"): ("--models-dir", "--runs-dir"),
    ("train",): ("--runs-dir", "--data-dir"),
}
# Callers get no answers, or wrong ones.
WAKING = {
    "DigitsDown", "DigitsNoModel", "DigitsModelNotReady", "DigitsErrorBudgetBurn", "DigitsErrorBudgetBurnSlow",
    "DigitsSelfCheckBreach", "DigitsParityBreach", "DigitsOnTheWrongProvider",
}  # fmt: skip
EVALUATED_S = 60
SAVING_S = 30  # a step under way, and the checkpoint
HASH = re.compile(r".*-[a-z0-9]{10}")


def secrets_are_readable_by_the_pods_user(items: Sequence[Object]) -> Iterator[str]:
    """A Secret's files are root's; the pod's group gets them by fsGroup. Without a uid of ours the platform chooses them."""
    for item in workloads(items):
        for pod in pod_specs(item):
            security = pod.get("securityContext", {})
            secret = any("secret" in volume for volume in pod.get("volumes", ()))
            if secret and "runAsUser" in security and security.get("fsGroup") != security.get("runAsGroup"):
                yield f"{title(item)} cannot read its Secrets"
            if "runAsUser" not in security and security.keys() & {"runAsGroup", "fsGroup"}:
                yield f"{title(item)} asks for a group where the platform chooses it"
            if security.get("runAsUser", 65532) == 0:
                yield f"{title(item)} runs as root"
    for item in servers(items):
        settings = settings_of(items, containers(item)[0])
        wanted = {"tls.crt": settings.tls_cert, "tls.key": settings.tls_key, "ca.crt": settings.tls_client_ca}
        for name, path in wanted.items():
            if path is not None and path.name != name:
                yield f"{title(item)} takes {path} for {name}"


def a_changed_setting_rolls_pods_and_a_changed_serving_file_does_not(items: Sequence[Object]) -> Iterator[str]:
    """By the hash in a ConfigMap's name: with it pods are made anew, without it the mounted file changes."""
    for item in servers(items):
        [pod], [container] = pod_specs(item), containers(item)
        for source in container["envFrom"]:
            if not HASH.fullmatch(source["configMapRef"]["name"]) or source["configMapRef"].get("optional"):
                yield f"{title(item)} keeps old settings, or starts without: {source}"
        mounted = [volume["configMap"]["name"] for volume in pod.get("volumes", ()) if "configMap" in volume]
        if any(HASH.fullmatch(name) for name in mounted):
            yield f"{title(item)} is rolled for what a running pod could follow: {mounted}"
        if item["spec"].get("revisionHistoryLimit", 10) < 2:
            yield f"{title(item)} cannot be rolled back"
        if pod.get("dnsPolicy", "ClusterFirst") != "ClusterFirst":
            yield f"{title(item)} asks a DNS that its policy does not let it reach"
        if any(each["whenUnsatisfiable"] != "ScheduleAnyway" for each in pod.get("topologySpreadConstraints", ())):
            yield f"{title(item)} stays Pending where zones or nodes are few"


def volumes_are_shared_by_those_who_need_them(items: Sequence[Object]) -> Iterator[str]:
    for claim in of(items, "PersistentVolumeClaim"):
        users = [item for item in workloads(items) if claim["metadata"]["name"] in claims_of(item)]
        if len(users) > 1 and claim["spec"]["accessModes"] != ["ReadWriteMany"]:
            yield f"{title(claim)} is for one node, and used by {[title(item) for item in users]}"


def volumes_are_writable_where_programs_write_and_nowhere_else(items: Sequence[Object]) -> Iterator[str]:
    for item in workloads(items):
        for pod in pod_specs(item):
            claims = {
                each["name"]: each["persistentVolumeClaim"] for each in pod.get("volumes", ()) if "persistentVolumeClaim" in each
            }
            for container in containers_of(pod):
                written = _written_by(container)
                for mount in container.get("volumeMounts", ()):
                    if mount["name"] not in claims:
                        continue
                    writable = not (mount.get("readOnly") or claims[mount["name"]].get("readOnly"))
                    if writable != any(path.is_relative_to(mount["mountPath"]) for path in written):
                        how = "may write" if writable else "cannot write"
                        yield f"{title(item)}: {container['name']} {how} to {mount['mountPath']}, and writes {written}"


def _written_by(container: Mapping[str, Any]) -> list[Path]:
    words, flags = {*container.get("command", ()), *container.get("args", ())}, flags_of(container)
    names = next((names for program, names in WRITES.items() if words.issuperset(program)), ())
    return [Path(flags[name]) for name in names if name in flags]


def rates_are_of_counters(items: Sequence[Object]) -> Iterator[str]:
    """In alerts and in what autoscalers go by: the rate of a gauge is about 0 while it is high, and moves nothing."""
    asked = [(f"{title(item)}: {name}", query) for item in items for name, query in _queries_of(item)]
    for rule in yaml.safe_load((DEPLOY / "monitoring" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]:
        series = rule["seriesQuery"].partition("{")[0]
        asked.append(("the adapter", rule["metricsQuery"].replace("<<.Series>>", series)))
    for who, query in asked:
        for function, metric in re.findall(r"\b(rate|irate|increase)\(\s*(\w+)", query):
            if not COUNTER.fullmatch(metric):
                yield f"{who} takes the {function} of {metric}, which is no counter"


def _queries_of(item: Object) -> Iterator[tuple[str, str]]:
    if item["kind"] == "PrometheusRule":
        for rule in (rule for group in item["spec"]["groups"] for rule in group["rules"]):
            yield rule.get("alert") or rule["record"], rule["expr"]
    if item["kind"] == "ScaledObject":
        yield from (("its trigger", trigger["metadata"]["query"]) for trigger in item["spec"]["triggers"])


def alerts_are_looked_at_often_and_wake_somebody(items: Sequence[Object]) -> Iterator[str]:
    for rule in of(items, "PrometheusRule"):
        for group in rule["spec"]["groups"]:
            if seconds(group.get("interval", "30s")) > EVALUATED_S:
                yield f"{group['name']} is evaluated every {group['interval']}"
        alerts = [each for group in rule["spec"]["groups"] for each in group["rules"] if "alert" in each]
        critical = {each["alert"] for each in alerts if each["labels"]["severity"] == "critical"}
        if critical != WAKING:
            yield f"{sorted(critical ^ WAKING)} should wake somebody and do not, or the other way round"


def training_has_time_to_save_and_a_process_for_each_gpu(items: Sequence[Object]) -> Iterator[str]:
    runtimes = {item["metadata"]["name"]: item for item in of(items, "TrainingRuntime")}
    for item in (*of(items, "Job"), *runtimes.values()):
        if "activeDeadlineSeconds" in item["spec"]:
            yield f"{title(item)} is ended while it works"
        if any(pod.get("terminationGracePeriodSeconds", SAVING_S) < SAVING_S for pod in pod_specs(item)):
            yield f"{title(item)} is killed while it saves"
    for item in of(items, "TrainJob"):
        reference, processes = item["spec"]["runtimeRef"], str(item["spec"]["trainer"]["numProcPerNode"])
        runtime = runtimes.get(reference["name"])
        if runtime is None or reference["kind"] != "TrainingRuntime":
            yield f"{title(item)} is of {reference}, which is not there"
        elif {each["resources"]["limits"]["nvidia.com/gpu"] for each in containers(runtime)} != {processes}:
            yield f"{title(item)} starts {processes} processes for other GPUs"


def evictions_and_scaling_down_are_gentle(items: Sequence[Object]) -> Iterator[str]:
    for budget in of(items, "PodDisruptionBudget"):
        if budget["spec"].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"{title(budget)} keeps a node from being drained of a pod that does not work"
    for scaler in of(items, "HorizontalPodAutoscaler", "ScaledObject"):
        config = scaler["spec"].get("advanced", {}).get("horizontalPodAutoscalerConfig", scaler["spec"])
        for policy in config.get("behavior", {}).get("scaleDown", {}).get("policies", ()):
            if policy["type"] != "Pods" or policy["value"] > 1 or policy["periodSeconds"] < 30:
                yield f"{title(scaler)} takes away {policy} at once"
        for trigger in scaler["spec"].get("triggers", ()):
            if not re.fullmatch(r"https?://[\w-]+\.monitoring(\.svc)?:9090", trigger["metadata"]["serverAddress"]):
                yield f"{title(scaler)} asks {trigger['metadata']['serverAddress']}, which is not where Prometheus is expected"


def scrapes_are_of_this_namespace_and_answered(items: Sequence[Object]) -> Iterator[str]:
    for monitor in of(items, "PodMonitor"):
        if monitor["spec"].get("namespaceSelector"):
            yield f"{title(monitor)} looks at other namespaces"
    for item in servers(items):
        if settings_of(items, containers(item)[0]).http_names:
            yield f"{title(item)} answers names alone, and probes and Prometheus ask by address"
    for item in of(items, "Deployment"):
        if item in servers(items):
            continue
        for container in containers(item):
            for name in ("readinessProbe", "livenessProbe"):
                if container.get(name, {}).get("httpGet") != {"path": "/metrics", "port": "http"}:
                    yield f"{title(item)}: {name} does not ask what it answers"


def routes_have_every_protocol_and_the_pods_name(items: Sequence[Object]) -> Iterator[str]:
    for route in of(items, "GRPCRoute"):
        services = {each["method"]["service"] for rule in route["spec"]["rules"] for each in rule.get("matches", ())}
        if services != {SERVICE, INFERENCE, HEALTH}:
            yield f"{title(route)} routes {sorted(services)}"
        gateways = [{"name": each["metadata"]["name"]} for each in examples() if each["kind"] == "Gateway"]
        if not route["spec"].get("hostnames") or route["spec"].get("parentRefs") != gateways:
            yield f"{title(route)} is of no gateway, or of every host"
    for policy in of(items, "BackendTLSPolicy"):
        names = {target["name"] for target in policy["spec"]["targetRefs"]}
        authorities = [each["name"] for each in policy["spec"]["validation"].get("caCertificateRefs", ())]
        if {policy["spec"]["validation"]["hostname"]} != names or authorities != ["digits-serve-ca"]:
            yield f"{title(policy)} expects {policy['spec']['validation']}, and pods are {sorted(names)}"
    for service in of(items, "Service"):
        if not any(selects(service["spec"]["selector"], labels_of(item)) for item in servers(items)):
            yield f"{title(service)} leads nowhere"


PLATFORM: Sequence[Callable[[Sequence[Object]], Iterator[str]]] = (
    secrets_are_readable_by_the_pods_user, a_changed_setting_rolls_pods_and_a_changed_serving_file_does_not,
    volumes_are_shared_by_those_who_need_them, volumes_are_writable_where_programs_write_and_nowhere_else, rates_are_of_counters,
    alerts_are_looked_at_often_and_wake_somebody,
    training_has_time_to_save_and_a_process_for_each_gpu,
    evictions_and_scaling_down_are_gentle, scrapes_are_of_this_namespace_and_answered,
    routes_have_every_protocol_and_the_pods_name,
)  # fmt: skip
