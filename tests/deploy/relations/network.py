"""NetworkPolicies, evaluated against pretended pods: who reaches whom at which port, and who does not.

As the API defines it: policies that select a pod add up; a direction that none of them is about is open.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.deploy.manifests import Object, containers, pod_specs, settings_of
from tests.deploy.relations.objects import called_at, labels_of, of, ports_of, selects, servers, title

OWN_NAMESPACE = {"kubernetes.io/metadata.name": "digits"}
CLIENT = "digits-serve/client"


@dataclass(frozen=True)
class Peer:
    """Somebody at the other end: a pod, or an address outside where it has no namespace."""

    name: str
    namespace: Mapping[str, str] | None
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = "10.1.2.3"


def namespace(name: str, **labels: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": name} | labels


CALLER = Peer("a caller in a namespace with the label", namespace("mine", **{CLIENT: "true"}), {"app": "web"})
NEIGHBOUR = Peer("a caller in the same namespace", OWN_NAMESPACE, {"app": "web"})
PROMETHEUS = Peer("Prometheus", namespace("monitoring"), {"app.kubernetes.io/name": "prometheus"})
STRANGERS = (
    Peer("a pod of another namespace", namespace("other"), {"app": "web"}),
    Peer("a pod of a namespace whose label says no", namespace("other", **{CLIENT: "false"}), {"app": "web"}),
    Peer("a pod that calls itself Prometheus", namespace("other"), {"app.kubernetes.io/name": "prometheus"}),
    Peer("a pod that calls itself digits-serve", namespace("other"), {"app.kubernetes.io/name": "digits-serve"}),
    Peer("the internet", None, address="203.0.113.9"),
    Peer("a node of another network", None, address="192.168.7.7"),
)
DNS = Peer("the cluster's DNS", namespace("kube-system"), {"k8s-app": "kube-dns"})
# Policies see the pod's own port: its Service has 53, as everywhere.
OPENSHIFT_DNS = Peer("OpenShift's DNS", namespace("openshift-dns"), {"dns.operator.openshift.io/daemonset-dns": "default"})
COLLECTOR = Peer("the OpenTelemetry collector", namespace("monitoring"), {"app": "collector"})
METADATA = Peer("the cloud's metadata", None, address="169.254.169.254")


def who_may_reach_whom(items: Sequence[Object]) -> Iterator[str]:
    """Callers at the ports with digits, Prometheus at the metrics, the parity watch at its server; DNS from all; nobody else."""
    for item in of(items, "Deployment"):
        ports = ports_of(item)
        own = [each for each in of(items, "NetworkPolicy") if selects(each["spec"]["podSelector"], labels_of(item))]
        if len(own) != 1:
            yield f"{title(item)} is selected by {[title(policy) for policy in own]}, not by one NetworkPolicy"
        for policy in own:
            named = {port["port"] for rule in policy["spec"].get("ingress", ()) for port in rule.get("ports", ())}
            if strangers := {name for name in named if name not in (*ports, *ports.values())}:
                yield f"{title(policy)} lets in to {strangers}, which are no ports of {title(item)}"
        is_server = item in servers(items)
        digits = called_at(settings_of(items, containers(item)[0])) if is_server else set()
        for peer in (CALLER, NEIGHBOUR, PROMETHEUS, *STRANGERS):
            wanted = digits if peer in (CALLER, NEIGHBOUR) else {"http"} if peer is PROMETHEUS else set()
            reached = {name for name, number in ports.items() if is_let(own, "Ingress", peer, ports, number)}
            if reached != wanted:
                yield f"{peer.name} reaches {sorted(reached)} of {title(item)}, and should {sorted(wanted)}"
        names = [(DNS, 53, protocol) for protocol in ("UDP", "TCP")]
        if all("runAsUser" not in pod["securityContext"] for pod in pod_specs(item)):  # the platform chooses it: OpenShift
            names += [(OPENSHIFT_DNS, 5353, protocol) for protocol in ("UDP", "TCP")]
        for peer, port, protocol in (*names, *([(COLLECTOR, 4317, "TCP")] * is_server)):
            if not is_let(own, "Egress", peer, {}, port, protocol=protocol):
                yield f"{title(item)} cannot reach {peer.name} at {port}/{protocol}"
        for peer in (NEIGHBOUR, DNS, *STRANGERS, METADATA):
            if any(is_let(own, "Egress", peer, {}, port) for port in (443, 8080, 50051)):
                yield f"{title(item)} may call {peer.name}"
        if not is_server:
            yield from _a_watch(items, item, own)


def _a_watch(items: Sequence[Object], item: Object, own: Sequence[Object]) -> Iterator[str]:
    instance = "app.kubernetes.io/instance"
    for server in servers(items):
        its_own = labels_of(server).get(instance) == labels_of(item).get(instance)
        there = Peer(title(server), OWN_NAMESPACE, labels_of(server))
        for name, port in ports_of(server).items():
            if is_let(own, "Egress", there, ports_of(server), port) != (its_own and name == "grpc"):
                yield f"{title(item)} {'may not' if its_own and name == 'grpc' else 'may'} call {there.name} at {name}"
        policies = [each for each in of(items, "NetworkPolicy") if selects(each["spec"]["podSelector"], labels_of(server))]
        here = Peer(title(item), OWN_NAMESPACE, labels_of(item))
        if its_own and not is_let(policies, "Ingress", here, ports_of(server), ports_of(server)["grpc"]):
            yield f"{here.name} is not let in by {title(server)}"


def is_let(
    policies: Sequence[Object], direction: str, peer: Peer, ports: Mapping[str, int], port: int, *, protocol: str = "TCP"
) -> bool:
    """Whether traffic with a peer passes; ``ports`` are those of the pod that is called, by name."""
    about = [each["spec"] for each in policies if direction in each["spec"].get("policyTypes", ["Ingress"])]
    side = "from" if direction == "Ingress" else "to"
    rules = [rule for spec in about for rule in spec.get(direction.lower(), ())]
    return not about or any(
        _any(rule.get(side), lambda each: _is(each, peer))
        and _any(rule.get("ports"), lambda each: _at(each, ports, port, protocol))
        for rule in rules
    )


def _any(parts: Sequence[Mapping[str, Any]] | None, test: Any) -> bool:
    return not parts or any(map(test, parts))


def _at(rule: Mapping[str, Any], ports: Mapping[str, int], port: int, protocol: str) -> bool:
    if rule.get("protocol", "TCP") != protocol:
        return False
    first = ports.get(rule["port"], -1) if isinstance(rule.get("port"), str) else rule.get("port", port)
    return bool(first <= port <= rule.get("endPort", first))


def _is(rule: Mapping[str, Any], peer: Peer) -> bool:
    if "ipBlock" in rule:
        networks = [ipaddress.ip_network(rule["ipBlock"]["cidr"]), *map(ipaddress.ip_network, rule["ipBlock"].get("except", ()))]
        inside = [ipaddress.ip_address(peer.address) in network for network in networks]
        return inside[0] and not any(inside[1:])
    if peer.namespace is None:
        return False
    there = selects(rule["namespaceSelector"], peer.namespace) if "namespaceSelector" in rule else peer.namespace == OWN_NAMESPACE
    return there and selects(rule.get("podSelector", {}), peer.labels)
