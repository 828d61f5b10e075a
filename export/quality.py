"""A bundle's own digits, judged as a run's are: for graphs that are not what the run made, as those in 8 bits."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import torch
from torch import Tensor

from export.batch_size import write_manifest
from export.errors import ExportError
from serve.config.atomic_file import replace_file
from serve.engine.factory import make_engine
from serve.engine.provider import EngineOptions
from serve.manifest import QUALITY_FILE, sha256
from serve.models.repository import Bundle
from train.evaluate import BATCH, Evaluator


def judge(bundle: Bundle, evaluator: Evaluator) -> dict[str, Any]:
    """Judge a bundle, write its ``quality.json`` and say so in its manifest; returns the report. Raises ExportError."""
    manifest = bundle.manifest
    engine = make_engine(bundle.model, manifest, EngineOptions(), BATCH)

    def pixels(rows: Tensor, labels: Tensor | None) -> Tensor:
        return torch.from_numpy(engine.compute(rows.numpy(), None if labels is None else labels.numpy())["pixels"])

    report = evaluator.report(evaluator.judged(pixels, manifest.latent_size, manifest.labels), int(manifest.training["step"]))
    content = (json.dumps(report, indent=2) + "\n").encode()
    path = bundle.path / QUALITY_FILE
    try:
        replace_file(path, content, 0o644)
    except OSError as error:
        raise ExportError(f"{path} cannot be written ({error.strerror})") from None
    write_manifest(bundle, msgspec.structs.replace(manifest, files={**manifest.files, QUALITY_FILE: sha256(content)}))
    return report
