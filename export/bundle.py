"""From a finished run to a published bundle: exported, compared, written beside, renamed into place."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export import parity
from export.errors import ExportError
from export.generator import ServedGenerator, fold
from export.to_fp16 import to_fp16
from export.to_onnx import OPSET, to_onnx
from export.to_torchscript import load_torchscript, to_torchscript
from serve import latents as address
from serve.errors import BundleError
from serve.manifest import (
    MANIFEST_FILE,
    NAME_PATTERN,
    ONNX_FILE,
    PARITY_FILE,
    PREVIEW_FILE,
    SCHEMA_VERSION,
    TORCHSCRIPT_FILE,
    Golden,
    Manifest,
    sha256,
)
from serve.repository import read_bundle
from train.checkpoint import RESULT_FILE, Run, latest_checkpoint
from train.models import build_generator

EAGER = "eager"
TORCHSCRIPT = "torchscript"
GOLDEN_SEED, GOLDEN_COUNT = 20_260_101, 8
PREVIEW_SEED, PREVIEW_SIDE = 0, 8
DISTRIBUTION = "standard normal, by the address rule of serve/latents.py"


@dataclass(frozen=True)
class Exported:
    """A published bundle's folder and the worst differences its parity check saw."""

    path: Path
    worst_images: float
    worst_pixel_levels: int


def export_run(run: Run, models_dir: Path, name: str | None = None, precision: str = "fp32") -> Exported:
    """Publish ``models_dir/<name>/<next version>/``. Raises ExportError, and then nothing has been published.

    The name is the preset's unless given, with ``-fp16`` behind it in that precision. TorchScript stays in fp32: it is
    what the ONNX graph is held against.
    """
    name = name or run.config.preset + ("-fp16" if precision == "fp16" else "")
    if not NAME_PATTERN.fullmatch(name):
        raise ExportError(f"--name {name!r} is no model name: lower-case letters, digits, - and _ are allowed")
    if not run.finished:
        raise ExportError(
            f"{run.folder} is not finished; finish it with: python -m train {run.config.preset} --resume {run.folder}"
        )
    checkpoint = latest_checkpoint(run)
    generator = build_generator(run.config)
    generator.load_state_dict(checkpoint["generator"])
    served = ServedGenerator(generator, *run.config.pixel_range).eval()
    graph = to_onnx(fold(served), run.config.latent_size)
    files = {
        ONNX_FILE: to_fp16(graph) if precision == "fp16" else graph,
        TORCHSCRIPT_FILE: to_torchscript(served),
        PREVIEW_FILE: _preview(served, run.config.latent_size),
    }
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        version=1,
        architecture=run.config.architecture,
        latent_size=run.config.latent_size,
        latent_distribution=DISTRIBUTION,
        labels=0,
        height=28,
        width=28,
        opset=OPSET,
        precision=precision,
        producers={
            package: version(package) for package in ("torch", "onnx", "onnxscript", "onnxruntime-gpu")
        } | {"python": platform.python_version()},
        training=_training(run, checkpoint),
        tolerance=parity.TOLERANCES[precision],
        golden=_golden(served, run.config.latent_size),
        files={},
    )  # fmt: skip
    forms = {EAGER: parity.torch_form(served)} | _stored_forms(files[ONNX_FILE], files[TORCHSCRIPT_FILE], manifest)
    report = parity.compare(EAGER, forms, manifest.latent_size, manifest.tolerance, _fresh_seed())
    files[PARITY_FILE] = (json.dumps(report, indent=2) + "\n").encode()
    path = _publish(models_dir, manifest, files)
    return Exported(path, report["worst_images"], report["worst_pixel_levels"])


def verify(path: Path) -> dict[str, Any]:
    """Compare a published bundle's TorchScript with its ONNX graph on fresh latents. Raises ExportError."""
    try:
        bundle = read_bundle(path)
    except BundleError as error:
        raise ExportError(str(error)) from None
    forms = _stored_forms(bundle.model, (path / TORCHSCRIPT_FILE).read_bytes(), bundle.manifest)
    return parity.compare(TORCHSCRIPT, forms, bundle.manifest.latent_size, bundle.manifest.tolerance, _fresh_seed())


def _stored_forms(model: bytes, script: bytes, manifest: Manifest) -> dict[str, parity.Form]:
    return {TORCHSCRIPT: parity.torch_form(load_torchscript(script))} | parity.serving_forms(model, manifest)


def _fresh_seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


def _training(run: Run, checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": run.config.to_json(),
        "provenance": run.provenance,
        "step": checkpoint["step"],
        "result": json.loads((run.folder / RESULT_FILE).read_text()),
    }


def _golden(served: ServedGenerator, latent_size: int) -> Golden:
    rows = address.draw(GOLDEN_SEED, 0, GOLDEN_COUNT, latent_size)
    pixels = parity.torch_form(served)(rows)["pixels"]
    return Golden(count=GOLDEN_COUNT, latents=rows.astype("<f4").tobytes(), pixels=pixels.tobytes())


def _preview(served: ServedGenerator, latent_size: int) -> bytes:
    rows = address.draw(PREVIEW_SEED, 0, PREVIEW_SIDE**2, latent_size)
    pixels = parity.torch_form(served)(rows)["pixels"]
    grid = pixels.reshape(PREVIEW_SIDE, PREVIEW_SIDE, 28, 28).swapaxes(1, 2).reshape(PREVIEW_SIDE * 28, -1)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grid)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _publish(models_dir: Path, manifest: Manifest, files: dict[str, bytes]) -> Path:
    parent = models_dir / manifest.name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=parent, prefix=".new-"))
        try:
            for name, content in files.items():
                _write_durably(scratch / name, content)
            digests = {name: sha256(content) for name, content in sorted(files.items())}
            scratch.chmod(0o755)
            while True:
                number = 1 + max((int(entry.name) for entry in parent.iterdir() if entry.name.isdecimal()), default=0)
                numbered = replace(manifest, version=number, files=digests)
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
