"""The golden check: compares the output of a session with samples that eager PyTorch computed at export."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.manifest import Manifest


class GoldenSamples(NamedTuple):
    """The golden latents (n, z), a conditional model's labels (n,), and the pixels (n, 28, 28) that eager PyTorch made."""

    latents: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    pixels: NDArray[np.uint8]


def golden_samples(manifest: Manifest) -> GoldenSamples:
    """The manifest's golden samples as arrays."""
    golden = manifest.golden
    return GoldenSamples(
        np.frombuffer(golden.latents, "<f4").astype(np.float32).reshape(golden.count, manifest.latent_size),
        np.frombuffer(golden.labels, "<i8").astype(np.int64) if manifest.labels else None,
        np.frombuffer(golden.pixels, np.uint8).reshape(golden.count, manifest.height, manifest.width),
    )


def golden_difference(manifest: Manifest, expected: NDArray[np.uint8], got: NDArray[np.uint8]) -> str | None:
    """What is wrong with ``got`` (n, 28, 28) beside ``expected``, in words; None when it is within tolerance."""
    if got.shape != expected.shape:
        return f"golden samples came out as {got.shape}, not {expected.shape}"
    tolerance = manifest.tolerance
    levels = np.abs(got.astype(np.int16) - expected.astype(np.int16))
    worst = int(levels.max())
    identical = float((levels == 0).mean())
    if worst > tolerance.pixel_levels or identical < tolerance.pixel_identical_share:
        row = int(levels.reshape(len(levels), -1).sum(axis=1).argmax())
        return (
            f"golden sample {row} differs by up to {worst} levels ({identical:.2%} of all pixels identical); "
            f"allowed are {tolerance.pixel_levels} and {tolerance.pixel_identical_share:.2%}"
        )
    return None
