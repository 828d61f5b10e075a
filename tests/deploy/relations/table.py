"""What the objects of a namespace must have to do with each other, and with the program. Each yields complaints.

A schema says what an object may look like; these say that a Service reaches a pod, a probe asks what the server answers,
an autoscaler finds its target and its metric, and a pod gets the memory that the program was measured to take.
"""

from __future__ import annotations

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
from serve.settings import Settings, env_name
from tests.deploy.manifests import DEPLOY, Object, containers, containers_of, pod_specs, settings_of
from tests.deploy.relations.behaviour import PLATFORM
from tests.deploy.relations.network import who_may_reach_whom
from tests.deploy.relations.objects import (
    claims_of,
    failing_s,
    flags_of,
    labels_of,
    of,
    ports_of,
    selected,
    selects,
    servers,
    stopping_s,
    title,
    workloads,
)  # fmt: skip
from tests.deploy.relations.promises import INSTANCE, PROMISES
from tests.deploy.relations.server_rules import quantity

Relation = Callable[[Sequence[Object]], Iterator[str]]

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
PER_POD = "sum by (<<.GroupBy>>) (<<.Series>>{<<.LabelMatchers>>})"  # of prometheus-adapter: what it asks for a pod's metric


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
    for item in servers(items):
        name = item["metadata"]["name"]
        own = {each["metadata"]["name"] for each in of(items, "Service") if selects(each["spec"]["selector"], labels_of(item))}
        if own != {name, f"{name}-pods"}:
            yield f"{title(item)} is behind {sorted(own)}, not behind {name} and {name}-pods"
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
        if len(maps) != len(names) or not (maps or container.get("args")):
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
        if settings.reflection and labels_of(item).get(INSTANCE) != "dev":
            yield f"{title(item)} tells everybody its services"


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
            for container in containers_of(pod):
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
    files = ("--runs-dir", "--models-dir", "--data-dir", "--out", "--ca", "--cert", "--key", "--token-file")
    return [Path(value) for flag, value in flags_of(container).items() if flag in files]


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
        if item["metadata"]["name"] not in scaled and "replicas" not in item["spec"]:
            yield f"{title(item)} has one pod: nobody scales it"


def scaling_finds_its_target_and_its_metric(items: Sequence[Object]) -> Iterator[str]:
    adapter = yaml.safe_load((DEPLOY / "monitoring" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    served = {rule["name"]["as"] for rule in adapter}
    for rule in adapter:
        asked, resources = rule["metricsQuery"], rule["resources"].get("overrides")
        if asked != PER_POD or resources != {name: {"resource": name} for name in ("namespace", "pod")}:
            yield f"the adapter answers for others than one pod: {asked}, {resources}"
    deployments = {item["metadata"]["name"]: item for item in of(items, "Deployment")}
    targets = []
    for scaler in of(items, "HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]["name"]
        targets.append(target)
        if target not in deployments or scaler["spec"]["scaleTargetRef"].get("kind", "Deployment") != "Deployment":
            yield f"{title(scaler)} scales {scaler['spec']['scaleTargetRef']}, which is not there"
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
        jobs = {labels_of(item).get(monitor["spec"].get("jobLabel", "")) for monitor in watching}
        if jobs and jobs != {labels_of(item)["app.kubernetes.io/name"]}:
            yield f"{title(item)} is scraped as the job {jobs}, and alerts ask for its name"


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
            wants = any(GPU in container["resources"]["limits"] for container in containers_of(pod))
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
            for container in containers_of(pod):
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
            flags = flags_of(container)
            if "--target" not in flags:
                continue
            host, _, port = flags["--target"].removeprefix("dns:///").rpartition(":")
            if host not in services or int(port) not in {each["port"] for each in services[host]["spec"]["ports"]}:
                yield f"{title(item)} watches {host}:{port}, which is no Service"
                continue
            for server in selected(items, services[host]["spec"]["selector"]):
                settings = settings_of(items, containers(server)[0])
                if (settings.tls_cert is not None) != ("--ca" in flags):
                    yield f"{title(item)} speaks {'TLS' if '--ca' in flags else 'plaintext'}, and {title(server)} does not"
                if (settings.tls_client_ca is not None) != ("--cert" in flags) or ("--cert" in flags) != ("--key" in flags):
                    yield f"{title(item)} has no certificate that {title(server)} asks for, or one for nothing"
                if (settings.tokens_file is not None) != ("--token-file" in flags):
                    yield f"{title(item)} has no token that {title(server)} asks for, or one for nothing"
                if claims_of(item) != claims_of(server):
                    yield f"{title(item)} compares bundles that {title(server)} does not serve"


def routes_lead_to_the_service(items: Sequence[Object]) -> Iterator[str]:
    services = {
        item["metadata"]["name"]: {port["name"]: port["port"] for port in item["spec"]["ports"]} for item in of(items, "Service")
    }
    for route in of(items, "GRPCRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                if backend["port"] not in services.get(backend["name"], {}).values():
                    yield f"{title(route)} leads to {backend['name']}:{backend['port']}, which is no Service"
                secure = {
                    (target["name"], services.get(target["name"], {}).get(target["sectionName"]))
                    for policy in of(items, "BackendTLSPolicy")
                    for target in policy["spec"]["targetRefs"]
                }
                if secure != {(backend["name"], backend["port"])}:
                    yield f"{title(route)} leads to {backend['name']}:{backend['port']}, and by TLS to {secure}"


RELATIONS: Mapping[str, Relation] = {
    relation.__name__: relation
    for relation in (
        services_reach_one_workload_each, services_are_as_clients_know_them, the_server_gets_the_settings_it_is_given,
        probes_ask_what_the_server_answers, stopping_fits_into_the_grace_period, files_are_where_they_are_looked_for,
        who_may_reach_whom, disruptions_are_bounded, scaling_finds_its_target_and_its_metric, prometheus_finds_the_pods,
        memory_is_what_was_measured, gpus_are_asked_for_where_they_are_tolerated, images_are_built_here,
        pods_are_spread_and_have_their_account, pods_are_restricted, jobs_outlive_evictions, the_watch_finds_the_server,
        routes_lead_to_the_service, *PROMISES, *PLATFORM,
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
