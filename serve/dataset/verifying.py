"""Computes some of a data set's digits anew, at random addresses, and compares them with those that were written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.dataset.header import HEADER_FILE
from serve.dataset.joining import Whole, open_whole
from serve.dataset.shards import BATCH
from serve.engine.cuda_engine import make_checked_engine
from serve.engine.provider import EngineOptions
from serve.errors import SettingsError
from serve.models.repository import Bundle


class Verified(NamedTuple):
    """How many digits were made anew, and how many of them have the bytes that were written: the others differ by rounding."""

    digits: int
    identical: int


def verify(folder: Path, bundle: Bundle, options: EngineOptions, sample: int) -> Verified:
    """Compute ``sample`` digits anew, or all where there are fewer. Raises SettingsError naming the first that is another."""
    whole = open_whole(folder)
    check_bundle(whole, bundle)
    engine = make_checked_engine(bundle.model, bundle.manifest, options, BATCH)
    try:
        places = sorted(random.sample(range(whole.dataset.count), min(sample, whole.dataset.count)))
        identical = 0
        for first in range(0, len(places), BATCH):
            some = np.array(places[first : first + BATCH])
            written, indices = _written(whole, some)
            made = engine.compute(*whole.dataset.chosen_rows(indices, whole.dataset.start + some))["pixels"]
            levels = np.abs(made.astype(np.int16) - written).max(axis=(1, 2))
            if wrong := np.flatnonzero(levels > bundle.manifest.tolerance.pixel_levels).tolist():
                place, index = some[wrong[0]], indices[wrong[0]]
                part = whole.parts[whole.dataset.shard_of(int(place))]
                raise SettingsError(
                    f"{part}: digit {place} (index {index} of the stream) differs by up to {levels[wrong[0]]} grey levels from"
                    " the one at its address; delete the file and write the shard again"
                )
            identical += int((levels == 0).sum())
    finally:
        engine.close()
    return Verified(len(places), identical)


def check_bundle(whole: Whole, bundle: Bundle) -> None:
    """Raises SettingsError when the data set is of another model file."""
    if bundle.digest != whole.dataset.digest:
        raise SettingsError(
            f"{whole.folder} was made by {whole.dataset.model}/{whole.dataset.version} with the SHA-256 {whole.dataset.digest},"
            f" and {bundle.path} has {bundle.digest}; name the --models-dir that has the former"
        )
    dataset, manifest = whole.dataset, bundle.manifest
    if any(getattr(dataset, name) != getattr(manifest, name) for name in ("latent_size", "height", "width")) or (
        dataset.classes != manifest.labels
    ):
        raise SettingsError(
            f"{whole.folder / HEADER_FILE} does not say what {dataset.model}/{dataset.version} makes; it is damaged"
        )


def _written(whole: Whole, places: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The pixels (n, height, width) and stream indices (n,) of some digits as they were written."""
    dataset = whole.dataset
    pixels = np.empty((len(places), dataset.height, dataset.width), np.uint8)
    indices = np.empty(len(places), np.int64)
    for row, place in enumerate(places.tolist()):
        pixels[row] = np.frombuffer(b"".join(whole.pixels(place, 1)), np.uint8).reshape(pixels.shape[1:])
        [indices[row]] = whole.indices(place, 1)
    return pixels, indices
