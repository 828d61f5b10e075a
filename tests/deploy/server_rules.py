"""Rules across fields that a Kubernetes API server holds objects to and published schemas cannot say, for the kinds used here.

Each yields complaints, in the API server's words where that is short. Sources: kubernetes/kubernetes,
pkg/apis/{core,apps,batch,autoscaling,policy,networking}/validation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tests.deploy.manifests import Object, containers_of, pod_specs, pod_templates

Rule = Callable[[Object], Iterator[str]]

HANDLERS = ("exec", "httpGet", "tcpSocket", "grpc", "sleep")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]*[a-z0-9])?")
UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def quantity(text: str) -> float:
    """A resource quantity as a number. Raises KeyError or ValueError."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def twice(names: Iterable[Any]) -> list[Any]:
    return [name for name, count in Counter(names).items() if count > 1]


def names_and_labels(item: Object) -> Iterator[str]:
    name = item["metadata"]["name"]
    if len(name) > 253 or not NAME.fullmatch(name):
        yield f"metadata.name {name!r} is no DNS subdomain"
    for metadata in (item["metadata"], *(template.get("metadata", {}) for template in pod_templates(item))):
        for key, value in metadata.get("labels", {}).items():
            if not isinstance(value, str) or len(value) > 63 or not LABEL.fullmatch(value):
                yield f"label {key}: {value!r} is no label value"


def workload_selector(item: Object) -> Iterator[str]:
    if item["kind"] != "Deployment":
        return
    wanted = item["spec"]["selector"]["matchLabels"]
    labels = item["spec"]["template"]["metadata"]["labels"]
    if not wanted.items() <= labels.items():
        yield f"selector {wanted} does not match the template's labels {labels}"


def rollout(item: Object) -> Iterator[str]:
    strategy = item["spec"].get("strategy", {}) if item["kind"] == "Deployment" else {}
    rolling = strategy.get("rollingUpdate")
    if strategy.get("type") == "Recreate" and rolling:
        yield "rollingUpdate may not be specified when strategy type is Recreate"
    if rolling and str(rolling.get("maxSurge", 1)) in ("0", "0%") and str(rolling.get("maxUnavailable", 1)) in ("0", "0%"):
        yield "maxUnavailable may not be 0 when maxSurge is 0"


def handlers(item: Object) -> Iterator[str]:
    for pod in pod_specs(item):
        for container in containers_of(pod):
            holders = {probe: container[probe] for probe in PROBES if probe in container} | container.get("lifecycle", {})
            for where, holder in holders.items():
                found = [name for name in HANDLERS if holder.get(name) is not None]
                if len(found) != 1:
                    yield f"{where}: must have exactly one handler, has {found}"
                if where in ("startupProbe", "livenessProbe") and holder.get("successThreshold", 1) != 1:
                    yield f"{where}: successThreshold must be 1"
                if "sleep" in holder and not 0 < holder["sleep"]["seconds"] <= pod.get("terminationGracePeriodSeconds", 30):
                    yield f"{where}: sleep must be over 0 and within the grace period"
                for field in ("periodSeconds", "timeoutSeconds", "failureThreshold"):
                    if holder.get(field, 1) < 1:
                        yield f"{where}: {field} must be 1 or more"


def volumes(item: Object) -> Iterator[str]:
    for pod in pod_specs(item):
        found = pod.get("volumes", [])
        yield from (f"volume {name} is there twice" for name in twice(volume["name"] for volume in found))
        for volume in found:
            if len(volume) != 2:
                yield f"volume {volume['name']} must have exactly one source, has {sorted(volume.keys() - {'name'})}"
        for container in containers_of(pod):
            mounts = container.get("volumeMounts", [])
            yield from (f"mountPath {path} is there twice" for path in twice(mount["mountPath"] for mount in mounts))
            known = {volume["name"] for volume in found}
            yield from (f"volumeMount {mount['name']} is of no volume" for mount in mounts if mount["name"] not in known)


def containers_and_ports(item: Object) -> Iterator[str]:
    for pod in pod_specs(item):
        yield from (f"container {name} is there twice" for name in twice(each["name"] for each in containers_of(pod)))
        for container in containers_of(pod):
            ports = container.get("ports", [])
            yield from (f"port {name} is there twice" for name in twice(port["name"] for port in ports))
            for port in ports:
                if len(port["name"]) > 15 or not PORT_NAME.fullmatch(port["name"]):
                    yield f"port name {port['name']!r} must be at most 15 lower-case characters"
                if not 0 < port["containerPort"] < 1 << 16:
                    yield f"containerPort {port['containerPort']} must be from 1 to 65535"
            for variable in container.get("env", []):
                if ("value" in variable) == ("valueFrom" in variable):
                    yield f"env {variable['name']} must have one of value and valueFrom"
                source = variable.get("valueFrom", {}).get("resourceFieldRef")
                if source and source["containerName"] not in {each["name"] for each in containers_of(pod)}:
                    yield f"resourceFieldRef names no container: {source['containerName']}"
            for source in container.get("envFrom", []):
                if len(source.keys() & {"configMapRef", "secretRef"}) != 1:
                    yield "envFrom must have one of configMapRef and secretRef"


def resources(item: Object) -> Iterator[str]:
    for pod in pod_specs(item):
        for container in containers_of(pod):
            wanted, limits = (container.get("resources", {}).get(name, {}) for name in ("requests", "limits"))
            for name, value in (*wanted.items(), *limits.items()):
                try:
                    quantity(value)
                except (KeyError, ValueError, AttributeError):
                    yield f"{name} {value!r} is no quantity"
                    return
            for name in wanted.keys() & limits.keys():
                if quantity(wanted[name]) > quantity(limits[name]):
                    yield f"{name}: the request {wanted[name]} must be at most the limit {limits[name]}"
            for name in limits:
                if "/" in name and wanted.get(name, limits[name]) != limits[name]:
                    yield f"{name}: request and limit of a device must be equal"


def spread(item: Object) -> Iterator[str]:
    for pod in pod_specs(item):
        found = [(each["topologyKey"], each["whenUnsatisfiable"]) for each in pod.get("topologySpreadConstraints", [])]
        yield from (f"topologySpreadConstraint {each} is there twice" for each in twice(found))
        for each in pod.get("topologySpreadConstraints", []):
            if each["maxSkew"] < 1:
                yield "maxSkew must be over 0"
            if set(each.get("matchLabelKeys", ())) & each["labelSelector"].get("matchLabels", {}).keys():
                yield "a label is in matchLabelKeys and in the selector"


def restarts(item: Object) -> Iterator[str]:
    for pod in pod_specs(item):
        policy = pod.get("restartPolicy", "Always")
        if item["kind"] == "Deployment" and policy != "Always":
            yield f"restartPolicy of a Deployment must be Always, is {policy}"
        if item["kind"] == "Job" and policy not in ("Never", "OnFailure"):
            yield f"restartPolicy of a Job must be Never or OnFailure, is {policy}"


def job(item: Object) -> Iterator[str]:
    if item["kind"] != "Job":
        return
    spec = item["spec"]
    if "podFailurePolicy" in spec and spec["template"]["spec"].get("restartPolicy") != "Never":
        yield "only restartPolicy Never can be used with podFailurePolicy"
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield "a rule of podFailurePolicy must have one of onExitCodes and onPodConditions"
    indexed = spec.get("completionMode") == "Indexed"
    if indexed and "completions" not in spec:
        yield "completions is required when completionMode is Indexed"
    if "backoffLimitPerIndex" in spec and not indexed:
        yield "backoffLimitPerIndex requires completionMode Indexed"
    if "maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec:
        yield "maxFailedIndexes requires backoffLimitPerIndex"
    if spec.get("maxFailedIndexes", 0) > spec.get("completions", 1):
        yield "maxFailedIndexes must be at most completions"


def disruption_budget(item: Object) -> Iterator[str]:
    if item["kind"] == "PodDisruptionBudget" and ("minAvailable" in item["spec"]) == ("maxUnavailable" in item["spec"]):
        yield "minAvailable and maxUnavailable cannot be both set, or both missing"


def autoscaler(item: Object) -> Iterator[str]:
    if item["kind"] != "HorizontalPodAutoscaler":
        return
    spec = item["spec"]
    if spec.get("minReplicas", 1) > spec["maxReplicas"]:
        yield "minReplicas must be at most maxReplicas"
    for metric in spec["metrics"]:
        if metric["type"] == "Pods" and metric["pods"]["target"]["type"] != "AverageValue":
            yield "target.type of a Pods metric must be AverageValue"
    for direction, behaviour in spec.get("behavior", {}).items():
        if not 0 <= behaviour.get("stabilizationWindowSeconds", 0) <= 3600:
            yield f"{direction}: stabilizationWindowSeconds must be from 0 to 3600"
        for policy in behaviour.get("policies", []):
            if policy["value"] < 1 or not 0 < policy["periodSeconds"] <= 1800:
                yield f"{direction}: a policy's value must be over 0 and its period from 1 to 1800"


def service(item: Object) -> Iterator[str]:
    if item["kind"] != "Service":
        return
    spec = item["spec"]
    ports = spec["ports"]
    if len(ports) > 1 and any("name" not in port for port in ports):
        yield "ports must be named where there are several"
    yield from (f"port {name} is there twice" for name in twice(port.get("name") for port in ports))
    yield from (f"port {number} is there twice" for number in twice((port["port"], port.get("protocol")) for port in ports))
    if spec.get("clusterIP") == "None" and spec.get("type", "ClusterIP") != "ClusterIP":
        yield "clusterIP None is for type ClusterIP"


def network_policy(item: Object) -> Iterator[str]:
    if item["kind"] != "NetworkPolicy":
        return
    spec = item["spec"]
    for direction in ("ingress", "egress"):
        if direction in spec and direction.capitalize() not in spec.get("policyTypes", ["Ingress"]):
            yield f"{direction} is not in policyTypes"
        for rule in spec.get(direction, []):
            for port in rule.get("ports", []):
                if isinstance(port.get("port"), str) and "endPort" in port:
                    yield "endPort needs a number for port"
            for peer in (*rule.get("from", ()), *rule.get("to", ())):
                if not peer or ("ipBlock" in peer and len(peer) > 1):
                    yield "a peer must have a selector, or an ipBlock alone"


RULES: Mapping[str, Rule] = {
    rule.__name__: rule
    for rule in (
        names_and_labels, workload_selector, rollout, handlers, volumes, containers_and_ports, resources, spread, restarts, job,
        disruption_budget, autoscaler, service, network_policy,
    )
}  # fmt: skip


def refused(items: Iterable[Object]) -> list[str]:
    """What an API server would refuse, object by object."""
    found = []
    for item in items:
        for name, rule in RULES.items():
            found += [f"{item['kind']}/{item['metadata']['name']}: {name}: {complaint}" for complaint in rule(item)]
    return found
