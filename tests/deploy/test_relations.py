"""The objects of each namespace fit together, and what is broken on purpose is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.deploy.manifests import (
    EVERYWHERE,
    OVERLAYS,
    OWN,
    PREFIX,
    TOGETHER,
    Object,
    containers,
    everything,
    examples,
    kustomized,
    prefixed,
    rendered,
    together,
)
from tests.deploy.relations.network import namespace
from tests.deploy.relations.objects import workloads
from tests.deploy.relations.server_rules import RULES, refused
from tests.deploy.relations.table import RELATIONS, complaints

CPU, GPU = "cpu, dev and the parity watch", "gpu and the parity watch"
KEDA, GATEWAY = "cpu with KEDA", "gpu behind a gateway"
CERTIFICATES, SERVING_FILE = "gpu with KEDA and certificates", "cpu with a serving file"
OPENSHIFT = "cpu on OpenShift"
HTTP_API, HTTPS_API = "cpu with the HTTP API", "gpu with the HTTP API over TLS"


@pytest.mark.parametrize("name", TOGETHER)
def test_what_is_applied_together_fits_together(name: str) -> None:
    assert complaints(together(name)) == []


# kustomize itself cannot put a prefix before two overlays of one base at once; a certificate has its names from what is below it.
ONE_OVERLAY = [name for name, folders in TOGETHER.items() if len({*folders} & {*OVERLAYS}) < 2 and "certificates" not in name]


@pytest.mark.parametrize("name", ONE_OVERLAY)
def test_it_fits_together_under_a_prefix_too(name: str) -> None:
    items = prefixed(name)
    assert all(item["metadata"]["name"].startswith(PREFIX) for item in items)
    assert complaints(items) == []


# All that go together, on Kubernetes.
MANY = [
    f"components/{each}"
    for each in (
        "https-api", "tls", "tokens", "serving-file", "models-volume", "spot", "keda", "gateway", "certificate", "watch-access",
        "watch-models-volume",
    )
]  # fmt: skip


@pytest.mark.parametrize("components", [MANY, MANY[::-1]], ids=["in one order", "in the other"])
def test_components_fit_together_in_any_order(components: list[str]) -> None:
    items = kustomized(resources=["overlays/cpu", "parity-watch"], components=components)
    assert complaints(items + [item for folder in EVERYWHERE for item in rendered(folder)]) == []


def test_a_certificate_above_a_prefix_has_the_prefixed_names() -> None:
    """It takes the names as they are below it; beside the prefix it would be for names that nobody calls."""
    resources, components = OWN["gpu with KEDA and certificates"]
    items = kustomized(resources=resources, components=components, below={"namePrefix": PREFIX})
    assert find(items, "Deployment", f"{PREFIX}gpu-digits-serve")
    assert complaints(items + [item for folder in EVERYWHERE for item in rendered(folder)]) == []


def test_the_readmes_own_overlays_fit_together() -> None:
    overlays = [each for each in examples() if each["kind"] == "Kustomization"]
    assert len(overlays) == 3
    for each in overlays:
        resources, components = (
            [path.removeprefix("../deploy/") for path in each.pop(key, ())] for key in ("resources", "components")
        )
        items = kustomized(resources=resources, components=components, **each)
        assert refused(items) == []
        if "monitoring" in resources:
            assert {item["metadata"]["labels"]["release"] for item in items} == {"kube-prometheus-stack"}
            continue
        for item in workloads(items):
            for own in containers(item):
                own["image"] = own["image"].removeprefix("registry.example.org/digits/")
        assert complaints(items + [item for folder in EVERYWHERE for item in rendered(folder)]) == []


def test_an_api_server_would_take_every_object() -> None:
    assert refused(item for _, item in everything()) == []


def test_what_is_applied_to_one_namespace_has_names_of_its_own() -> None:
    folders = [*OVERLAYS, "parity-watch", "parity-watch-secure", "jobs/trainjob", "kserve", *EVERYWHERE]
    seen = [(item["kind"], item["metadata"]["name"]) for folder in folders for item in rendered(folder)]
    assert len(seen) == len(set(seen))


def find(items: Sequence[Object], kind: str, name: str = "digits-serve") -> Object:
    found = {item["metadata"]["name"]: item for item in items if item["kind"] == kind}
    return found.get(name) or found[f"gpu-{name}"]


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
        of_container(lambda each: named(each["env"], "SERVICE").update(value="digits"), "digits-parity-watch"),
    ),
    "a plaintext watch of a TLS server": (
        GPU,
        of_container(lambda each: each["args"].remove("--ca=/etc/digits-parity-watch/tls/ca.crt"), "digits-parity-watch"),
    ),
    **{
        name: (CPU, of("NetworkPolicy", lambda item, rule=rule: item["spec"]["ingress"].append(rule)))  # type: ignore[misc]
        for name, rule in {
            "everybody is let in at gRPC": {"ports": [{"port": "grpc"}]},
            "every namespace is let in": {"from": [{"namespaceSelector": {}}], "ports": [{"port": "grpc"}]},
            "callers read the metrics": {"from": [{"podSelector": {}}], "ports": [{"port": "http"}]},
            "one namespace is let in at all ports": {"from": [{"namespaceSelector": {"matchLabels": namespace("other")}}]},
            "every address is let in": {"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 50051}]},
            "whoever calls itself Prometheus": {
                "from": [
                    {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}},
                ],
                "ports": [{"port": "http"}],
            },
        }.items()
    },
    "Prometheus is looked for in another namespace": (
        CPU,
        of(
            "NetworkPolicy",
            put("spec", "ingress", 1, "from", 0, "namespaceSelector", "matchLabels", "kubernetes.io/metadata.name", value="prom"),
        ),
    ),
    "callers are told by another label": (
        CPU,
        of("NetworkPolicy", put("spec", "ingress", 0, "from", 0, "namespaceSelector", "matchLabels", value={"digits": "yes"})),
    ),
    "the label's two selectors become one peer": (
        CPU,
        of("NetworkPolicy", lambda item: item["spec"]["ingress"][0]["from"][0].update(item["spec"]["ingress"][0]["from"].pop(1))),
    ),
    "ingress is no policy type": (CPU, of("NetworkPolicy", put("spec", "policyTypes", value=["Egress"]))),
    "a server may call whom it likes": (CPU, of("NetworkPolicy", lambda item: item["spec"]["egress"].append({}))),
    "a server may call the cloud's metadata": (
        CPU,
        of("NetworkPolicy", lambda item: item["spec"]["egress"].append({"to": [{"ipBlock": {"cidr": "169.254.0.0/16"}}]})),
    ),
    "names are looked up by TCP alone": (CPU, of("NetworkPolicy", lambda item: item["spec"]["egress"][0]["ports"].pop(0))),
    "a second policy lets everybody in": (
        CPU,
        lambda items: items.append(
            {
                "kind": "NetworkPolicy",
                "metadata": {"name": "open"},
                "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}]},
            }
        ),
    ),
    "the watch of one overlay is kept from its server by the instance": (
        CPU,
        of(
            "NetworkPolicy",
            put("spec", "egress", 0, "to", 0, "podSelector", "matchLabels", INSTANCE, value="dev"),
            "digits-parity-watch",
        ),
    ),
    "tokens are mounted and not read": (GPU, lambda items: settings(items).pop("DIGITS_TOKENS_FILE")),
    "client certificates are not asked for": (GPU, lambda items: settings(items).pop("DIGITS_TLS_CLIENT_CA")),
    "a certificate by subPath": (
        GPU,
        of_container(lambda each: named(each["volumeMounts"], "tls").update(subPath="tls.crt")),
    ),
    "one key of a Secret": (
        GPU,
        of_pod(lambda pod: named(pod["volumes"], "tls")["secret"].update(items=[{"key": "tls.crt", "path": "tls.crt"}])),
    ),
    "a Secret that may be missing": (GPU, of_pod(lambda pod: named(pod["volumes"], "tokens")["secret"].update(optional=True))),
    "a Secret for its owner alone": (GPU, of_pod(lambda pod: named(pod["volumes"], "tls")["secret"].update(defaultMode=0o400))),
    "a server that may write models": (GPU, of_container(lambda each: named(each["volumeMounts"], "models").pop("readOnly"))),
    "a serving file of another name": (
        SERVING_FILE,
        lambda items: settings(items).update(DIGITS_SERVING_FILE="/etc/digits-serve/serving/served.json"),
    ),
    "a serving file by subPath": (
        SERVING_FILE,
        of_container(lambda each: named(each["volumeMounts"], "serving").update(subPath="serving.json")),
    ),
    "a home that cannot be written": (
        CPU,
        of_container(lambda each: named(each["volumeMounts"], "tmp").update(mountPath="/scratch"), "digits-train", "Job"),
    ),
    **{
        f"{name}={value}": (place, lambda items, name=name, value=value: settings(items).update({name: value}))  # type: ignore[misc]
        for place, name, value in (
            (CPU, "DIGITS_METRICS", "false"),
            (CPU, "DIGITS_LOAD_REPORTS", "false"),
            (CPU, "DIGITS_DRAIN_GRACE_S", "0"),
            (CPU, "DIGITS_DRAIN_DEADLINE_S", "1"),
            (CPU, "DIGITS_MAX_CONNECTION_AGE_S", "0"),
            (CPU, "DIGITS_SELF_CHECK_INTERVAL_S", "0"),
            (CPU, "DIGITS_WATCHDOG_S", "900"),
            (CPU, "DIGITS_LOG_LEVEL", "error"),
            (GPU, "DIGITS_WAIT_FOR_MODELS", "false"),
            (GPU, "DIGITS_POLL_INTERVAL_S", "3600"),
        )
    },
    "a probe that gives up at once": (CPU, of_container(put("readinessProbe", "timeoutSeconds", value=1))),
    "a readiness probe of a minute": (CPU, of_container(put("readinessProbe", "periodSeconds", value=60))),
    "a liveness probe of an hour": (CPU, of_container(put("livenessProbe", "failureThreshold", value=360))),
    "an hour to start": (CPU, of_container(put("startupProbe", "failureThreshold", value=1800))),
    "a minute until the first probe": (CPU, of_container(put("readinessProbe", "initialDelaySeconds", value=60))),
    "a grace period of an hour": (CPU, of_pod(put("terminationGracePeriodSeconds", value=3600))),
    "a second of preStop": (CPU, of_container(put("lifecycle", "preStop", "sleep", "seconds", value=1))),
    "a liveness probe with a grace of its own": (
        CPU,
        of_container(put("livenessProbe", "terminationGracePeriodSeconds", value=1)),
    ),
    "a roll that gives up before pods can start": (CPU, of("Deployment", put("spec", "progressDeadlineSeconds", value=60))),
    "a Deployment that is paused": (CPU, of("Deployment", put("spec", "paused", value=True))),
    "a scrape a minute": (CPU, of("PodMonitor", put("spec", "podMetricsEndpoints", 0, "interval", value="60s"))),
    "scrapes without the overlay": (CPU, of("PodMonitor", take("spec", "podMetricsEndpoints", 0, "relabelings"))),
    "scrapes under the PodMonitor's name": (CPU, of("PodMonitor", take("spec", "jobLabel"))),
    "an autoscaler of one": (CPU, of("HorizontalPodAutoscaler", put("spec", "minReplicas", value=1))),
    "an autoscaler that cannot move": (CPU, of("HorizontalPodAutoscaler", put("spec", "maxReplicas", value=2))),
    "an autoscaler that does not add pods": (
        CPU,
        of("HorizontalPodAutoscaler", put("spec", "behavior", "scaleUp", "selectPolicy", value="Disabled")),
    ),
    "an autoscaler that takes pods away at once": (
        CPU,
        of("HorizontalPodAutoscaler", put("spec", "behavior", "scaleDown", "stabilizationWindowSeconds", value=0)),
    ),
    "KEDA scales to none": (KEDA, of("ScaledObject", put("spec", "minReplicaCount", value=0))),
    "KEDA idles at none": (KEDA, of("ScaledObject", put("spec", "idleReplicaCount", value=0))),
    "KEDA is paused": (KEDA, of("ScaledObject", put("metadata", "annotations", value={"autoscaling.keda.sh/paused": "true"}))),
    "KEDA's fallback takes pods away": (KEDA, of("ScaledObject", take("spec", "fallback", "behavior"))),
    "KEDA takes nothing for an empty queue": (
        KEDA,
        of("ScaledObject", take("spec", "triggers", 0, "metadata", "ignoreNullValues")),
    ),
    "KEDA counts other overlays' queues": (
        KEDA,
        of("ScaledObject", put("spec", "triggers", 0, "metadata", "query", value='sum(digits_queue_images{namespace="digits"})')),
    ),
    "a Service of pods that are not ready": (CPU, of("Service", put("spec", "publishNotReadyAddresses", value=True))),
    "a Service of the caller's node": (CPU, of("Service", put("spec", "internalTrafficPolicy", value="Local"))),
    "a Service that keeps callers": (CPU, of("Service", put("spec", "sessionAffinity", value="ClientIP"))),
    "a Service for the world": (CPU, of("Service", put("spec", "type", value="LoadBalancer"))),
    "a pod on its node's network": (CPU, of_pod(put("hostNetwork", value=True))),
    "a Service of one version": (
        CPU,
        of("Service", put("spec", "selector", "app.kubernetes.io/version", value="0.1.0")),
    ),
    "a certificate for another name": (CERTIFICATES, of("Certificate", put("spec", "dnsNames", 1, value="digits-serve-pods"))),
    "a certificate that is none of a client": (
        CERTIFICATES,
        of("Certificate", put("spec", "usages", value=["server auth"]), "digits-parity-watch"),
    ),
    "training begins anew": (
        CPU,
        of_container(lambda each: each["args"].__setitem__(each["args"].index("auto"), "never"), "digits-train", "Job"),
    ),
    "runs are exported that nobody has judged": (
        CPU,
        of_container(lambda each: each["args"].remove("--judge"), "digits-export", "Job"),
    ),
    "runs are looked for elsewhere": (
        CPU,
        of_container(lambda each: each["args"].__setitem__(each["args"].index("/models/runs"), "/models"), "digits-train", "Job"),
    ),
    "Secrets that nobody in the pod can read": (GPU, of_pod(take("securityContext", "fsGroup"))),
    "a server as root": (CPU, of_pod(put("securityContext", "runAsUser", value=0))),
    "the certificate for its key": (GPU, lambda items: settings(items).update(DIGITS_TLS_KEY="/etc/digits-serve/tls/tls.crt")),
    "settings that may be missing": (CPU, of_container(lambda each: each["envFrom"][0]["configMapRef"].update(optional=True))),
    "a serving file that rolls pods": (
        SERVING_FILE,
        lambda items: (
            find(items, "ConfigMap", "digits-serve-serving")["metadata"].update(name="digits-serve-serving-0123456789"),
            of_pod(lambda pod: named(pod["volumes"], "serving")["configMap"].update(name="digits-serve-serving-0123456789"))(
                items
            ),
        ),
    ),
    "no way back": (CPU, of("Deployment", put("spec", "revisionHistoryLimit", value=0))),
    "the node's DNS": (CPU, of_pod(put("dnsPolicy", value="Default"))),
    "a zone each or none": (CPU, of_pod(put("topologySpreadConstraints", 0, "whenUnsatisfiable", value="DoNotSchedule"))),
    "a volume of one node": (
        GPU,
        of("PersistentVolumeClaim", put("spec", "accessModes", value=["ReadWriteOnce"]), "digits-models"),
    ),
    "a budget for pods that do not work": (CPU, of("PodDisruptionBudget", take("spec", "unhealthyPodEvictionPolicy"))),
    "an autoscaler that takes all away": (
        CPU,
        of(
            "HorizontalPodAutoscaler",
            put("spec", "behavior", "scaleDown", "policies", 0, value={"type": "Percent", "value": 100, "periodSeconds": 15}),
        ),
    ),
    "KEDA asks another Prometheus": (
        KEDA,
        of("ScaledObject", put("spec", "triggers", 0, "metadata", "serverAddress", value="http://prometheus.default:80")),
    ),
    "every namespace is scraped": (CPU, of("PodMonitor", put("spec", "namespaceSelector", value={"any": True}))),
    "names that Prometheus does not call": (CPU, lambda items: settings(items).update(DIGITS_HTTP_NAMES="digits.example.org")),
    "the watch is asked for its health": (
        CPU,
        of_container(put("readinessProbe", "httpGet", "path", value="/healthz"), "digits-parity-watch"),
    ),
    "a route without health": (GATEWAY, of("GRPCRoute", lambda item: item["spec"]["rules"][0]["matches"].pop())),
    "a gateway that expects another name": (
        GATEWAY,
        of("BackendTLSPolicy", put("spec", "validation", "hostname", value="digits")),
    ),
    "any node": (CPU, of_pod(take("nodeSelector"))),
    "the watch has no token": (
        GPU,
        of_container(
            lambda each: each["args"].remove("--token-file=/etc/digits-parity-watch/token/token"), "digits-parity-watch"
        ),
    ),
    "a judge that cannot write": (
        CPU,
        of_container(lambda each: each["volumeMounts"][0].update(readOnly=True), "digits-export", "Job"),
    ),
    "a job whose claim is read-only": (
        CPU,
        of_pod(lambda pod: pod["volumes"][0]["persistentVolumeClaim"].update(readOnly=True), "digits-dataset", "Job"),
    ),
    "a watch that may write models": (
        GPU,
        of_pod(
            lambda pod: (
                named(pod["volumes"], "models")["persistentVolumeClaim"].pop("readOnly"),
                named(pod["containers"][0]["volumeMounts"], "models").pop("readOnly"),
            ),
            "digits-parity-watch",
        ),
    ),
    "a group of ours where OpenShift chooses": (
        OPENSHIFT,
        of_pod(put("securityContext", "fsGroup", value=65532), "digits-parity-watch"),
    ),
    "OpenShift's DNS at its Service's port": (
        OPENSHIFT,
        of("NetworkPolicy", lambda item: [port.update(port=53) for port in item["spec"]["egress"][-1]["ports"]]),
    ),
    "KEDA goes by the rate of a gauge": (
        KEDA,
        of(
            "ScaledObject",
            lambda item: item["spec"]["triggers"][0]["metadata"].update(
                query='sum(rate(digits_queue_images{namespace="digits",overlay="cpu"}[2m]))'
            ),
        ),
    ),
    "a gateway that speaks TLS to another port": (
        GATEWAY,
        of("BackendTLSPolicy", put("spec", "targetRefs", 0, "sectionName", value="http")),
    ),
    "an autoscaler of a StatefulSet": (
        CPU,
        of("HorizontalPodAutoscaler", put("spec", "scaleTargetRef", "kind", value="StatefulSet")),
    ),
    "nobody scales": (CPU, lambda items: items.remove(find(items, "HorizontalPodAutoscaler"))),
    "another gateway": (GATEWAY, of("GRPCRoute", put("spec", "parentRefs", 0, "name", value="gateway"))),
    "another authority": (
        GATEWAY,
        of("BackendTLSPolicy", put("spec", "validation", "caCertificateRefs", 0, "name", value="digits-ca")),
    ),
    "certificates of two issuers": (CERTIFICATES, of("Certificate", put("spec", "issuerRef", "name", value="other"))),
    "an alert that wakes nobody": (
        CPU,
        of("PrometheusRule", put("spec", "groups", 1, "rules", 0, "labels", "severity", value="warning")),
    ),
    "rules that are seldom evaluated": (CPU, of("PrometheusRule", put("spec", "groups", 0, "interval", value="10m"))),
    "training that is killed while it saves": (
        CPU,
        of_pod(put("terminationGracePeriodSeconds", value=5), "digits-train", "Job"),
    ),
    "a job with a deadline": (CPU, of("Job", put("spec", "activeDeadlineSeconds", value=60), "digits-train")),
    "processes without GPUs": (GPU, of("TrainJob", put("spec", "trainer", "numProcPerNode", value=8), "digits-train")),
    "reflection in production": (CPU, lambda items: settings(items).update(DIGITS_REFLECTION="true")),
    "models are looked for below the volume's root": (
        GPU,
        lambda items: settings(items).update(DIGITS_MODELS_DIR="/models/models"),
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
