"""What the objects of a namespace must have to do with each other, and with the program. Each yields complaints.

A schema says what an object may look like; these say that a Service reaches a pod, a probe asks what the server answers,
an autoscaler finds its target and its metric, and a pod gets the memory that the program was measured to take.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from serve.api.digits_v1 import SERVICE
from serve.client.channel import DEFAULT_TARGET
from serve.errors import SettingsError
from serve.ports.health import LIVENESS
from serve.server import DRAIN_OVERHEAD_S
from serve.settings import Settings, env_name
from tests.deploy.manifests import DEPLOY, Object, containers, pod_specs, pod_templates, settings_of
from tests.deploy.server_rules import quantity

Relation = Callable[[Sequence[Object]], Iterator[str]]

SERVER = {"app.kubernetes.io/name": "digits-serve"}
GRPC_PORT = int(DEFAULT_TARGET.rpartition(":")[2])
# Secrets that deploy/README.md tells to make, with their keys, and the ConfigMap of the gateway's platform.
SECRETS = {
    "digits-serve-tls": {"tls.crt", "tls.key", "ca.crt"},
    "digits-serve-tokens": {"tokens.json"},
    "digits-parity-watch-tls": {"tls.crt", "tls.key", "ca.crt"},
    "digits-parity-watch-token": {"token"},
}
# Resident memory of the server by instances, in MiB: ``python -m tests.bench.memory``, table in deploy/README.md.
MEMORY_MIB, MEMORY_MIB_PER_INSTANCE = 180, 6
BUDGET_SHARE = 4  # of the memory limit one part is for open calls, where --max-inflight-mib does not say (serve.server)
# What Python, connections and streams take beside that budget under attack: tests/integration/test_bounds_memory.py.
BESIDE_MIB = 136
CUDA_MIB = 2048  # what the driver and CUDA's libraries take in a process's own memory
GPU = "nvidia.com/gpu"


def of(items: Sequence[Object], *kinds: str) -> list[Object]:
    return [item for item in items if item["kind"] in kinds]


def title(item: Object) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def workloads(items: Sequence[Object]) -> list[Object]:
    return [item for item in items if pod_templates(item)]


def servers(items: Sequence[Object]) -> list[Object]:
    return [item for item in of(items, "Deployment") if labels_of(item).items() >= SERVER.items()]


def labels_of(item: Object) -> Mapping[str, str]:
    [template] = pod_templates(item)
    found: Mapping[str, str] = template["metadata"].get("labels", {})
    return found


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector, or a Service's plain one, selects pods with these labels."""
    plain = selector.get("matchLabels", {} if "matchExpressions" in selector else selector)
    chosen = all(labels.get(key) == value for key, value in plain.items())
    for each in selector.get("matchExpressions", ()):
        chosen = chosen and (labels.get(each["key"]) in each["values"]) == (each["operator"] == "In")
    return chosen


def selected(items: Sequence[Object], selector: Mapping[str, Any]) -> list[Object]:
    return [item for item in workloads(items) if item["kind"] != "ServingRuntime" and selects(selector, labels_of(item))]


def ports_of(item: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for each in containers(item) for port in each.get("ports", ())}


def services_reach_one_workload_each(items: Sequence[Object]) -> Iterator[str]:
    for service in of(items, "Service"):
        reached = selected(items, service["spec"]["selector"])
        if len(reached) != 1:
            yield f"{title(service)} selects {[title(item) for item in reached]}, not one workload"
        for item in reached:
            there = ports_of(item)
            for port in service["spec"]["ports"]:
                if port["targetPort"] not in {*there, *there.values()}:
                    yield f"{title(service)} leads to {port['targetPort']}, which is no port of {title(item)}"
                elif there.get(port["targetPort"], port["targetPort"]) != port["port"]:
                    yield f"{title(service)} has port {port['port']} for {port['targetPort']} {there}"


def services_are_as_clients_know_them(items: Sequence[Object]) -> Iterator[str]:
    """By the names and ports of the README and the client's default, and by what balances by ``appProtocol``."""
    names = {item["metadata"]["name"].removeprefix("dev-") for item in of(items, "Service")}
    if missing := {"digits-serve", "digits-serve-pods"} - names:
        yield f"there is no Service {missing}"
    for service in of(items, "Service"):
        for item in selected(items, service["spec"]["selector"]):
            [settings] = [settings_of(items, each) for each in containers(item)]
            for port in service["spec"]["ports"]:
                if port["name"] == "grpc":
                    wanted = "kubernetes.io/h2c" if settings.tls_cert is None else "https"
                    if (port["port"], port["appProtocol"]) != (GRPC_PORT, wanted):
                        yield f"{title(service)}: {port['port']} and {port['appProtocol']}, not {GRPC_PORT} and {wanted}"
                elif port["appProtocol"] != port["name"]:  # http, and https
                    yield f"{title(service)}: {port['appProtocol']} for {port['name']}"
            there = {port["port"] for port in service["spec"]["ports"]}
            if settings.https and service["spec"].get("clusterIP") != "None" and settings.https_port not in there:
                yield f"{title(service)} has no port for digits over HTTPS"
        if service["metadata"]["name"].endswith("-pods") and service["spec"].get("clusterIP") != "None":
            yield f"{title(service)} is for clients that balance by themselves: it must be headless"


def the_server_gets_the_settings_it_is_given(items: Sequence[Object]) -> Iterator[str]:
    known = {env_name(name) for name in Settings.__dataclass_fields__}
    for item in servers(items):
        [container] = containers(item)
        names = {source["configMapRef"]["name"] for source in container.get("envFrom", ())}
        maps = [each for each in of(items, "ConfigMap") if each["metadata"]["name"] in names]
        if len(maps) != len(names) or not maps:
            yield f"{title(item)} takes its settings from {sorted(names)}, and there is {[title(each) for each in maps]}"
            continue
        for name in (*(key for each in maps for key in each["data"]), *(each["name"] for each in container.get("env", ()))):
            if name.startswith("DIGITS_") and name not in known:
                yield f"{title(item)}: {name} is no setting"
        settings = settings_of(items, container)
        listens = {"grpc": settings.grpc_port, "http": settings.http_port}
        listens |= {"https": settings.https_port} if settings.https else {}
        if ports_of(item) != listens:
            yield f"{title(item)} listens on {listens}, and its ports are {ports_of(item)}"
        if (settings.host, settings.http_host) != ("::", "::"):
            yield f"{title(item)} listens on {settings.host} and {settings.http_host}, not on every address of both families"
        if settings.insecure != (settings.tls_cert is None):
            yield f"{title(item)} is insecure and has a certificate, or neither"
        if settings.page or settings.log_format != "json":
            yield f"{title(item)} serves the page, or writes its log for people"


def probes_ask_what_the_server_answers(items: Sequence[Object]) -> Iterator[str]:
    """Startup and liveness: does the process answer; readiness: can any model. gRPC's probes speak plaintext alone."""
    wanted = {
        "startupProbe": (LIVENESS, "/healthz"),
        "livenessProbe": (LIVENESS, "/healthz"),
        "readinessProbe": (SERVICE, "/readyz"),
    }
    for item in servers(items):
        [container] = containers(item)
        secure = settings_of(items, container).tls_cert is not None
        for name, (service, path) in wanted.items():
            probe = container.get(name, {})
            asked = probe.get("httpGet", {}) if secure else probe.get("grpc", {})
            if (asked.get("path") if secure else asked.get("service")) != (path if secure else service):
                yield f"{title(item)}: {name} asks {asked}, not {path if secure else service}"
            elif asked["port"] not in (*ports_of(item).values(), *ports_of(item)):
                yield f"{title(item)}: {name} asks at {asked['port']}, which is no port of it"
        if failing_s(container["startupProbe"]) < 120:
            yield f"{title(item)} has {failing_s(container['startupProbe'])} s to start"


def stopping_fits_into_the_grace_period(items: Sequence[Object]) -> Iterator[str]:
    for item in servers(items):
        [pod], [container] = pod_specs(item), containers(item)
        settings = settings_of(items, container)
        asleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if not asleep:
            yield f"{title(item)} has no preStop: callers are sent to it after it has begun to refuse"
        longest = asleep + stopping_s(settings)
        if longest > pod.get("terminationGracePeriodSeconds", 30):
            yield f"{title(item)} may take {longest} s to stop and is given {pod.get('terminationGracePeriodSeconds', 30)}"
        if failing_s(container["livenessProbe"]) < stopping_s(settings):
            yield f"{title(item)} drains and ends by itself when a run hangs, and its liveness probe does not wait for it"


def stopping_s(settings: Settings) -> float:
    """The longest time from SIGTERM, or from a hung run, to the process's end."""
    return settings.drain_grace_s + settings.drain_deadline_s + DRAIN_OVERHEAD_S


def failing_s(probe: Mapping[str, Any]) -> float:
    """For how long a probe must fail to have an effect."""
    allowed: float = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
    return allowed


def files_are_where_they_are_looked_for(items: Sequence[Object]) -> Iterator[str]:
    claims = {item["metadata"]["name"] for item in of(items, "PersistentVolumeClaim")}
    for item in workloads(items):
        for pod in pod_specs(item):
            volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
            for volume in volumes.values():
                if "persistentVolumeClaim" in volume and volume["persistentVolumeClaim"]["claimName"] not in claims:
                    yield f"{title(item)} claims {volume['persistentVolumeClaim']['claimName']}, which nobody makes"
                if "secret" in volume and volume["secret"]["secretName"] not in SECRETS:
                    yield f"{title(item)} wants the Secret {volume['secret']['secretName']}, of which the README says nothing"
            for container in pod["containers"]:
                mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", ())}
                for path in paths_of(items, item, container):
                    place = next((path.parents[n] for n in range(len(path.parents)) if str(path.parents[n]) in mounts), None)
                    place = path if str(path) in mounts else place
                    if place is None:
                        yield f"{title(item)} looks for {path}, and nothing is mounted there"
                        continue
                    secret = volumes[mounts[str(place)]].get("secret")
                    if secret and path.name not in SECRETS.get(secret["secretName"], ()):
                        yield f"{title(item)} looks for {path}, and {secret['secretName']} has no such key"


def paths_of(items: Sequence[Object], item: Object, container: Mapping[str, Any]) -> list[Path]:
    """The files and folders that a container's program is told of."""
    if item in servers(items):
        settings = settings_of(items, container)
        named = (settings.tls_cert, settings.tls_key, settings.tls_client_ca, settings.tokens_file)
        found = [path for path in named if path is not None]
        return [*found, settings.models_dir] if settings.models_dir.parts[:2] == ("/", "models") else found
    arguments = container.get("args", [])
    pairs = itertools.pairwise(arguments)
    flags = ("--runs-dir", "--models-dir", "--data-dir", "--out", "--ca", "--cert", "--key", "--token-file")
    return [Path(value) for flag, value in pairs if flag in flags]


def traffic_is_let_through(items: Sequence[Object]) -> Iterator[str]:
    """Callers, Prometheus and name look-ups; and the parity watch to the server."""
    policies = of(items, "NetworkPolicy")
    for item in of(items, "Deployment"):
        own = [policy for policy in policies if selects(policy["spec"]["podSelector"], labels_of(item))]
        if len(own) != 1:
            yield f"{title(item)} is selected by {[title(policy) for policy in own]}, not by one NetworkPolicy"
            continue
        spec, there = own[0]["spec"], ports_of(item)
        let_in = {port["port"] for rule in spec["ingress"] for port in rule["ports"]}
        if strangers := {name for name in let_in if name not in (*there, *there.values())}:
            yield f"{title(own[0])} lets in to {strangers}, which are no ports of {title(item)}"
        if missing := set(there) - {name for name in there if name in let_in or there[name] in let_in}:
            yield f"{title(own[0])} lets nobody in to {missing}"
        callers = {port["port"] for rule in spec["ingress"] if {"podSelector": {}} in rule["from"] for port in rule["ports"]}
        if item in servers(items) and callers != (wanted := called_at(settings_of(items, containers(item)[0]))):
            yield f"{title(own[0])} lets callers in to {sorted(callers)}, and {title(item)} answers them at {sorted(wanted)}"
        let_out = {(port["port"], port["protocol"]) for rule in spec["egress"] for port in rule["ports"]}
        if missing_out := {(53, "UDP"), (53, "TCP")} - let_out:
            yield f"{title(own[0])} lets no name be looked up: {sorted(missing_out)}"
        if item not in servers(items):
            reached = [
                server
                for rule in spec["egress"]
                for peer in rule["to"]
                if "podSelector" in peer and any(port["port"] == GRPC_PORT for port in rule["ports"])
                for server in servers(items)
                if selects(peer["podSelector"], labels_of(server))
            ]
            if not reached:
                yield f"{title(own[0])} keeps the watch from every server"


def called_at(settings: Settings) -> set[str]:
    """The ports at which callers get digits. Probes and metrics are not theirs, where they have a port without digits."""
    return {"grpc", "https" if settings.https else "http"} if settings.http_api else {"grpc"}


def disruptions_are_bounded(items: Sequence[Object]) -> Iterator[str]:
    budgets = of(items, "PodDisruptionBudget")
    for budget in budgets:
        if len(selected(items, budget["spec"]["selector"])) != 1:
            yield f"{title(budget)} does not select one workload"
        at_once = str(budget["spec"].get("maxUnavailable", budget["spec"].get("minAvailable")))
        if at_once != "1" or "maxUnavailable" not in budget["spec"]:
            yield f"{title(budget)} lets {at_once} pods go at once, not one"
    scaled = {each["spec"]["scaleTargetRef"]["name"] for each in of(items, "HorizontalPodAutoscaler", "ScaledObject")}
    for item in servers(items):
        if item["metadata"]["name"] in scaled and not [
            budget for budget in budgets if selects(budget["spec"]["selector"], labels_of(item))
        ]:
            yield f"{title(item)} has several pods and no disruption budget"


def scaling_finds_its_target_and_its_metric(items: Sequence[Object]) -> Iterator[str]:
    adapter = yaml.safe_load((DEPLOY / "monitoring" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    served = {rule["name"]["as"] for rule in adapter}
    deployments = {item["metadata"]["name"]: item for item in of(items, "Deployment")}
    targets = []
    for scaler in of(items, "HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]["name"]
        targets.append(target)
        if target not in deployments:
            yield f"{title(scaler)} scales {target}, which is not there"
            continue
        if "replicas" in deployments[target]["spec"]:
            yield f"{title(scaler)} scales {target}, which says how many replicas it has: each apply would reset them"
        queue = settings_of(items, containers(deployments[target])[0]).max_queue_images
        for value in thresholds(scaler):
            if not 16 <= value <= queue / 4:
                yield f"{title(scaler)} waits for {value:g} images to queue in a pod, of {queue} that may"
    for scaler in of(items, "HorizontalPodAutoscaler"):
        for metric in scaler["spec"]["metrics"]:
            if metric["pods"]["metric"]["name"] not in served:
                yield f"{title(scaler)} goes by {metric['pods']['metric']['name']}, and the adapter serves {served}"
    if len(targets) != len(set(targets)):
        yield f"two scale one Deployment: {targets}"


def thresholds(scaler: Object) -> list[float]:
    if scaler["kind"] == "ScaledObject":
        return [float(trigger["metadata"]["threshold"]) for trigger in scaler["spec"]["triggers"]]
    return [quantity(metric["pods"]["target"]["averageValue"]) for metric in scaler["spec"]["metrics"]]


def prometheus_finds_the_pods(items: Sequence[Object]) -> Iterator[str]:
    monitors = of(items, "PodMonitor")
    for monitor in monitors:
        found = selected(items, monitor["spec"]["selector"])
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            for item in found:
                if endpoint["port"] not in ports_of(item) or endpoint["path"] != "/metrics":
                    yield f"{title(monitor)} scrapes {endpoint['port']}{endpoint['path']}, which is not there on {title(item)}"
    for item in of(items, "Deployment"):
        watching = [monitor for monitor in monitors if selects(monitor["spec"]["selector"], labels_of(item))]
        if len(watching) != 1:
            yield f"{title(item)} is scraped by {[title(monitor) for monitor in watching]}, not by one PodMonitor"
        jobs = {monitor["metadata"]["name"] for monitor in watching}
        if jobs and jobs != {item["metadata"]["name"].removeprefix("dev-")}:
            yield f"{title(item)} is scraped as the job {jobs}, and alerts ask for its own name"


def memory_is_what_was_measured(items: Sequence[Object]) -> Iterator[str]:
    for item in servers(items):
        [container] = containers(item)
        for complaint in memory_complaints(container, settings_of(items, container)):
            yield f"{title(item)} {complaint}"
    for item in workloads(items):
        for container in containers(item):
            wanted, limits = (container["resources"].get(name, {}) for name in ("requests", "limits"))
            if "memory" not in limits or any(wanted.get(name) != value for name, value in limits.items()):
                yield f"{title(item)} is not guaranteed what it may take: {wanted} and {limits}"


def memory_complaints(container: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    """What is wrong with a server's memory: its base, what open calls may hold, and what those cost beside it must fit."""
    wanted, limits = container["resources"]["requests"], container["resources"].get("limits", {})
    fields = {each["name"]: each.get("valueFrom", {}).get("resourceFieldRef", {}) for each in container.get("env", ())}
    on_gpu = GPU in wanted
    instances = 1.0
    if not on_gpu:
        if fields.get("DIGITS_INSTANCES", {}).get("resource") != "requests.cpu":
            yield "runs as many instances as its node has cores: memory follows the node"
        instances = max(1.0, quantity(wanted["cpu"]))
    if "memory" not in limits:
        yield "has no memory limit: open calls may hold a part of the node's memory"
        return
    limit = quantity(limits["memory"]) / (1 << 20)
    base = MEMORY_MIB + MEMORY_MIB_PER_INSTANCE * instances + (CUDA_MIB if on_gpu else 0)
    budget = settings.max_inflight_mib or limit / BUDGET_SHARE
    if base + budget + BESIDE_MIB > limit:
        yield f"has {limit:.0f} MiB and may need {base:.0f}, {budget:.0f} for open calls and {BESIDE_MIB} beside them"


def gpus_are_asked_for_where_they_are_tolerated(items: Sequence[Object]) -> Iterator[str]:
    for item in workloads(items):
        for pod in pod_specs(item):
            wants = any(GPU in container["resources"]["limits"] for container in pod["containers"])
            tolerates = any(each["key"] == GPU for each in pod.get("tolerations", ()))
            if wants != tolerates:
                yield f"{title(item)} wants a GPU: {wants}; tolerates the taint of nodes that have some: {tolerates}"
    for item in servers(items):
        rolling = item["spec"]["strategy"]["rollingUpdate"]
        needs_gpu = any(GPU in container["resources"]["limits"] for container in containers(item))
        if (rolling["maxSurge"], rolling["maxUnavailable"]) != ((0, 1) if needs_gpu else (1, 0)):
            why = "with as many GPUs as pods that waits for ever" if needs_gpu else "a pod goes before its successor is there"
            yield f"{title(item)} rolls by {rolling}: {why}"


@cache
def built_images() -> frozenset[str]:
    """What ``make image`` builds."""
    found = set()
    for arguments in ("RUNTIME=cpu", "RUNTIME=gpu", "IMAGE_TARGET=train"):
        lines = subprocess.run(["make", "-n", "image", arguments], capture_output=True, text=True, check=True).stdout
        found |= set(re.findall(r"name=(\S+);", lines))
    assert len(found) == 3
    return frozenset(found)


def images_are_built_here(items: Sequence[Object]) -> Iterator[str]:
    for item in workloads(items):
        for container in containers(item):
            if container["image"] not in built_images():
                yield f"{title(item)} runs {container['image']}, which nobody builds"
            provider = settings_of(items, container).provider if item in servers(items) else ""
            if provider and container["image"].rpartition("-")[2] != {"cpu": "cpu", "cuda": "gpu"}[provider]:
                yield f"{title(item)} runs {container['image']} for --provider {provider}"


def pods_are_spread_and_have_their_account(items: Sequence[Object]) -> Iterator[str]:
    accounts = {item["metadata"]["name"] for item in of(items, "ServiceAccount")}
    for item in servers(items):
        [pod] = pod_specs(item)
        if pod["serviceAccountName"] not in accounts:
            yield f"{title(item)} runs as {pod['serviceAccountName']}, which nobody makes"
        spread = pod.get("topologySpreadConstraints", [])
        if {each["topologyKey"] for each in spread} != {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}:
            yield f"{title(item)} is not spread over zones and nodes"
        for each in spread:
            if not selects(each["labelSelector"], labels_of(item)) or "pod-template-hash" not in each.get("matchLabelKeys", ()):
                yield f"{title(item)} is spread by pods that are not of its own roll"


def pods_are_restricted(items: Sequence[Object]) -> Iterator[str]:
    for item in workloads(items):
        for pod in pod_specs(item):
            if item["kind"] != "ServingRuntime" and pod.get("automountServiceAccountToken") is not False:
                yield f"{title(item)} mounts an account's token"
            for container in pod["containers"]:
                security = {**pod.get("securityContext", {}), **container["securityContext"]}
                wanted = {
                    "runAsNonRoot": True, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
                }  # fmt: skip
                if off := {name for name, value in wanted.items() if security.get(name) != value}:
                    yield f"{title(item)} is not restricted: {sorted(off)}"


def jobs_outlive_evictions(items: Sequence[Object]) -> Iterator[str]:
    for item in of(items, "Job"):
        spec = item["spec"]
        rules = spec.get("podFailurePolicy", {}).get("rules", [])
        ignored = [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
        if rules != ignored:
            yield f"{title(item)} counts an eviction as a failure"
        if "ttlSecondsAfterFinished" not in spec:
            yield f"{title(item)} stays for ever when it is done"
        arguments = containers(item)[0]["args"]
        if "--shards" in arguments and arguments[arguments.index("--shards") + 1] != str(spec["completions"]):
            yield f"{title(item)} has {spec['completions']} completions and other shards: {arguments}"


def the_watch_finds_the_server(items: Sequence[Object]) -> Iterator[str]:
    services = {item["metadata"]["name"]: item for item in of(items, "Service")}
    for item in of(items, "Deployment"):
        for container in containers(item):
            arguments = container.get("args", [])
            if "--target" in arguments:
                host, _, port = arguments[arguments.index("--target") + 1].removeprefix("dns:///").rpartition(":")
                if host not in services or int(port) not in {each["port"] for each in services[host]["spec"]["ports"]}:
                    yield f"{title(item)} watches {host}:{port}, which is no Service"
                secure = any(settings_of(items, each).tls_cert for server in servers(items) for each in containers(server))
                if secure != ("--ca" in arguments):
                    yield f"{title(item)} speaks {'TLS' if '--ca' in arguments else 'plaintext'}, and the server does not"


def routes_lead_to_the_service(items: Sequence[Object]) -> Iterator[str]:
    services = {
        item["metadata"]["name"]: {port["name"]: port["port"] for port in item["spec"]["ports"]} for item in of(items, "Service")
    }
    for route in of(items, "GRPCRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                if backend["port"] not in services.get(backend["name"], {}).values():
                    yield f"{title(route)} leads to {backend['name']}:{backend['port']}, which is no Service"
    for policy in of(items, "BackendTLSPolicy"):
        for target in policy["spec"]["targetRefs"]:
            if target["sectionName"] not in services.get(target["name"], {}):
                yield f"{title(policy)} is of {target['name']}/{target['sectionName']}, which is no Service's port"


RELATIONS: Mapping[str, Relation] = {
    relation.__name__: relation
    for relation in (
        services_reach_one_workload_each, services_are_as_clients_know_them, the_server_gets_the_settings_it_is_given,
        probes_ask_what_the_server_answers, stopping_fits_into_the_grace_period, files_are_where_they_are_looked_for,
        traffic_is_let_through, disruptions_are_bounded, scaling_finds_its_target_and_its_metric, prometheus_finds_the_pods,
        memory_is_what_was_measured, gpus_are_asked_for_where_they_are_tolerated, images_are_built_here,
        pods_are_spread_and_have_their_account, pods_are_restricted, jobs_outlive_evictions, the_watch_finds_the_server,
        routes_lead_to_the_service,
    )
}  # fmt: skip


def complaints(items: Sequence[Object]) -> list[str]:
    """What is wrong between the objects of a namespace."""
    found = []
    for name, relation in RELATIONS.items():
        try:
            found += [f"{name}: {complaint}" for complaint in relation(items)]
        except SettingsError as error:  # the server would not start
            found.append(f"{name}: {error}")
    return found
