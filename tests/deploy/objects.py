"""What the relations between a namespace's objects look at: workloads, their labels, ports, flags and times."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serve.server import DRAIN_OVERHEAD_S
from serve.settings import Settings
from tests.deploy.manifests import Object, containers, pod_specs, pod_templates

SERVER = {"app.kubernetes.io/name": "digits-serve"}


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
        there, wanted = each["key"] in labels, each["operator"] in ("In", "Exists")
        chosen = chosen and (there and labels[each["key"]] in each.get("values", [labels[each["key"]]])) == wanted
    return chosen


def selected(items: Sequence[Object], selector: Mapping[str, Any]) -> list[Object]:
    return [item for item in workloads(items) if item["kind"] != "ServingRuntime" and selects(selector, labels_of(item))]


def ports_of(item: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for each in containers(item) for port in each.get("ports", ())}


def stopping_s(settings: Settings) -> float:
    """The longest time from SIGTERM, or from a hung run, to the process's end."""
    return settings.drain_grace_s + settings.drain_deadline_s + DRAIN_OVERHEAD_S


def failing_s(probe: Mapping[str, Any]) -> float:
    """For how long a probe must fail to have an effect."""
    allowed: float = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
    return allowed


def claims_of(item: Object) -> set[str]:
    volumes = [volume for pod in pod_specs(item) for volume in pod.get("volumes", ())]
    return {volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume}


def flags_of(container: Mapping[str, Any]) -> dict[str, str]:
    """The flags with values of a command line, written either way; ``$(NAME)`` is replaced as the kubelet does it."""
    named = {each["name"]: each.get("value", "") for each in container.get("env", ())}
    words = [re.sub(r"\$\((\w+)\)", lambda match: named.get(match[1], match[0]), each) for each in container.get("args", ())]
    found = dict(each.split("=", 1) for each in words if each.startswith("--") and "=" in each)
    return found | {flag: value for flag, value in itertools.pairwise(words) if flag.startswith("--") and "=" not in flag}


def called_at(settings: Settings) -> set[str]:
    """The ports at which callers get digits. Probes and metrics are not theirs, where they have a port without digits."""
    return {"grpc", "https" if settings.https else "http"} if settings.http_api else {"grpc"}
