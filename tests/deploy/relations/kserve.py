"""KServe's pods, as the Deployments that it makes of InferenceServices and their runtime, so that the same relations hold them.

Sources: kserve/kserve, pkg/controller/v1beta1/inferenceservice. Names, Services and autoscalers are KServe's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tests.deploy.manifests import Object
from tests.deploy.relations.behaviour import scrapes_are_of_this_namespace_and_answered, secrets_are_readable_by_the_pods_user
from tests.deploy.relations.network import who_may_reach_whom
from tests.deploy.relations.objects import of, title
from tests.deploy.relations.promises import (
    pods_run_where_their_images_do,
    settings_are_what_others_rely_on,
    times_fit_together,
    what_is_mounted_is_what_is_read,
)
from tests.deploy.relations.table import (
    files_are_where_they_are_looked_for,
    images_are_built_here,
    memory_is_what_was_measured,
    pods_are_restricted,
    probes_ask_what_the_server_answers,
    prometheus_finds_the_pods,
    stopping_fits_into_the_grace_period,
    the_server_gets_the_settings_it_is_given,
)

OF_THE_POD = ("runAsNonRoot", "runAsUser", "runAsGroup", "seccompProfile")
RELATIONS: Sequence[Callable[[Sequence[Object]], Iterator[str]]] = (
    scrapes_are_of_this_namespace_and_answered, secrets_are_readable_by_the_pods_user, who_may_reach_whom,
    pods_run_where_their_images_do, settings_are_what_others_rely_on, times_fit_together, what_is_mounted_is_what_is_read,
    files_are_where_they_are_looked_for, images_are_built_here, memory_is_what_was_measured, pods_are_restricted,
    probes_ask_what_the_server_answers, prometheus_finds_the_pods, stopping_fits_into_the_grace_period,
    the_server_gets_the_settings_it_is_given,
)  # fmt: skip


def complaints(items: Sequence[Object]) -> list[str]:
    """What is wrong with the pods of the InferenceServices among ``items``."""
    found = []
    for item in of(items, "InferenceService"):
        least, most = (item["spec"]["predictor"].get(name, 1) for name in ("minReplicas", "maxReplicas"))
        if not 1 <= least < most:
            found.append(f"{title(item)} scales from {least} to {most}")
    with_pods = [*(item for item in items if item["kind"] != "ServingRuntime"), *deployments(items)]
    return found + [f"{relation.__name__}: {complaint}" for relation in RELATIONS for complaint in relation(with_pods)]


def deployments(items: Sequence[Object]) -> Iterator[Object]:
    """One for each InferenceService; the port ``h2c``, KServe's word for gRPC in plaintext, has its name here."""
    runtimes = {item["metadata"]["name"]: item["spec"] for item in of(items, "ServingRuntime")}
    for item in of(items, "InferenceService"):
        predictor = item["spec"]["predictor"]
        runtime = runtimes[predictor["model"]["runtime"]]
        [given] = runtime["containers"]
        claim, _, _ = predictor["model"]["storageUri"].removeprefix("pvc://").partition("/")
        ports = [{**port, "name": port["name"].replace("h2c", "grpc")} for port in given["ports"]]
        mount = {"name": "models", "mountPath": "/mnt/models", "readOnly": True}
        pod = {
            **{name: predictor[name] for name in predictor.keys() - {"model", "labels", "minReplicas", "maxReplicas"}},
            "nodeSelector": runtime.get("nodeSelector", {}),
            "securityContext": {name: given["securityContext"][name] for name in OF_THE_POD},
            "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}],
            "containers": [{**given, "ports": ports, "volumeMounts": [mount]}],
        }
        yield {
            "kind": "Deployment",
            "metadata": {"name": f"{item['metadata']['name']}-predictor"},
            "spec": {"template": {"metadata": {"labels": predictor.get("labels", {})}, "spec": pod}},
        }
