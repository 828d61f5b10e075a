"""Where a data set's files may lie, what they may be called, and how their digests may be listed."""

from __future__ import annotations

import gzip
import hashlib
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from train.data.files import DIGESTS
from train.data.mnist import data_name, load_mnist, read_dataset
from train.data.sums import SUMS_FILE
from train.errors import DataError

NAMES = tuple(DIGESTS)
IMAGES = NAMES[0]


@pytest.fixture(autouse=True)
def no_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was named and holds something is never filled."""

    def fetch(folder: Path) -> None:
        pytest.fail(f"MNIST was fetched into {folder}")

    monkeypatch.setattr("train.data.mnist.fetch_mnist", fetch)


def kaggle(folder: Path, name: str) -> Path:
    return folder / name.replace("-idx", ".idx")


LAYOUTS: dict[str, Callable[[Path, str], Path]] = {
    "below MNIST/raw": lambda folder, name: folder / "MNIST" / "raw" / name,
    "below MNIST/raw, packed": lambda folder, name: folder / "MNIST" / "raw" / f"{name}.gz",
    "Kaggle's names": kaggle,
    "Kaggle's folders": lambda folder, name: folder / name / name,
    "Kaggle's names in folders": lambda folder, name: kaggle(folder, name) / kaggle(folder, name).name,
    "packed, without saying so": lambda folder, name: folder / name,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_usual_names_and_folders_are_found(layout: str, subset: Path, tmp_path: Path) -> None:
    """Issue: MNIST was fetched into such a folder and trained on in the place of what had been named."""
    root = tmp_path / "a root"
    for name in NAMES:
        path = LAYOUTS[layout](root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = (subset / name).read_bytes()
        path.write_bytes(gzip.compress(content) if "packed" in layout else content)
    shutil.copy(subset / SUMS_FILE, root)
    assert load_mnist(root).digests == load_mnist(subset).digests
    assert len(read_dataset(root, 10, 10)[0]) == 256


def test_a_folder_of_something_else_is_neither_filled_nor_left(tmp_path: Path) -> None:
    root = tmp_path / "root"
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / f"{IMAGES}.gz").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        load_mnist(root)
    assert str(caught.value).startswith(f"{root} holds FashionMNIST; {IMAGES} and")
    assert str(caught.value).endswith(f"in {raw}: name that folder")
    shutil.rmtree(raw)
    for number in range(9):
        (root / f"photo-{number}.png").touch()
    with pytest.raises(DataError, match=r"holds FashionMNIST, photo-0.png, .*photo-3.png and 5 more, and not .*an empty one"):
        load_mnist(root)
    with pytest.raises(DataError, match="is a file; name the folder"):
        load_mnist(root / "photo-1.png")


@pytest.mark.parametrize("names", [(), (".gitkeep", "lost+found")])
def test_a_missing_or_empty_folder_is_filled(names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    for name in names:
        (root / name).mkdir(parents=True)
    filled: list[Path] = []
    monkeypatch.setattr("train.data.mnist.fetch_mnist", filled.append)
    with pytest.raises(DataError, match="lacks"):
        load_mnist(root)
    assert filled == [root]


def test_images_of_another_size_are_told_which_is_needed(subset: Path) -> None:
    content = (subset / IMAGES).read_bytes()
    larger = content[:4] + (196).to_bytes(4) + (32).to_bytes(4) * 2 + content[16:]
    (subset / IMAGES).write_bytes(larger)
    list_digests(subset)
    with pytest.raises(DataError, match=r"train images are 32×32, and 28×28 is needed"):
        load_mnist(subset)


def test_what_a_table_calls_the_data() -> None:
    assert data_name(DIGESTS) == "MNIST"
    assert data_name(DIGESTS | {IMAGES: "abcdef0123456789"}) == "not MNIST (abcdef012345…)"
    assert data_name({}) == "not known"


def list_digests(folder: Path, *flags: str, names: str = "*-ubyte*") -> str:
    files = sorted(path.name for path in folder.glob(names))
    done = subprocess.run(["sha256sum", *flags, *files], cwd=folder, capture_output=True, text=True, check=True)
    (folder / SUMS_FILE).write_text(done.stdout, encoding="utf-8")
    return done.stdout


WRITTEN: dict[str, Callable[[str], bytes]] = {
    "upper case": lambda text: "\n".join(line[:64].upper() + line[64:] for line in text.splitlines()).encode(),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "PowerShell's UTF-16": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "./": lambda text: text.replace("  ", "  ./").encode(),
    "folders": lambda text: text.replace("  ", "  some/where/").encode(),
    "a backslash": lambda text: text.replace("  ", "  .\\").encode(),
    "binary": lambda text: text.replace("  ", " *").encode(),
    "Kaggle's names": lambda text: text.replace("-idx", ".idx").encode(),
    "other lines": lambda text: f"# mine\n\n{text}{'0' * 64}  readme.txt\n".encode(),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_digests_may_be_listed_in_every_usual_way(written: str, subset: Path) -> None:
    """Issue: six of seven were refused, by sentences that did not help."""
    expected = load_mnist(subset).digests
    (subset / SUMS_FILE).write_bytes(WRITTEN[written](list_digests(subset)))
    assert load_mnist(subset).digests == expected


def test_digests_may_be_tagged(subset: Path) -> None:
    assert list_digests(subset, "--tag").startswith("SHA256 (")
    load_mnist(subset)


def test_digests_of_packed_files_hold_for_them_and_not_for_others(subset: Path) -> None:
    expected = load_mnist(subset).digests
    for name in NAMES:
        (subset / f"{name}.gz").write_bytes(gzip.compress((subset / name).read_bytes()))
        (subset / name).unlink()
    list_digests(subset)
    assert load_mnist(subset).digests == expected, "recorded are those of what is in them"
    content = bytearray(gzip.decompress((subset / f"{IMAGES}.gz").read_bytes()))
    content[5000] ^= 1
    (subset / f"{IMAGES}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=f"{IMAGES}.gz has SHA-256 {hashlib.sha256(content).hexdigest()[:12]}"):
        load_mnist(subset)


def test_the_command_that_an_error_names_mends_it(subset: Path, tmp_path: Path) -> None:
    """Issue: the advice could not be followed, least of all from a path with a space."""
    folder = subset.rename(tmp_path / "my own 'set'")
    for listed in ("", "nothing"):
        (folder / SUMS_FILE).write_text(listed, encoding="utf-8")
        if not listed:
            (folder / SUMS_FILE).unlink()
        with pytest.raises(DataError) as caught:
            load_mnist(folder)
        command = str(caught.value)[str(caught.value).index("(cd") :]
        assert shlex.quote(str(folder)) in command
        subprocess.run(["sh", "-c", command], check=True)
        load_mnist(folder)


@pytest.mark.parametrize("place", [10, 2000, -5])
def test_a_flipped_byte_in_a_packed_file_is_one_line(place: int, subset: Path) -> None:
    """Issue: it was a zlib.error."""
    packed = bytearray(gzip.compress((subset / IMAGES).read_bytes()))
    packed[place] ^= 0xFF
    (subset / IMAGES).unlink()
    (subset / f"{IMAGES}.gz").write_bytes(packed)
    with pytest.raises(DataError, match=rf"{IMAGES}.gz (cannot be read|is not an idx file|announces|has SHA-256).*anew, or"):
        load_mnist(subset)
