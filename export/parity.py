"""Checks that eager PyTorch, TorchScript and ONNX Runtime compute the same: names, axes, shapes, values, in that order.

ONNX Runtime runs through ``serve.engine.session.Engine``, the same session that serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.errors import AxesDifferError, NamesDifferError, ShapesDifferError, ValuesDifferError
from export.generator import Arrays, Form
from export.graphs.emulation import emulate
from serve.engine.cuda_engine import make_engine
from serve.engine.provider import EngineOptions, choose_provider
from serve.engine.session import PIXELS_AND_IMAGES, Engine
from serve.errors import ProviderError
from serve.manifest import Manifest, Tolerance

BATCH_SIZES = (1, 2, 3, 7, 64, 257)

# fp32 on both sides: the three forms agreed to 3e-7 when measured; 1e-5 leaves room for other processors.
FP32_TOLERANCE = Tolerance(images=1e-5, pixel_levels=1, pixel_identical_share=0.999)

# fp16 keeps 11 bits: 2.9e-3 and 98.7 % identical pixels by emulation (docs/measurements.md); a GPU may also add up in it.
FP16_TOLERANCE = Tolerance(images=1e-2, pixel_levels=3, pixel_identical_share=0.9)

# tf32x3 on matrix units, by the model of export/graphs/emulation.py: up to 1e-5 (dcgan), thrice of which is allowed.
TF32X3_TOLERANCE = Tolerance(images=3e-5, pixel_levels=1, pixel_identical_share=0.999)
TOLERANCES = {"fp32": FP32_TOLERANCE, "fp16": FP16_TOLERANCE, "tf32x3": TF32X3_TOLERANCE}
EMULATED_DIGITS = 4  # it takes seconds a digit


def engine_form(engine: Engine) -> Form:
    """A serving session as a function on arrays."""

    def run(latents: NDArray[np.float32], labels: NDArray[np.int64] | None) -> Arrays:
        return engine.compute(latents, labels, PIXELS_AND_IMAGES)

    return run


def serving_forms(model: bytes, manifest: Manifest) -> dict[str, Form]:
    """ONNX Runtime on the CPU, and on CUDA where this machine has it (TF32 off, as the engine sets it)."""
    forms = {"onnxruntime-cpu": engine_form(make_engine(model, manifest, EngineOptions(), max(BATCH_SIZES)))}
    try:
        choose_provider("cuda")
    except ProviderError:
        return forms
    on_cuda = make_engine(model, manifest, EngineOptions(provider="cuda"), max(BATCH_SIZES))
    return forms | {"onnxruntime-cuda": engine_form(on_cuda)}


def compare(reference: str, forms: Mapping[str, Form], manifest: Manifest, seed: int) -> dict[str, Any]:
    """Compare every form with ``forms[reference]`` on fresh random latents, and labels, of every batch size.

    Returns the report. Raises a ParityError naming the pair, the batch size and the worst element.
    """
    tolerance = manifest.tolerance
    generator = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for batch in BATCH_SIZES:
        latents = generator.standard_normal((batch, manifest.latent_size), dtype=np.float32)
        labels = generator.integers(manifest.labels, size=batch) if manifest.labels else None
        expected = forms[reference](latents, labels)
        for name, form in forms.items():
            if name != reference:
                where = f"{reference} and {name}, batch size {batch}"
                rows.append(
                    {
                        "pair": [reference, name],
                        "batch_size": batch,
                        **difference(expected, form(latents, labels), tolerance, where),
                    }
                )
    _check_identical_share(rows, tolerance)
    return {
        "reference": reference,
        "forms": list(forms),
        "batch_sizes": list(BATCH_SIZES),
        "latents_seed": seed,
        "tolerance": {"images": tolerance.images, "pixel_levels": tolerance.pixel_levels,
                      "pixel_identical_share": tolerance.pixel_identical_share},
        "worst_images": max(row["images_max_abs"] for row in rows),
        "worst_pixel_levels": max(row["pixel_levels_max"] for row in rows),
        "rows": rows,
    }  # fmt: skip


def on_matrix_units(model: bytes, plain: bytes, manifest: Manifest, seed: int) -> dict[str, Any]:
    """How far a graph is from float64 on an emulation of matrix units, beside the ``plain`` float32 graph as it is and in TF32.

    Raises a ParityError when the graph is beyond the manifest's tolerance.
    """
    generator = np.random.default_rng(seed)
    feeds: dict[str, NDArray[Any]] = {
        "latents": generator.standard_normal((EMULATED_DIGITS, manifest.latent_size), dtype=np.float32)
    }
    if manifest.labels:
        feeds["labels"] = generator.integers(manifest.labels, size=EMULATED_DIGITS)
    expected = emulate(plain, feeds, "float64")
    forms = {
        manifest.precision: emulate(model, feeds, "matrix units"),
        "fp32": emulate(plain, feeds, "float32"),
        "tf32": emulate(plain, feeds, "matrix units"),
    }
    anything = Tolerance(images=0.999, pixel_levels=255, pixel_identical_share=0)
    own = difference(expected, forms[manifest.precision], manifest.tolerance, f"float64 and emulated {manifest.precision}")
    others = {name: difference(expected, forms[name], anything, name) for name in ("fp32", "tf32")}
    return {"reference": "float64", "digits": EMULATED_DIGITS, "latents_seed": seed, manifest.precision: own} | others


def difference(expected: Arrays, got: Arrays, tolerance: Tolerance, where: str) -> dict[str, float]:
    """How far ``got`` is from ``expected``. Raises the ParityError of the first thing that is off."""
    if set(expected) != set(got):
        raise NamesDifferError(f"{where}: outputs are called {sorted(got)}, not {sorted(expected)}")
    for name, array in expected.items():
        if got[name].ndim != array.ndim:
            raise AxesDifferError(f"{where}: {name} has {got[name].ndim} axes, not {array.ndim}")
    for name, array in expected.items():
        if got[name].shape != array.shape:
            raise ShapesDifferError(f"{where}: {name} has shape {got[name].shape}, not {array.shape}")
    images = np.abs(expected["images"].astype(np.float64) - got["images"])
    levels = np.abs(expected["pixels"].astype(np.int16) - got["pixels"].astype(np.int16))
    identical = float((levels == 0).mean())
    # A NaN compares as neither within nor beyond: only "within" may pass.
    if not images.max() <= tolerance.images:
        at = tuple(int(axis) for axis in np.unravel_index(np.nanargmax(np.nan_to_num(images, nan=np.inf)), images.shape))
        raise ValuesDifferError(
            f"{where}: images differ by {images[at]:.3g} at {at} ({expected['images'][at]:.6g} and {got['images'][at]:.6g}); "
            f"allowed is {tolerance.images:g}"
        )
    if levels.max() > tolerance.pixel_levels:
        at = tuple(int(axis) for axis in np.unravel_index(levels.argmax(), levels.shape))
        raise ValuesDifferError(f"{where}: pixels differ by {levels.max()} levels at {at}; allowed is {tolerance.pixel_levels}")
    return {
        "images_max_abs": float(images.max()),
        "pixel_levels_max": int(levels.max()),
        "pixels_identical_share": identical,
    }


def _check_identical_share(rows: list[dict[str, Any]], tolerance: Tolerance) -> None:
    """Each pair's share of identical pixels, over all its batch sizes together.

    In a single digit one pixel of 784 is more than a thousandth already, and a value that happens to lie on the border
    between two levels may round either way.
    """
    for pair in {tuple(row["pair"]) for row in rows}:
        own = [row for row in rows if tuple(row["pair"]) == pair]
        total = sum(row["batch_size"] for row in own)
        share = sum(row["batch_size"] * row["pixels_identical_share"] for row in own) / total
        if share < tolerance.pixel_identical_share:
            worst = min(own, key=lambda row: row["pixels_identical_share"])
            raise ValuesDifferError(
                f"{' and '.join(pair)}: {share:.4%} of all pixels are identical, allowed is "
                f"{tolerance.pixel_identical_share:.2%}; worst at batch size {worst['batch_size']}"
            )
