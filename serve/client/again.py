"""Generates a picture's digits again from its text chunk (serve/pictures.py), and compares them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.client.client import DigitClient
from serve.client.digits import Digits
from serve.client.errors import mistake, unusable
from serve.pictures import Origin, read_origin, read_pixels, to_grid

MOST_PICTURE_BYTES = 128 << 20  # the largest answer's digits, not packed at all
ROUNDING = 1  # grey levels that another kind of processor may make


def read_picture(path: Path) -> tuple[Origin, bytes]:
    """How a picture's digits were made, and its bytes. Raises DigitError in one line."""
    try:
        with path.open("rb") as file:
            png = file.read(MOST_PICTURE_BYTES)
        origin = read_origin(png)
    except OSError as error:
        raise mistake(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise mistake(f"{path}: {error}") from None
    if origin.seed is None:
        raise mistake(f"{path}: its digits have no address: they were made of latents, by {origin.model}/{origin.version}")
    return origin, png


def make_again(client: DigitClient, origin: Origin) -> Digits:
    """The digits of an origin that has an address, by the model file that the server has now. Raises DigitError."""
    assert origin.seed is not None
    by = {"model": origin.model, "version": origin.version, "truncation": origin.truncation}
    way, labels = origin.to, origin.labels
    if way is None:
        digits = client.generate(origin.count, seed=origin.seed, start=origin.index, labels=labels, **by)  # type: ignore[arg-type]  # by their names
        first = 0
    else:
        first, last = way.first, way.first + origin.count
        if len(labels) > 1:  # one for each step, also of those that are not in the picture
            labels = (labels[0],) * first + labels + (labels[-1],) * (way.steps - last)
        digits = client.interpolate((origin.seed, origin.index), (way.seed, way.index), way.steps, labels=labels, **by)  # type: ignore[arg-type]
    if digits.origin is None:
        raise unusable("it does not say by which model file")
    there = slice(first, first + origin.count)
    made = replace(origin, digest=digits.origin.digest)
    return replace(digits, pixels=digits.pixels[there], labels=digits.labels[there], origin=made)


def compared(origin: Origin, png: bytes, digits: Digits) -> tuple[bool, str]:
    """Whether digits that were made again equal the picture's within rounding, and a message."""
    assert digits.origin is not None
    digest, sheet = digits.origin.digest, to_grid(digits.pixels)
    before = read_pixels(png, *sheet.shape)
    if before is None:
        same, found = digest == origin.digest, "the picture was saved by another program, its pixels are not compared"
    else:
        levels = np.abs(sheet.astype(np.int16) - before)
        same, found = bool(levels.max() <= ROUNDING), _found(levels, digits)
    if digest == origin.digest:
        return same, f"by the same model file; {found}"
    return same, f"by another model file (SHA-256 {digest[:12]}…, the picture was made by {origin.digest[:12]}…); {found}"


def _found(levels: NDArray[np.int16], digits: Digits) -> str:
    height, width = digits.pixels.shape[1:]
    cells = levels.reshape(levels.shape[0] // height, height, -1, width).max(axis=(1, 3)).ravel()[: len(digits)]
    if not levels.any():
        return "the same pixels"
    return f"{np.count_nonzero(cells)} of {len(digits)} digits differ, by up to {levels.max()} grey levels"
