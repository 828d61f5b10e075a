"""The objects of each namespace fit together, and what is broken on purpose is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.deploy.manifests import TOGETHER, Object, everything, rendered, together
from tests.deploy.relations import RELATIONS, complaints
from tests.deploy.server_rules import RULES, refused

CPU, GPU = "cpu, dev and the parity watch", "gpu and the parity watch"
KEDA, GATEWAY = "cpu with KEDA", "gpu behind a gateway"
HTTP_API, HTTPS_API = "cpu with the HTTP API", "gpu with the HTTP API over TLS"


@pytest.mark.parametrize("name", TOGETHER)
def test_what_is_applied_together_fits_together(name: str) -> None:
    assert complaints(together(name)) == []


def test_an_api_server_would_take_every_object() -> None:
    assert refused(item for _, item in everything()) == []


def test_overlays_beside_each_other_have_names_of_their_own() -> None:
    seen = [(item["kind"], item["metadata"]["name"]) for folder in ("overlays/cpu", "overlays/dev") for item in rendered(folder)]
    assert len(seen) == len(set(seen))


def find(items: Sequence[Object], kind: str, name: str = "digits-serve") -> Object:
    [item] = [item for item in items if item["kind"] == kind and item["metadata"]["name"] == name]
    return item


def container(items: Sequence[Object], name: str = "digits-serve", kind: str = "Deployment") -> Any:
    return find(items, kind, name)["spec"]["template"]["spec"]["containers"][0]


def settings(items: Sequence[Object]) -> dict[str, str]:
    """Those of the overlay that is not dev's."""
    maps = [item for item in items if item["kind"] == "ConfigMap" and "DIGITS_HOST" in item["data"]]
    [item] = [item for item in maps if not item["metadata"]["name"].startswith("dev-")]
    data: dict[str, str] = item["data"]
    return data


def named(parts: Sequence[Any], name: str) -> Any:
    return next(part for part in parts if part["name"] == name)


Break = Callable[[list[Object]], object]


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    """Sets what lies at a path below an object."""

    def change(item: Any) -> None:
        for step in path[:-1]:
            item = item[step]
        item[path[-1]] = value

    return change


def take(*path: Any) -> Callable[[Any], None]:
    def change(item: Any) -> None:
        for step in path[:-1]:
            item = item[step]
        del item[path[-1]]

    return change


def of(kind: str, change: Callable[[Any], None], name: str = "digits-serve") -> Break:
    return lambda items: change(find(items, kind, name))


def of_pod(change: Callable[[Any], None], name: str = "digits-serve", kind: str = "Deployment") -> Break:
    return lambda items: change(find(items, kind, name)["spec"]["template"]["spec"])


def of_container(change: Callable[[Any], None], name: str = "digits-serve", kind: str = "Deployment") -> Break:
    return lambda items: change(container(items, name, kind))


NAME, INSTANCE = "app.kubernetes.io/name", "app.kubernetes.io/instance"

# What a hurried change might do → the namespace it is done to.
BREAKAGES: dict[str, tuple[str, Break]] = {
    "a Service's port is another number": (CPU, of("Service", put("spec", "ports", 0, "port", value=50052))),
    "a Service leads to a port that is not there": (CPU, of("Service", put("spec", "ports", 0, "targetPort", value="rpc"))),
    "a Service leads to the other port": (CPU, of("Service", put("spec", "ports", 0, "targetPort", value="http"))),
    "a Service selects nothing": (CPU, of("Service", put("spec", "selector", NAME, value="digits"))),
    "a Service selects another overlay's pods too": (CPU, of("Service", take("spec", "selector", INSTANCE))),
    "the headless Service gets an address": (CPU, of("Service", take("spec", "clusterIP"), "digits-serve-pods")),
    "appProtocol speaks plaintext to TLS": (
        GPU,
        of("Service", put("spec", "ports", 0, "appProtocol", value="kubernetes.io/h2c")),
    ),
    "a NetworkPolicy lets in to another port": (
        CPU,
        of("NetworkPolicy", put("spec", "ingress", 0, "ports", 0, "port", value="web")),
    ),
    "Prometheus is not let in": (CPU, of("NetworkPolicy", lambda item: item["spec"]["ingress"].pop(1))),
    "names cannot be looked up": (CPU, of("NetworkPolicy", lambda item: item["spec"]["egress"].pop(0))),
    "a NetworkPolicy selects nothing": (CPU, of("NetworkPolicy", put("spec", "podSelector", "matchLabels", NAME, value="x"))),
    "the watch may not reach the server": (
        CPU,
        of("NetworkPolicy", lambda item: item["spec"]["egress"].pop(0), "digits-parity-watch"),
    ),
    "the autoscaler scales another name": (
        CPU,
        of("HorizontalPodAutoscaler", put("spec", "scaleTargetRef", "name", value="digits")),
    ),
    "the autoscaler waits for 10,000 times as many": (
        CPU,
        of("HorizontalPodAutoscaler", put("spec", "metrics", 0, "pods", "target", "averageValue", value="5120000")),
    ),
    "the autoscaler's metric is renamed": (
        CPU,
        of("HorizontalPodAutoscaler", put("spec", "metrics", 0, "pods", "metric", "name", value="digits_queue_length")),
    ),
    "KEDA scales another name": (KEDA, of("ScaledObject", put("spec", "scaleTargetRef", "name", value="dev-digits-serve"))),
    "KEDA beside the autoscaler": (KEDA, lambda items: items.append(find(rendered("overlays/cpu"), "HorizontalPodAutoscaler"))),
    "the Deployment says how many replicas": (CPU, of("Deployment", put("spec", "replicas", value=2))),
    "a disruption budget of all": (CPU, of("PodDisruptionBudget", put("spec", "maxUnavailable", value="100%"))),
    "a disruption budget of none": (CPU, of("PodDisruptionBudget", put("spec", "maxUnavailable", value=0))),
    "a disruption budget of nobody": (CPU, of("PodDisruptionBudget", put("spec", "selector", "matchLabels", NAME, value="x"))),
    "a PodMonitor selects nothing": (CPU, of("PodMonitor", put("spec", "selector", "matchLabels", NAME, value="digits"))),
    "a PodMonitor scrapes another port": (CPU, of("PodMonitor", put("spec", "podMetricsEndpoints", 0, "port", value="grpc-web"))),
    "one PodMonitor for both": (
        CPU,
        of(
            "PodMonitor",
            put(
                "spec",
                "selector",
                value={"matchExpressions": [{"key": NAME, "operator": "In", "values": ["digits-serve", "digits-parity-watch"]}]},
            ),
        ),
    ),
    "tokens are mounted elsewhere": (
        GPU,
        of_container(lambda each: named(each["volumeMounts"], "tokens").update(mountPath="/t")),
    ),
    "the models are not mounted": (
        GPU,
        of_container(
            lambda each: each.update(volumeMounts=[mount for mount in each["volumeMounts"] if mount["name"] != "models"])
        ),
    ),
    "another claim": (
        GPU,
        of_pod(lambda pod: named(pod["volumes"], "models")["persistentVolumeClaim"].update(claimName="models")),
    ),
    "a Secret of another name": (GPU, of_pod(lambda pod: named(pod["volumes"], "tls")["secret"].update(secretName="tls"))),
    "a key that the Secret has not": (
        GPU,
        lambda items: settings(items).update(DIGITS_TLS_CERT="/etc/digits-serve/tls/server.crt"),
    ),
    "a job's claim": (
        CPU,
        of_pod(lambda pod: pod["volumes"][0]["persistentVolumeClaim"].update(claimName="runs"), "digits-train", "Job"),
    ),
    "the toleration is gone": (GPU, of_pod(take("tolerations"))),
    "the training job's toleration is gone": (CPU, of_pod(take("tolerations"), "digits-train", "Job")),
    "liveness by what is served": (CPU, of_container(put("livenessProbe", "grpc", "service", value="digits.v1.DigitGenerator"))),
    "liveness by readiness over HTTP": (GPU, of_container(put("livenessProbe", "httpGet", "path", value="/readyz"))),
    "readiness by being alive": (CPU, of_container(put("readinessProbe", "grpc", "service", value="liveness"))),
    "startup by all models": (CPU, of_container(put("startupProbe", "grpc", "service", value=""))),
    "a probe at another port": (CPU, of_container(put("readinessProbe", "grpc", "port", value=8080 + 1))),
    "a minute to start": (CPU, of_container(put("startupProbe", "failureThreshold", value=30))),
    "64 MiB": (
        CPU,
        of_container(put("resources", value={"requests": {"cpu": "2", "memory": "64Mi"}, "limits": {"memory": "64Mi"}})),
    ),
    "no memory limit": (CPU, of_container(take("resources", "limits", "memory"))),
    "open calls may hold all the memory": (CPU, lambda items: settings(items).update(DIGITS_MAX_INFLIGHT_MIB="900")),
    "liveness does not wait for a process that ends by itself": (
        CPU,
        of_container(put("livenessProbe", "failureThreshold", value=3)),
    ),
    "a drain that takes longer": (CPU, lambda items: settings(items).update(DIGITS_DRAIN_DEADLINE_S="40")),
    "a limit over what is asked for": (CPU, of_container(put("resources", "limits", "memory", value="4Gi"))),
    "instances by the node's cores": (CPU, of_container(take("env"))),
    "no preStop": (CPU, of_container(take("lifecycle"))),
    "a grace period of 30 s": (CPU, of_pod(put("terminationGracePeriodSeconds", value=30))),
    "a setting that is none": (CPU, lambda items: settings(items).update(DIGITS_QUEUE="100")),
    "the server's port changes alone": (CPU, lambda items: settings(items).update(DIGITS_GRPC_PORT="50052")),
    "IPv4 alone": (CPU, lambda items: settings(items).update(DIGITS_HOST="0.0.0.0")),
    "the HTTP API is on": (CPU, lambda items: settings(items).update(DIGITS_HTTP_API="true")),
    "the HTTP API is off": (HTTP_API, lambda items: settings(items).update(DIGITS_HTTP_API="false")),
    "the HTTP API over TLS in plaintext": (HTTPS_API, lambda items: settings(items).pop("DIGITS_TLS_CERT")),
    "the HTTP API at another port": (HTTPS_API, lambda items: settings(items).update(DIGITS_HTTPS_PORT="8444")),
    "probes and metrics for every caller": (
        HTTPS_API,
        of("NetworkPolicy", lambda item: item["spec"]["ingress"][0]["ports"].append({"port": "http", "protocol": "TCP"})),
    ),
    "callers over HTTP are not let in": (HTTP_API, of("NetworkPolicy", lambda item: item["spec"]["ingress"][0]["ports"].pop())),
    "HTTPS said to be plaintext": (
        HTTPS_API,
        of("Service", lambda item: named(item["spec"]["ports"], "https").update(appProtocol="http")),
    ),
    "a Service without the HTTPS port": (
        HTTPS_API,
        of("Service", lambda item: item["spec"]["ports"].remove(named(item["spec"]["ports"], "https"))),
    ),
    "the page is on": (CPU, lambda items: settings(items).update(DIGITS_HTTP_API="true", DIGITS_PAGE="true")),
    "the image of another tag": (CPU, of_container(put("image", value="digits-serve:latest"))),
    "the CPU's image for CUDA": (GPU, of_container(put("image", value="digits-serve:0.1.0-cpu"))),
    "a roll that needs one GPU more": (
        GPU,
        of("Deployment", put("spec", "strategy", "rollingUpdate", value={"maxSurge": 1, "maxUnavailable": 0})),
    ),
    "no ServiceAccount": (CPU, lambda items: items.remove(find(items, "ServiceAccount"))),
    "spread by nobody's label": (
        CPU,
        of_pod(put("topologySpreadConstraints", 0, "labelSelector", "matchLabels", NAME, value="x")),
    ),
    "a writable root": (CPU, of_container(put("securityContext", "readOnlyRootFilesystem", value=False))),
    "an account's token": (CPU, of_pod(take("automountServiceAccountToken"))),
    "an eviction counts": (CPU, of("Job", take("spec", "podFailurePolicy"), "digits-train")),
    "shards and completions apart": (CPU, of("Job", put("spec", "completions", value=9), "digits-dataset")),
    "the watch asks another name": (
        CPU,
        of_container(
            lambda each: each["args"].__setitem__(each["args"].index("--target") + 1, "dns:///digits:50051"),
            "digits-parity-watch",
        ),
    ),
    "a plaintext watch of a TLS server": (
        GPU,
        lambda items: items.__setitem__(
            items.index(find(items, "Deployment", "digits-parity-watch")),
            find(rendered("parity-watch"), "Deployment", "digits-parity-watch"),
        ),
    ),
    "a route to another port": (GATEWAY, of("GRPCRoute", put("spec", "rules", 0, "backendRefs", 0, "port", value=8080 + 1))),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_breakage_is_found(breakage: str) -> None:
    name, change = BREAKAGES[breakage]
    items = together(name)
    change(items)
    assert complaints(items) + refused(items)


def test_every_relation_has_found_one() -> None:
    found = set()
    for name, change in BREAKAGES.values():
        items = together(name)
        change(items)
        found |= {complaint.partition(":")[0] for complaint in complaints(items)}
    assert found == set(RELATIONS)


# What an API server refuses and no schema says.
SEMANTIC: dict[str, Break] = {
    "two handlers in a probe": of_container(put("readinessProbe", "httpGet", value={"path": "/readyz", "port": "http"})),
    "no handler in a probe": of_container(take("readinessProbe", "grpc")),
    "a successThreshold of liveness": of_container(put("livenessProbe", "successThreshold", value=2)),
    "a sleep beyond the grace period": of_container(put("lifecycle", "preStop", "sleep", "seconds", value=90)),
    "both fields of a disruption budget": of("PodDisruptionBudget", put("spec", "minAvailable", value=1)),
    "neither field of a disruption budget": of("PodDisruptionBudget", take("spec", "maxUnavailable")),
    "a mount of no volume": of_container(put("volumeMounts", value=[{"name": "models", "mountPath": "/models"}])),
    "two sources of a volume": of_pod(
        lambda pod: pod.update(volumes=[{"name": "x", "emptyDir": {}, "secret": {"secretName": "x"}}])
    ),
    "a mountPath twice": of_container(
        lambda each: each["volumeMounts"].append({"name": "models", "mountPath": "/tmp"}), "digits-train", "Job"
    ),
    "a selector that is not the template's": of("Deployment", put("spec", "selector", "matchLabels", NAME, value="digits")),
    "a roll that cannot begin": of(
        "Deployment", put("spec", "strategy", "rollingUpdate", value={"maxSurge": 0, "maxUnavailable": 0})
    ),
    "rollingUpdate beside Recreate": of("Deployment", put("spec", "strategy", "type", value="Recreate")),
    "a request over its limit": of_container(put("resources", "requests", "memory", value="9Gi")),
    "a quantity that is none": of_container(put("resources", "requests", "memory", value="1GB")),
    "fewest over most replicas": of("HorizontalPodAutoscaler", put("spec", "minReplicas", value=9)),
    "a Job that restarts its pods with a failure policy": of_pod(put("restartPolicy", value="OnFailure"), "digits-train", "Job"),
    "a Deployment whose pods never restart": of_pod(put("restartPolicy", value="Never")),
    "a budget per index without indexes": of("Job", put("spec", "completionMode", value="NonIndexed"), "digits-dataset"),
    "ports of one name": of_container(put("ports", 1, "name", value="grpc")),
    "a port name that is too long": of_container(put("ports", 0, "name", value="grpc-and-nothing-else")),
    "ports without names": of("Service", take("spec", "ports", 1, "name")),
    "a Service's port twice": of("Service", put("spec", "ports", 1, "port", value=50051)),
    "egress that is no policy type": of("NetworkPolicy", put("spec", "policyTypes", value=["Ingress"])),
    "an empty peer": of("NetworkPolicy", lambda item: item["spec"]["ingress"][0]["from"].append({})),
    "a spread constraint twice": of_pod(put("topologySpreadConstraints", 1, "topologyKey", value="topology.kubernetes.io/zone")),
    "a variable of two values": of_container(put("env", 0, "value", value="2")),
    "a container that a field is not of": of_container(
        put("env", 0, "valueFrom", "resourceFieldRef", "containerName", value="server")
    ),
    "a label that is none": of("Deployment", put("metadata", "labels", NAME, value="digits serve")),
}


@pytest.mark.parametrize("breakage", SEMANTIC)
def test_what_an_api_server_refuses_is_refused_here(breakage: str) -> None:
    items = together(CPU)
    SEMANTIC[breakage](items)
    assert refused(items)


def test_every_rule_has_refused_one() -> None:
    found = set()
    for change in SEMANTIC.values():
        items = together(CPU)
        change(items)
        found |= {complaint.split(": ")[1] for complaint in refused(items)}
    assert found == set(RULES)
