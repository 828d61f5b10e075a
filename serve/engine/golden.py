"""Checks at load: a session's output beside samples that eager PyTorch computed at export, and beside that of other batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.latents import Span, draw_span
from serve.manifest import Manifest

Compute = Callable[[NDArray[np.float32], NDArray[np.int64] | None], NDArray[np.float32]]


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
    """The difference of ``got`` (n, 28, 28) from ``expected`` as text; None when it is within tolerance."""
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


def batch_difference(manifest: Manifest, compute: Compute, sizes: Iterable[int]) -> str | None:
    """How a digit's float32 bits depend on its batch, in words; None when they do not, in batches of these ``sizes``.

    ``compute`` runs rows (n, z) with their labels as one batch. The first and the last rows of the largest batch are run again
    in batches of each smaller size.
    """
    largest, *smaller = sorted(set(sizes), reverse=True)
    latents, labels = draw_span(Span(0, 0, largest), manifest.latent_size, manifest.labels)
    whole = compute(latents, labels)
    for size in smaller:
        for rows in (slice(0, size), slice(largest - size, largest)):
            part = compute(latents[rows], None if labels is None else labels[rows])
            if part.tobytes() != whole[rows].tobytes():
                worst = float(np.abs(part - whole[rows]).max())
                return f"the same digits in batches of {size} and of {largest} differ by up to {worst:.1e}"
    return None
