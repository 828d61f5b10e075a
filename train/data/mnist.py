"""MNIST, or another set of its format, as two tensors per part: from a folder, which is filled first if it is empty.

Whatever the source, the SHA-256 of the raw idx files is checked before use and recorded with the
run. A folder may contain another set in idx format if its ``SHA256SUMS`` lists the digests (the tests' small subset does).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.config import TrainConfig
from train.data import sums
from train.data.fetch import fetch_mnist
from train.data.files import DIGESTS, RAW, find_files, is_empty, read_file, read_idx, unlike_mnist
from train.errors import DataError

log = logging.getLogger(__name__)

DEFAULT_DATA_DIR = Path("data/mnist")
SIDE = 28
UNKNOWN_LABEL = 255  # of an unconditional model's digits in a data set of serve.dataset


@dataclass(frozen=True)
class Mnist:
    """Images uint8 (n, 28, 28) and labels int64 (n,) of both parts, with the digests of the files they came from."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    digests: dict[str, str]

    @property
    def classes(self) -> int:
        """How many labels there are: 0 up to the highest of both parts. Raises DataError for images without labels."""
        if not self.labelled:
            raise DataError(
                f"the data has label {UNKNOWN_LABEL}, which stands for none: train a preset without labels on it, as dcgan"
            )
        return 1 + int(torch.cat((self.train_labels, self.test_labels)).max())

    @property
    def labelled(self) -> bool:
        return not bool((self.train_labels == UNKNOWN_LABEL).any())

    @property
    def is_mnist(self) -> bool:
        return self.digests == DIGESTS


def load_mnist(data_dir: Path) -> Mnist:
    """Load the set from ``data_dir``, or its ``MNIST/raw``; a folder that is empty is filled first. Raises DataError."""
    if data_dir != DEFAULT_DATA_DIR and not data_dir.parent.exists():
        raise DataError(f"--data-dir {data_dir}: there is no {data_dir.parent}; make it, or leave the flag out")
    found = find_files(data_dir)
    if not found.paths:
        if not is_empty(data_dir):
            raise unlike_mnist(data_dir)
        fetch_mnist(data_dir)
        found = find_files(data_dir)
    if missing := [name for name in DIGESTS if name not in found.paths]:
        raise DataError(f"{found.folder} lacks {', '.join(missing)}; add it, or name an empty folder to have MNIST fetched")
    arrays, digests = {}, {}
    for name, path in found.paths.items():
        stored, content = read_file(path)
        array = read_idx(content, str(path))
        digests[name] = sums.check(found, data_dir, name, stored, content)
        arrays[name] = torch.from_numpy(array.copy())
    for part in ("train", "t10k"):
        _check_fit(found.folder, part, arrays[f"{part}-images-idx3-ubyte"].numpy(), arrays[f"{part}-labels-idx1-ubyte"].numpy())
    if not len(arrays["train-images-idx3-ubyte"]):
        raise DataError(f"{data_dir} has no training images; name another folder with --data-dir")
    return Mnist(
        train_images=arrays["train-images-idx3-ubyte"],
        train_labels=arrays["train-labels-idx1-ubyte"].long(),
        test_images=arrays["t10k-images-idx3-ubyte"],
        test_labels=arrays["t10k-labels-idx1-ubyte"].long(),
        digests=digests,
    )


def data_name(digests: Mapping[str, str]) -> str:
    """How a table calls the data that a run was trained on: MNIST, or not MNIST and the beginning of its images' digest."""
    if digests == DIGESTS:
        return "MNIST"
    return f"not MNIST ({digests['train-images-idx3-ubyte'][:12]}…)" if "train-images-idx3-ubyte" in digests else "not known"


def training_examples(data: Mnist, config: TrainConfig, device: torch.device) -> tuple[Tensor, ...]:
    """All training images on ``device``, float32 (n, 1, 28, 28), in the range the config's networks use.

    For a conditional preset their labels come behind them, int64 (n,). Raises DataError for a label it has no class for, and
    says on the log which classes have no images.
    """
    low, high = config.pixel_range
    unit = data.train_images.to(device).unsqueeze(1).float() / 255
    images = unit * (high - low) + low
    if not config.labels:
        return (images,)
    if (needed := data.classes) > config.labels:
        raise DataError(f"the data has label {needed - 1}, and --labels is {config.labels}; it must be {needed} at least")
    if needed < config.labels:
        log.warning("the data has labels 0 to %d, and --labels is %d: the others are not trained", needed - 1, config.labels)
    return images, data.train_labels.to(device)


def read_dataset(folder: Path, least: int, classes: int) -> tuple[Tensor, Tensor]:
    """Training images uint8 (n, 28, 28) and labels int64 (n,), at least so many, of a data set of ``serve.dataset``.

    Raises DataError, also for a label that is none of ``classes``.
    """
    found = find_files(folder)
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    for name in names:
        if name not in found.paths:
            raise DataError(f"{found.folder if found.paths else folder / RAW} lacks {name}")
    images, labels = (read_idx(read_file(found.paths[name])[1], str(found.paths[name])) for name in names)
    _check_fit(found.folder, "train", images, labels)
    if (highest := int(labels.max(initial=0))) >= classes:
        raise DataError(
            f"{found.folder} has label {highest}, and the real images have 0 to {classes - 1}: a classifier needs images with"
            " labels, as a conditional model makes them; name the real ones with --data-dir"
        )
    if len(images) < least:
        raise DataError(f"{found.folder} has {len(images)} training images, and {least} are needed; write more with --count")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.copy()).long()


def _check_fit(
    folder: Path,
    part: str,
    images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    labels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
) -> None:
    """Raises DataError unless the images are 28 × 28 and there is a label for each."""
    if images.ndim == 3 and images.shape[1:] != (SIDE, SIDE):
        size = "×".join(map(str, images.shape[1:]))
        raise DataError(f"{folder}: {part} images are {size}, and {SIDE}×{SIDE} is needed; scale, crop or pad them")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(f"{folder}: {part} images {images.shape} and labels {labels.shape} do not fit")
