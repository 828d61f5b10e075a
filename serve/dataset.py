"""A data set of any size from one seed's stream, by any number of processes: each writes its shard, and they are joined.

    python -m serve.dataset write --out digits --count 1000000 --seed 7 --shards 8 --shard 3   # shard 3 of 0 to 7
    python -m serve.dataset join --out digits --format idx                                      # or npz

In a Kubernetes Indexed Job the shard is ``JOB_COMPLETION_INDEX``. The model runs here, without a server. Whole batches
aligned to the stream are run whichever shard a digit falls into, so that its bytes do not depend on how the work was split;
across different processors or providers they are the same within one grey level.

A shard is written beside and renamed when it is whole: one that was killed is not there, and one that is there is kept.
idx files are laid out as MNIST's. A conditional model's labels are the stream's own, or with ``--labels`` those in turn; an
unconditional model's digits have none, and 255 stands for that.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from serve.config.atomic_file import replace_file
from serve.config.command_line import OneLineParser, end_on_sigterm
from serve.config.cores import usable_cores
from serve.config.settings import DEFAULT_MODEL
from serve.engine.factory import make_engine
from serve.engine.provider import EngineOptions, choose_provider
from serve.engine.session import Engine
from serve.errors import ServeError, SettingsError
from serve.latents import INDEX_LIMIT, SEED_LIMIT, Span, draw_span, in_turn
from serve.manifest import BUNDLED_DIR
from serve.models.repository import Bundle, Repository

BATCH = 64  # rows of one run; index 0 of the stream begins one
RUNS_A_TASK = 16
UNKNOWN_LABEL = 255
LABELS_AT_ONCE = 1 << 16
COPY_BYTES = 1 << 20
TEST_SHARE = 7  # one digit in so many goes to the test files, as in MNIST
HEADER_FILE = "dataset.json"
PROGRESS_EVERY_S = 5.0
INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801  # http://yann.lecun.com/exdb/mnist


Positive = Annotated[int, Meta(ge=1)]
Side = Annotated[int, Meta(ge=1, le=1 << 16)]


class Dataset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a data set is of. ``digest`` is the model file's; a shard of another one is not mixed in."""

    model: str
    version: Positive
    digest: str
    seed: Annotated[int, Meta(ge=0)]
    start: Annotated[int, Meta(ge=0)]
    count: Positive
    shards: Positive
    height: Side
    width: Side
    latent_size: Side
    classes: Annotated[int, Meta(ge=0, le=256)]  # labels that the model can be asked for; 0 for an unconditional one
    labels: tuple[Annotated[int, Meta(ge=0)], ...] = ()  # the digit at index i is labels[i % n]; empty: the stream's own

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that are no data set together."""
        if self.seed >= SEED_LIMIT or self.start + self.count > INDEX_LIMIT:
            raise ValueError("seed, start or count is out of range")
        if any(label >= self.classes for label in self.labels):
            raise ValueError("a label is out of range")

    def rows(self, first: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
        """Latents (count, z) of stream indices, and their labels (count,) unless the model is unconditional."""
        latents, labels = draw_span(Span(self.seed, first, count), self.latent_size, self.classes)
        if self.labels:
            labels = in_turn(self.labels, first, count)
        return latents, labels

    def label_bytes(self, first: int, count: int) -> Iterator[bytes]:
        """One byte a digit, some at a time, from the ``first``-th of the data set on."""
        for begin in range(first, first + count, LABELS_AT_ONCE):
            some = min(LABELS_AT_ONCE, first + count - begin)
            labels = self.rows(self.start + begin, some)[1] if self.classes else np.full(some, UNKNOWN_LABEL)
            assert labels is not None
            yield labels.astype(np.uint8).tobytes()

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First index of a shard in the stream, and how many digits it holds."""
        first = self.count * shard // self.shards
        return self.start + first, self.count * (shard + 1) // self.shards - first

    def shard_file(self, folder: Path, shard: int) -> Path:
        return folder / f"part-{shard:05d}-of-{self.shards:05d}.pixels"


@dataclass(frozen=True)
class Generator:
    """Makes the digits, by ``threads`` runs side by side: on one engine, or on CUDA on one each."""

    bundle: Bundle
    options: EngineOptions
    threads: int

    def engine(self) -> Engine:
        """An engine that has passed its golden check where it will run. Raises ProviderError or BundleError."""
        engine = make_engine(self.bundle.model, self.bundle.manifest, self.options, BATCH)
        engine.check_golden()
        return engine

    def digits(self, dataset: Dataset, first: int, count: int) -> Iterator[NDArray[np.uint8]]:
        """The digits ``first`` … of the data set's stream in order, some at a time: uint8 (n, height, width)."""
        own = threading.local()
        size = BATCH * RUNS_A_TASK
        shared = self.engine()  # also before the first thread starts, so that a model that is off writes nothing

        def task(begin: int) -> NDArray[np.uint8]:
            if not hasattr(own, "engine"):
                own.engine = self.engine() if self.options.provider == "cuda" else shared
            pixels: NDArray[np.uint8] = own.engine.compute(*dataset.rows(begin, size))["pixels"]
            return pixels[max(0, first - begin) : first + count - begin]

        begins = range(first - first % BATCH, first + count, size)
        with ThreadPoolExecutor(self.threads) as pool:
            ahead = 2 * self.threads  # so much of the result is held in memory, whatever the shard's size
            for position in range(0, len(begins), ahead):
                yield from pool.map(task, begins[position : position + ahead])


def write_shard(folder: Path, dataset: Dataset, shard: int, generator: Generator) -> Path:
    """Write one shard, whole or not at all; raw uint8 pixels, row-major. Raises SettingsError when the folder is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    _agree(folder, dataset)
    path = dataset.shard_file(folder, shard)
    first, count = dataset.shard_range(shard)
    if path.exists() and path.stat().st_size == count * dataset.height * dataset.width:
        return path
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            for digits in _with_progress(generator.digits(dataset, first, count), count):
                file.write(digits.data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _with_progress(digits: Iterator[NDArray[np.uint8]], count: int) -> Iterator[NDArray[np.uint8]]:
    """The same arrays, ``count`` rows in all; a line on stderr says every few seconds how far they have come."""
    begun = said = time.monotonic()
    done = 0
    for some in digits:
        yield some
        done += len(some)
        now = time.monotonic()
        if now - said >= PROGRESS_EVERY_S and done < count:
            left_s = (now - begun) / done * (count - done)
            print(f"{done:,} of {count:,} digits, about {left_s:,.0f} s left", file=sys.stderr, flush=True)
            said = now


def join(folder: Path, file_format: str) -> list[Path]:
    """Join all shards into ``idx`` files or one ``npz``. Raises SettingsError naming the first shard that is missing."""
    dataset = read_header(folder)
    parts = [dataset.shard_file(folder, shard) for shard in range(dataset.shards)]
    for shard, part in enumerate(parts):
        wanted = dataset.shard_range(shard)[1] * dataset.height * dataset.width
        if not part.exists() or part.stat().st_size != wanted:
            raise SettingsError(f"{part} is missing or not whole; write it with --shard {shard}")
    return _join_idx(folder, dataset, parts) if file_format == "idx" else [_join_npz(folder, dataset, parts)]


def read_header(folder: Path) -> Dataset:
    """What the folder's data set is of. Raises SettingsError."""
    path = folder / HEADER_FILE
    try:
        content = path.read_bytes()
    except OSError:
        raise SettingsError(f"{path} cannot be read; write a shard first") from None
    return parse_header(content, str(path))


def parse_header(content: bytes, where: str) -> Dataset:
    """A header's bytes. Raises SettingsError naming ``where``."""
    try:
        return msgspec.json.decode(content, type=Dataset)
    except (ValueError, RecursionError, msgspec.MsgspecError):
        raise SettingsError(f"{where} is no data set's header; write a shard into an empty folder") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a shard or join them. Returns the exit status; an error is one line on stderr."""
    flags = _parser().parse_args(arguments)
    try:
        if flags.action == "join":
            for path in join(flags.out, flags.format):
                print(path)
            _say_unlabelled(read_header(flags.out))
            return 0
        _write(flags)
    except (ServeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(flags: argparse.Namespace) -> None:
    bounds = {
        "--count": (flags.count, 1, INDEX_LIMIT),
        "--seed": (flags.seed, 0, SEED_LIMIT - 1),
        "--start": (flags.start, 0, INDEX_LIMIT - flags.count),
        "--shards": (flags.shards, 1, 1 << 20),
        "--shard": (flags.shard, 0, flags.shards - 1),
        "--threads": (flags.threads, 1, 256),
    }
    for flag, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise SettingsError(f"{flag} must be from {low} to {high}, got {value}")
    bundle = _bundle(flags.models_dir, flags.model, flags.version)
    manifest = bundle.manifest
    for label in flags.labels:
        if not 0 <= label < manifest.labels:
            known = f"has 0 to {manifest.labels - 1}" if manifest.labels else "is unconditional"
            raise SettingsError(f"--labels {label}: model {manifest.name}/{manifest.version} {known}")
    dataset = Dataset(
        model=manifest.name, version=manifest.version, digest=bundle.digest, seed=flags.seed, start=flags.start,
        count=flags.count, shards=flags.shards, height=manifest.height, width=manifest.width,
        latent_size=manifest.latent_size, classes=manifest.labels, labels=tuple(flags.labels),
    )  # fmt: skip
    begun = time.perf_counter()
    options = EngineOptions(provider=choose_provider(flags.provider))
    path = write_shard(flags.out, dataset, flags.shard, Generator(bundle, options, flags.threads))
    _say_unlabelled(dataset)
    seconds, count = time.perf_counter() - begun, dataset.shard_range(flags.shard)[1]
    print(f"{path}: {count:,} digits by {dataset.model}/{dataset.version} in {seconds:.1f} s, {count / seconds:,.0f} a second")


def _say_unlabelled(dataset: Dataset) -> None:
    if not dataset.classes:
        print(
            f"{dataset.model} is unconditional: every label is {UNKNOWN_LABEL}, which stands for none; for training a classifier"
            " write a data set of a conditional model, as --model cdcgan",
            file=sys.stderr,
        )


def _bundle(models_dir: Path, model: str, version: int) -> Bundle:
    repository = Repository(models_dir)
    there = repository.scan().get(model)
    if not there:
        raise SettingsError(f"--models-dir {models_dir} has no model {model[:64]!r}")
    return repository.read(model, version or max(there))


def _agree(folder: Path, dataset: Dataset) -> None:
    """The folder belongs to one data set: the first shard says which, the others must be of the same."""
    header = folder / HEADER_FILE
    if not header.exists():
        replace_file(header, msgspec.json.format(msgspec.json.encode(dataset), indent=2) + b"\n", 0o644)
    there = read_header(folder)
    for name in Dataset.__struct_fields__:
        found, wanted = getattr(there, name), getattr(dataset, name)
        if found != wanted:
            raise SettingsError(f"{folder} holds a data set with {name} {found}, not {wanted}; name another --out")


def _join_idx(folder: Path, dataset: Dataset, parts: list[Path]) -> list[Path]:
    """MNIST's four files below ``MNIST/raw``, where torchvision's class of that name looks for them."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    test = dataset.count // TEST_SHARE
    digit = dataset.height * dataset.width
    written = []
    for kind, skip, count in (("train", 0, dataset.count - test), ("t10k", dataset.count - test, test)):
        images, labels = raw / f"{kind}-images-idx3-ubyte", raw / f"{kind}-labels-idx1-ubyte"
        with images.open("wb") as file:
            file.write(struct.pack(">4I", IMAGES_MAGIC, count, dataset.height, dataset.width))
            _copy(parts, skip * digit, count * digit, file)
        with labels.open("wb") as file:
            file.write(struct.pack(">2I", LABELS_MAGIC, count))
            file.writelines(dataset.label_bytes(skip, count))
        written += [images, labels]
    return written


def _join_npz(folder: Path, dataset: Dataset, parts: list[Path]) -> Path:
    """``images`` uint8 (count, height, width) and ``labels`` uint8 (count,), readable by ``numpy.load``."""
    path = folder / "digits.npz"
    shape = (dataset.count, dataset.height, dataset.width)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            _copy(parts, 0, dataset.count * dataset.height * dataset.width, file)
        with archive.open("labels.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape[:1]})
            for some in dataset.label_bytes(0, dataset.count):
                file.write(some)
    return path


def _copy(parts: list[Path], skip: int, size: int, to: Any) -> None:
    """Copy ``size`` bytes of the files read as one, after the first ``skip``."""
    for part in parts:
        here = part.stat().st_size
        if skip < here and size:
            with part.open("rb") as file:
                file.seek(skip)
                while size and (chunk := file.read(min(size, COPY_BYTES))):
                    to.write(chunk)
                    size -= len(chunk)
        skip = max(0, skip - here)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m serve.dataset", description="Make a data set of any size, shard by shard.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    write = actions.add_parser("write", help="write one shard")
    write.add_argument("--count", type=int, required=True, help="digits of the whole data set")
    write.add_argument("--seed", type=int, default=0, help="seed of the stream of digits (default: 0)")
    write.add_argument("--start", type=int, default=0, help="index of the data set's first digit (default: 0)")
    write.add_argument("--shards", type=int, default=1, help="how many shards there are (default: 1)")
    index = os.environ.get(INDEX_VARIABLE, "0")
    write.add_argument("--shard", type=int, default=index, help=f"which one this is (default: ${INDEX_VARIABLE}, or 0)")
    write.add_argument("--model", default=DEFAULT_MODEL, help=f"model name (default: {DEFAULT_MODEL})")
    write.add_argument("--labels", type=int, nargs="+", default=(), help="digits in turn (default: the stream's own)")
    write.add_argument("--version", type=int, default=0, help="its version (default: the highest)")
    write.add_argument("--models-dir", type=Path, default=BUNDLED_DIR, help="folder of bundles (default: the bundled models)")
    write.add_argument("--provider", choices=("auto", "cuda", "cpu"), default="auto", help="where the model runs")
    cores = usable_cores()
    write.add_argument("--threads", type=int, default=cores, help=f"runs side by side (default: the cores, {cores})")
    join_them = actions.add_parser("join", help="join all shards")
    join_them.add_argument("--format", choices=("idx", "npz"), default="idx", help="as MNIST's files, or for numpy")
    for action in (write, join_them):
        action.add_argument("--out", type=Path, required=True, help="folder of the data set")
    return parser


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
