"""What alerts, probes, callers and the README rely on in other objects: settings, times, mounts, and who is scaled how."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.deploy.manifests import Object, containers, containers_of, pod_specs, settings_of
from tests.deploy.relations.objects import (
    claims_of,
    failing_s,
    flags_of,
    labels_of,
    of,
    selects,
    servers,
    stopping_s,
    title,
    workloads,
)  # fmt: skip
from tests.deploy.relations.server_rules import PROBES

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SCRAPES_A_WINDOW = 4  # rate() needs two samples, and one may be lost
INSTANCE = "app.kubernetes.io/instance"


def settings_are_what_others_rely_on(items: Sequence[Object]) -> Iterator[str]:
    """Each with who relies on it."""
    for item in servers(items):
        settings = settings_of(items, containers(item)[0])
        wanted = {
            "metrics: alerts and autoscalers go by them": settings.metrics,
            "load_reports: weighted_round_robin goes by them": settings.load_reports,
            "drain_grace_s: endpoints learn of a pod's end later than the pod": 2 <= settings.drain_grace_s <= 30,
            "drain_deadline_s: requests in flight are finished": 5 <= settings.drain_deadline_s <= 120,
            "max_connection_age_s: new pods get none of the calls of connections that stay": 0
            < settings.max_connection_age_s
            <= 600,
            "watchdog_s: DigitsRunsHang": 0 < settings.watchdog_s <= 300,
            "self_check_interval_s: DigitsSelfCheckBreach": 0 < settings.self_check_interval_s <= 300,
            "poll_interval_s: a changed serving file or model": settings.poll_interval_s <= 60,
            "max_inflight_mib: a pod's memory": settings.max_inflight_mib >= 0,
            "log_level: the reason of what is refused or ended": settings.log_level in ("info", "debug"),
        }
        if claims_of(item):
            wanted["wait_for_models: an empty volume is no error"] = settings.wait_for_models
        volumes = [each for each in pod_specs(item)[0].get("volumes", ()) if each.keys() & {"persistentVolumeClaim", "image"}]
        names, mounts = {each["name"] for each in volumes}, containers(item)[0].get("volumeMounts", ())
        if mounted := {each["mountPath"] for each in mounts if each["name"] in names}:
            wanted["models_dir: the volume has models at its root"] = {str(settings.models_dir)} == mounted
        if settings.tls_cert:
            wanted["tls_client_ca: the README says that callers have certificates"] = settings.tls_client_ca is not None
        if settings.provider == "cpu":
            wanted["cuda on a CPU"] = "nvidia.com/gpu" not in containers(item)[0]["resources"]["limits"]
        yield from (f"{title(item)}: {what}" for what, holds in wanted.items() if not holds)


def times_fit_together(items: Sequence[Object]) -> Iterator[str]:
    """From a pod's end being known to its process's end; from a fault to its effect. In seconds, with bounds on both sides."""
    for item in servers(items):
        [pod], [container] = pod_specs(item), containers(item)
        settings, grace = settings_of(items, container), pod.get("terminationGracePeriodSeconds", 30)
        gives_up_s, between_s = item["spec"].get("progressDeadlineSeconds", 600), item["spec"].get("minReadySeconds", 0)
        asleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        ready, alive, started = (container[name] for name in ("readinessProbe", "livenessProbe", "startupProbe"))
        bounds = {
            "preStop": (3, asleep, 15),
            "the grace period": (asleep + stopping_s(settings), grace, asleep + stopping_s(settings) + 30),
            "until a pod that is not ready gets no calls": (1, failing_s(ready), 20),
            "until a pod that is ready again gets calls": (
                1,
                ready.get("periodSeconds", 10) * ready.get("successThreshold", 1),
                20,
            ),
            "until a pod that does not answer is restarted": (stopping_s(settings), failing_s(alive), 120),
            "to start": (120, failing_s(started), 600),
            "from ready to being asked": (0, started.get("periodSeconds", 10) + ready.get("initialDelaySeconds", 0), 10),
            "until a roll that hangs is called failed": (failing_s(started), gives_up_s, 3600),
            "between two pods of a roll": (0, between_s, 60),
        }
        for what, (low, value, high) in bounds.items():
            if not low <= value <= high:
                yield f"{title(item)}: {what}: {value:g} s, not {low:g} to {high:g}"
        for name in PROBES:
            probe = container[name]
            if not 2 <= probe.get("timeoutSeconds", 1) <= probe.get("periodSeconds", 10):
                yield f"{title(item)}: {name} waits {probe.get('timeoutSeconds', 1)} s, every {probe.get('periodSeconds', 10)} s"
            if probe.get("terminationGracePeriodSeconds", grace) < stopping_s(settings):
                yield f"{title(item)}: {name} gives less time to end than the pod has"
        if item["spec"].get("paused"):
            yield f"{title(item)} is paused: what is applied changes nothing"


def what_is_mounted_is_what_is_read(items: Sequence[Object]) -> Iterator[str]:
    """Whole folders, since a file mounted by subPath never changes; read-only where it is read; nothing that nobody reads."""
    for item in workloads(items):
        for pod in pod_specs(item):
            volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
            for container in containers_of(pod):
                read = list(_read_by(items, item, container))
                for mount in container.get("volumeMounts", ()):
                    volume, where = volumes[mount["name"]], f"{title(item)}: {mount['mountPath']}"
                    folder = Path(mount["mountPath"])
                    if "subPath" in mount or "subPathExpr" in mount:
                        yield f"{where} is a part of {volume['name']}, which does not follow its changes"
                    if "secret" not in volume and "configMap" not in volume:
                        if item in servers(items) and "emptyDir" not in volume and not mount.get("readOnly"):
                            yield f"{where} may be written by a server"
                        continue
                    source = volume.get("secret") or volume["configMap"]
                    if source.get("items") or source.get("optional"):
                        yield f"{where} is a part of {volume['name']}, or may be missing"
                    if (
                        not mount.get("readOnly")
                        or source.get("defaultMode", 0o644) & 0o440 != 0o440
                        or source.get("defaultMode", 0) & 0o002
                    ):
                        yield f"{where} is writable, or its group cannot read it"
                    if not any(path.is_relative_to(folder) for path in read):
                        yield f"{where} holds {volume['name']}, which the process does not read"
                writable = {mount["mountPath"] for mount in container.get("volumeMounts", ()) if not mount.get("readOnly")}
                for each in container.get("env", ()):
                    if each["name"] in ("HOME", "CUDA_CACHE_PATH") and each.get("value") not in writable:
                        yield f"{title(item)}: {each['name']}={each.get('value')} is not writable"


def _read_by(items: Sequence[Object], item: Object, container: Mapping[str, Any]) -> Iterator[Path]:
    if item in servers(items):
        settings = settings_of(items, container)
        files = (settings.tls_cert, settings.tls_key, settings.tls_client_ca, settings.tokens_file, settings.serving_file)
        yield from (path for path in files if path is not None)
    yield from (Path(value) for value in flags_of(container).values() if value.startswith("/"))


def config_maps_hold_what_is_looked_for(items: Sequence[Object]) -> Iterator[str]:
    """A serving file that is not there means what ``--versions`` says: nobody would notice."""
    maps = {item["metadata"]["name"]: item["data"] for item in of(items, "ConfigMap")}
    for item in servers(items):
        [pod], [container] = pod_specs(item), containers(item)
        wanted = settings_of(items, container).serving_file
        volumes = {volume["name"]: volume.get("configMap", {}).get("name") for volume in pod.get("volumes", ())}
        there = [
            Path(mount["mountPath"]) / key
            for mount in container.get("volumeMounts", ())
            for key in maps.get(volumes.get(mount["name"]) or "", ())
        ]
        if wanted is not None and wanted not in there:
            yield f"{title(item)} looks for {wanted}, and there is {[str(path) for path in there]}"


def seconds(text: str) -> int:
    return int(text[:-1]) * UNITS_S[text[-1]]


def scrapes_are_often_enough_for_the_rules(items: Sequence[Object]) -> Iterator[str]:
    windows = [
        seconds(text)
        for rule in of(items, "PrometheusRule")
        for group in rule["spec"]["groups"]
        for each in group["rules"]
        for text in re.findall(r"\[(\d+[smhd])\]", each["expr"])
    ]
    for monitor in of(items, "PodMonitor"):
        if not monitor["spec"].get("podMetricsEndpoints"):
            yield f"{title(monitor)} scrapes nothing"
        for endpoint in monitor["spec"].get("podMetricsEndpoints", ()):
            every_s, timeout_s = (seconds(endpoint.get(key, "10s")) for key in ("interval", "scrapeTimeout"))
            least_s = min(windows, default=60)
            if not timeout_s <= every_s or every_s * SCRAPES_A_WINDOW > least_s:
                yield f"{title(monitor)} scrapes every {every_s} s, within {timeout_s} s, for windows of {least_s} s"
            labelled = {each.get("targetLabel"): each.get("sourceLabels") for each in endpoint.get("relabelings", ())}
            if labelled.get("overlay") != ["__meta_kubernetes_pod_label_app_kubernetes_io_instance"]:
                yield f"{title(monitor)} does not say of which overlay a pod is, and rules tell apart by it"
            dropping = [each for each in endpoint.get("relabelings", ()) if each.get("action") in ("drop", "keep")]
            if endpoint.get("metricRelabelings") or dropping:
                yield f"{title(monitor)} leaves out what rules may ask for"


def autoscalers_can_move_and_never_reach_zero(items: Sequence[Object]) -> Iterator[str]:
    deployments = {item["metadata"]["name"]: item for item in of(items, "Deployment")}
    for scaler in of(items, "HorizontalPodAutoscaler", "ScaledObject"):
        spec, keda = scaler["spec"], scaler["kind"] == "ScaledObject"
        low, high = (spec.get(name + ("ReplicaCount" if keda else "Replicas"), 1) for name in ("min", "max"))
        if not 2 <= low <= high / 2:
            yield f"{title(scaler)} scales from {low} to {high}: a roll needs two, and a rush more"
        config = spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {}) if keda else spec
        behaviour = config.get("behavior", {})
        for direction, (least_s, most_s) in {"scaleUp": (0, 60), "scaleDown": (120, 1800)}.items():
            own = behaviour.get(direction, {})
            if own.get("selectPolicy") == "Disabled" or not own.get("policies"):
                yield f"{title(scaler)} does not {direction}"
            if not least_s <= own.get("stabilizationWindowSeconds", -1) <= most_s:
                yield f"{title(scaler)} waits {own.get('stabilizationWindowSeconds')} s to {direction}"
        if not keda:
            continue
        paused = [key for key in scaler["metadata"].get("annotations", {}) if key.startswith("autoscaling.keda.sh/paused")]
        if paused or "idleReplicaCount" in spec:
            yield f"{title(scaler)} may stop, or scale to {spec.get('idleReplicaCount')}: {paused}"
        fallback = spec.get("fallback", {})
        if not low <= fallback.get("replicas", 0) <= high or fallback.get("behavior") != "currentReplicasIfHigher":
            yield f"{title(scaler)} falls back to {fallback}: it could take pods away under load"
        target = deployments.get(spec["scaleTargetRef"]["name"])
        for trigger in spec["triggers"]:
            asked = dict(re.findall(r'(\w+)="([^"]*)"', trigger["metadata"]["query"]))
            if target is None or asked != {"namespace": "digits", "overlay": labels_of(target)[INSTANCE]}:
                yield f"{title(scaler)} goes by {trigger['metadata']['query']}, which are not its own pods"
            if trigger["metadata"].get("ignoreNullValues") != "false" or trigger["metricType"] != "AverageValue":
                yield f"{title(scaler)} takes a query that finds nothing for an empty queue, or a total for a pod's"


def services_lead_to_ready_pods_of_every_node(items: Sequence[Object]) -> Iterator[str]:
    for service in of(items, "Service"):
        spec = service["spec"]
        if spec.get("publishNotReadyAddresses"):
            yield f"{title(service)} leads to pods that are not ready"
        if "Local" in (spec.get("internalTrafficPolicy"), spec.get("externalTrafficPolicy")):
            yield f"{title(service)} leads to pods of the caller's node alone"
        if spec.get("trafficDistribution") == "PreferSameNode" or spec.get("sessionAffinity", "None") != "None":
            yield f"{title(service)} keeps a caller at one pod"
        if spec.get("type", "ClusterIP") != "ClusterIP" or spec.get("externalIPs"):
            yield f"{title(service)} is reached from outside the cluster"
        if spec.get("ipFamilyPolicy") == "RequireDualStack":
            yield f"{title(service)} is refused where the cluster has one family"
    for item in workloads(items):
        for pod in pod_specs(item):
            ports = [port for container in containers_of(pod) for port in container.get("ports", ())]
            if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")) or any("hostPort" in port for port in ports):
                yield f"{title(item)} is on its node's network: no policy holds there"


def selectors_outlive_a_roll(items: Sequence[Object]) -> Iterator[str]:
    """Of labels that a new version has too: a Deployment's selector cannot be changed, and a Service would lose the new pods."""
    changing = ("app.kubernetes.io/version", "pod-template-hash")
    for item in items:
        spec = item.get("spec", {})
        selectors = [spec.get(name) for name in ("selector", "podSelector") if isinstance(spec.get(name), dict)]
        for selector in selectors:
            if any(key in {**selector, **selector.get("matchLabels", {})} for key in changing):
                yield f"{title(item)} selects by a label that changes: {selector}"
    for one in of(items, "Deployment"):
        for other in of(items, "Deployment"):
            if one is not other and selects(one["spec"]["selector"], labels_of(other)):
                yield f"{title(one)} selects the pods of {title(other)} too"


def certificates_have_the_names_that_callers_use(items: Sequence[Object]) -> Iterator[str]:
    certificates = {item["spec"]["secretName"]: item["spec"] for item in of(items, "Certificate")}
    if not certificates:
        return
    for item in servers(items):
        names = [each["metadata"]["name"] for each in of(items, "Service") if selects(each["spec"]["selector"], labels_of(item))]
        own = certificates.get("digits-serve-tls", {})
        wanted = {f"{name}{rest}" for name in names for rest in ("", ".digits.svc", ".digits.svc.cluster.local")}
        if set(own.get("dnsNames", ())) != wanted or "server auth" not in own.get("usages", ()):
            yield f"the certificate of {title(item)} is for {own.get('dnsNames')}, and callers ask for {sorted(wanted)}"
    if len({str(each["issuerRef"]) for each in certificates.values()}) != 1:
        yield "the certificates are of several issuers: a server takes callers by its own"
    if "client auth" not in certificates.get("digits-parity-watch-tls", {}).get("usages", ()):
        yield "the parity watch has no certificate that a server takes"


def jobs_hand_over(items: Sequence[Object]) -> Iterator[str]:
    """Training resumes and writes runs where the export Job judges and exports them, by MNIST's files from one place."""
    given: dict[str, list[tuple[Object, list[str], dict[str, str]]]] = {"train": [], "export": []}
    for item in of(items, "Job", "TrainingRuntime"):
        if item["spec"].get("suspend"):
            yield f"{title(item)} does not begin"
        for container in containers(item):
            words = [*container.get("command", ()), *container["args"]]
            for kind in given.keys() & set(words):
                given[kind].append((item, container["args"], flags_of(container)))
    theirs = {flag: value for _, _, values in given["train"] for flag, value in values.items()}
    for kind, each in given.items():
        for item, arguments, values in each:
            if any(values.get(flag) != theirs.get(flag) for flag in ("--runs-dir", "--data-dir")):
                yield f"{title(item)}: {kind} looks at {values}, and training writes to {theirs}"
            if kind == "train" and values.get("--resume") != "auto":
                yield f"{title(item)} begins anew after an eviction"
            if kind == "export" and "--judge" not in arguments:
                yield f"{title(item)} exports what nobody has judged"


def pods_run_where_their_images_do(items: Sequence[Object]) -> Iterator[str]:
    for item in workloads(items):
        for pod in pod_specs(item):
            if pod.get("nodeSelector", {}).get("kubernetes.io/arch") != "amd64":
                yield f"{title(item)} may be put on a node of another architecture than its image's"
            if item in servers(items) and pod.get("restartPolicy", "Always") != "Always":
                yield f"{title(item)} is not started again when it ends by itself"


PROMISES: Sequence[Callable[[Sequence[Object]], Iterator[str]]] = (
    settings_are_what_others_rely_on, times_fit_together, what_is_mounted_is_what_is_read, config_maps_hold_what_is_looked_for,
    scrapes_are_often_enough_for_the_rules, autoscalers_can_move_and_never_reach_zero, services_lead_to_ready_pods_of_every_node,
    selectors_outlive_a_roll, certificates_have_the_names_that_callers_use, jobs_hand_over, pods_run_where_their_images_do,
)  # fmt: skip
