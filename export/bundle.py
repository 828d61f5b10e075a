"""Publishes a finished run as a bundle: exported, compared with PyTorch, written beside its place, renamed into it."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from export import parity
from export.errors import ExportError
from export.generator import Form, ServedGenerator, fold, served_generator, torch_form
from export.graphs.to_fp16 import to_fp16
from export.graphs.to_onnx import OPSET, to_onnx
from export.graphs.to_tf32x3 import to_tf32x3
from export.graphs.to_torchscript import load_torchscript, to_torchscript
from serve.engine.onnx_runtime import ort
from serve.errors import BundleError
from serve.latents import Span, draw_span
from serve.manifest import (
    MANIFEST_FILE,
    NAME_PATTERN,
    ONNX_FILE,
    PARITY_FILE,
    PREVIEW_FILE,
    QUALITY_FILE,
    SCHEMA_VERSION,
    TORCHSCRIPT_FILE,
    Golden,
    Manifest,
    Precision,
    sha256,
)
from serve.models.repository import read_bundle
from train.checkpoint import RESULT_FILE, Run
from train.config import TrainConfig
from train.data.mnist import data_name
from train.evaluation import evaluate
from train.models import trained_generator, weights_digest
from train.runs import final_checkpoint, how_to_resume, make_variable

EAGER = "eager"
TORCHSCRIPT = "torchscript"
GOLDEN_SEED, GOLDEN_COUNT = 20_260_101, 8
PREVIEW_SEED, PREVIEW_SIDE = 0, 8
# What ``python -m export batch-size`` chooses for the bundled models; the mlp's on CUDA by the times of docs/measurements.md.
BATCH_SIZES = {"mlp": {"cpu": 64, "cuda": 4096}, "dcgan": {"cpu": 8}, "cdcgan": {"cpu": 8}, "rpgan": {"cpu": 8}}
# A run of 512 takes a model with convolutions 3.9 to 5.3 times as long as one of 64, and the mlp 1.4 (docs/gpu).
CONVOLUTION_BUCKETS = (1, 8, 64, 128, 256, 512, 1024)
CONVERSIONS: dict[Precision, Callable[[bytes], bytes]] = {"fp32": bytes, "fp16": to_fp16, "tf32x3": to_tf32x3}
ABANDONED_S = 3600.0
DISTRIBUTION = "standard normal, by the address rule of serve/latents.py"


@dataclass(frozen=True)
class Exported:
    """A published bundle's folder and the worst differences its parity check saw."""

    path: Path
    worst_images: float
    worst_pixel_levels: int


def export_run(
    run: Run,
    models_dir: Path,
    name: str | None = None,
    precision: Precision = "fp32",
    floors: Mapping[str, float] | None = None,
) -> Exported:
    """Publish ``models_dir/<name>/<next version>/``. Raises ExportError, and then nothing has been published.

    The name is the preset's unless given, with the precision behind it if it is not fp32. TorchScript stays in fp32: it is
    what the ONNX graph is held against. ``floors`` are what the run's judged quality must reach at least.
    """
    name = name or model_name(run, precision)
    checkpoint = check_run(run, models_dir, name, floors or {})
    quality = _quality(run, checkpoint, floors or {})
    served = served_generator(run.config, trained_generator(run.config, checkpoint))
    graph = to_onnx(fold(served), run.config)
    files = {
        ONNX_FILE: CONVERSIONS[precision](graph),
        TORCHSCRIPT_FILE: to_torchscript(served),
        PREVIEW_FILE: _preview(served, run.config),
    }
    if quality is not None:
        files[QUALITY_FILE] = quality
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        version=1,
        architecture=run.config.architecture,
        latent_size=run.config.latent_size,
        latent_distribution=DISTRIBUTION,
        labels=run.config.labels,
        height=28,
        width=28,
        opset=OPSET,
        precision=precision,
        producers={
            package: version(package) for package in ("torch", "onnx", "onnxscript")
        } | {"onnxruntime": ort.__version__, "python": platform.python_version()},
        training=_training(run, checkpoint),
        tolerance=parity.TOLERANCES[precision],
        golden=_golden(served, run.config),
        files={},
        batch_sizes=BATCH_SIZES[run.config.architecture],
        cuda_buckets=() if run.config.architecture == "mlp" else CONVOLUTION_BUCKETS,
    )  # fmt: skip
    forms = {EAGER: torch_form(served)} | _stored_forms(files[ONNX_FILE], files[TORCHSCRIPT_FILE], manifest)
    report = parity.compare(EAGER, forms, manifest, _fresh_seed())
    if precision == "tf32x3":  # where there are no matrix units the graph has float32 products, which prove little
        report["emulated"] = parity.on_matrix_units(files[ONNX_FILE], graph, manifest, _fresh_seed())
    files[PARITY_FILE] = (json.dumps(report, indent=2) + "\n").encode()
    path = _publish(models_dir, manifest, files)
    return Exported(path, report["worst_images"], report["worst_pixel_levels"])


def model_name(run: Run, precision: Precision) -> str:
    """The name that a run's model has unless another is given."""
    return run.config.preset + ("" if precision == "fp32" else f"-{precision}")


def check_run(run: Run, models_dir: Path, name: str, floors: Mapping[str, float]) -> dict[str, Any]:
    """What can be refused before anything is judged or exported; returns the run's last checkpoint. Raises ExportError."""
    if not NAME_PATTERN.fullmatch(name):
        raise ExportError(f"--name {name!r} is no model name: lower-case letters, digits, - and _ are allowed")
    if not run.finished:
        raise ExportError(f"{run.folder} is not finished; finish it with: {how_to_resume(run)}")
    if of_labels := floors_of_labels(run, floors):
        missing = f"{of_labels[0]} of {run.folder} is not known of a model without labels"
        raise ExportError(f"--min-quality: {missing}, and must be at least {floors[of_labels[0]]:g}")
    there = next(each for each in (models_dir / name, models_dir, *models_dir.absolute().parents) if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ExportError(f"cannot write a bundle to {there}; name another folder with --models-dir")
    return final_checkpoint(run)


def floors_of_labels(run: Run, floors: Mapping[str, float]) -> list[str]:
    """Those of ``floors`` that the run cannot reach: they are known of conditional models alone."""
    return [] if run.config.labels else sorted(evaluate.OF_LABELS & floors.keys())


def judged(run: Run) -> bool:
    """Whether the run has a quality.json of its last step that can be read."""
    try:
        return _quality(run, final_checkpoint(run), {}) is not None
    except ExportError:
        return False


def verify(path: Path) -> dict[str, Any]:
    """Compare a published bundle's TorchScript with its ONNX graph on fresh latents. Raises ExportError."""
    try:
        bundle = read_bundle(path)
    except BundleError as error:
        raise ExportError(str(error)) from None
    forms = _stored_forms(bundle.model, (path / TORCHSCRIPT_FILE).read_bytes(), bundle.manifest)
    return parity.compare(TORCHSCRIPT, forms, bundle.manifest, _fresh_seed())


def _stored_forms(model: bytes, script: bytes, manifest: Manifest) -> dict[str, Form]:
    return {TORCHSCRIPT: torch_form(load_torchscript(script))} | parity.serving_forms(model, manifest)


def _fresh_seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


def _training(run: Run, checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": run.config.to_json(),
        "provenance": run.provenance,
        "data": data_name(run.provenance.get("data", {})),
        "step": checkpoint["step"],
        "result": json.loads((run.folder / RESULT_FILE).read_bytes()),
    }


def _golden(served: ServedGenerator, config: TrainConfig) -> Golden:
    rows, labels = draw_span(Span(GOLDEN_SEED, 0, GOLDEN_COUNT), config.latent_size, config.labels)
    pixels = torch_form(served)(rows, labels)["pixels"]
    return Golden(
        count=GOLDEN_COUNT,
        latents=rows.astype("<f4").tobytes(),
        labels=b"" if labels is None else labels.astype("<i8").tobytes(),
        pixels=pixels.tobytes(),
    )


def _preview(served: ServedGenerator, config: TrainConfig) -> bytes:
    """Digits of one seed in rows of eight; of a conditional model a row for each label."""
    rows = config.labels or PREVIEW_SIDE
    latents, _ = draw_span(Span(PREVIEW_SEED, 0, rows * PREVIEW_SIDE), config.latent_size, config.labels)
    labels = np.repeat(np.arange(config.labels), PREVIEW_SIDE) if config.labels else None
    pixels = torch_form(served)(latents, labels)["pixels"]
    grid = pixels.reshape(rows, PREVIEW_SIDE, 28, 28).swapaxes(1, 2).reshape(rows * 28, -1)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grid)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _quality(run: Run, checkpoint: Mapping[str, Any], floors: Mapping[str, float]) -> bytes | None:
    """The run's quality.json, held against ``floors``; None when it was not judged. Raises ExportError."""
    path, way_out = run.folder / evaluate.QUALITY_FILE, f"judge it with: make evaluate{make_variable('RUN', run.folder)}"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if floors:
            raise ExportError(f"--min-quality: {run.folder} was not judged; {way_out}") from None
        return None
    try:
        report = json.loads(content)
        step, reached = report["step"], report["model"]
        if step != checkpoint["step"]:
            raise ExportError(f"{path} is of step {step}, and the run has come to step {checkpoint['step']}; {way_out}")
        weights = report.get("weights")  # reports of before 2026-12 do not have it
        if weights is not None and weights != weights_digest(trained_generator(run.config, checkpoint)):
            raise ExportError(f"{path} is of other weights than those of {run.folder}; {way_out}")
        for figure, floor in floors.items():
            value = reached[figure]
            good = value is not None and (value >= floor if evaluate.HIGHER_IS_BETTER[figure] else value <= floor)
            if not good:
                bound = "at least" if evaluate.HIGHER_IS_BETTER[figure] else "at most"
                shown = "not known of this model" if value is None else f"{value:.4g}"
                raise ExportError(f"--min-quality: {figure} of {run.folder} is {shown}, and must be {bound} {floor:g}")
    except (ValueError, KeyError, TypeError):
        raise ExportError(f"{path} cannot be read; {way_out}") from None
    return content


def _publish(models_dir: Path, manifest: Manifest, files: dict[str, bytes]) -> Path:
    parent = models_dir / manifest.name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for abandoned in parent.glob(".new-*"):  # by a killed process: writing takes a second
            if time.time() - abandoned.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(abandoned, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=parent, prefix=".new-"))
        try:
            for name, content in files.items():
                _write_durably(scratch / name, content)
            digests = {name: sha256(content) for name, content in sorted(files.items())}
            scratch.chmod(0o755)
            while True:
                number = 1 + max((int(entry.name) for entry in parent.iterdir() if entry.name.isdecimal()), default=0)
                numbered = msgspec.structs.replace(manifest, version=number, files=digests)
                _write_durably(scratch / MANIFEST_FILE, numbered.to_json().encode())
                try:
                    scratch.rename(parent / str(number))
                except OSError as error:
                    if (parent / str(number)).exists():  # another export took the number meanwhile
                        continue
                    raise error
                return parent / str(number)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    except OSError as error:
        raise ExportError(
            f"cannot write a bundle to {parent} ({error.strerror}); name another folder with --models-dir"
        ) from None


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
