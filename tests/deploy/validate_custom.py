"""Custom resources against their makers' Python models: one JSON object a line in, one complaint a line out.

Runs where ``kserve`` and ``kubeflow-trainer-api`` are installed (build/integrations), and knows nothing of this project.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import kserve
import kubeflow_trainer_api.models as trainer
from kubernetes import client

MODELS = {
    "ServingRuntime": "V1alpha1ServingRuntime",
    "InferenceService": "V1beta1InferenceService",
    "TrainingRuntime": trainer.TrainerV1alpha1TrainingRuntime,
    "TrainJob": trainer.TrainerV1alpha1TrainJob,
}


def lost(given: Any, kept: Any, where: str = "") -> Iterator[str]:
    """What a model has not taken over: a field that it does not know, or a value that it reads otherwise."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key not in kept:
                yield f"{where}/{key} is not known"
            else:
                yield from lost(value, kept[key], f"{where}/{key}")
    elif isinstance(given, list) and isinstance(kept, list):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{where}/{number}")
    elif str(given) != str(kept):
        yield f"{where} is {given!r} and was read as {kept!r}"


def unknown(given: Any, kind: str, where: str = "") -> Iterator[str]:
    """What KServe's models have no name for; ``kind`` is a type as they write it, ``list[V1Container]`` say."""
    if kind.startswith("list["):
        for number, each in enumerate(given):
            yield from unknown(each, kind[5:-1], f"{where}/{number}")
    elif kind.startswith("dict("):
        for key, value in given.items():
            yield from unknown(value, kind[5:-1].split(", ", 1)[1], f"{where}/{key}")
    elif hasattr(kserve, kind):
        model = getattr(kserve, kind)
        fields = {shown: model.openapi_types[name] for name, shown in model.attribute_map.items()}
        for key, value in given.items():
            if key not in fields:
                yield f"{where}/{key} is not known to {kind}"
            else:
                yield from unknown(value, fields[key], f"{where}/{key}")
    elif hasattr(client, kind):
        yield from lost(given, client.ApiClient().sanitize_for_serialization(getattr(client, kind).from_dict(given)), where)


def complaints_of(item: dict[str, Any]) -> Iterator[str]:
    model = MODELS[item["kind"]]
    return unknown(item, model) if isinstance(model, str) else lost(item, model.from_dict(item).to_dict())


for line in sys.stdin.read().splitlines():
    item = json.loads(line)
    try:
        complaints = list(complaints_of(item))
    except Exception as error:  # each model library raises kinds of its own
        complaints = [" ".join(str(error).split())[:300]]
    for complaint in complaints:
        print(f"{item['kind']} {item['metadata']['name']}: {complaint}")
