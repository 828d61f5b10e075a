"""A data set of any size from one seed's stream, written in shards by any number of processes and then joined.

    python -m serve.dataset write --out digits --count 1000000 --seed 7 --shards 8 --shard 3   # shard 3 of 0 to 7
    python -m serve.dataset join --out digits --format idx                                      # or npz, keras, parquet
    python -m serve.dataset verify --out digits --sample 1000                                   # computes some digits anew

In a Kubernetes Indexed Job the shard is ``JOB_COMPLETION_INDEX``. The model runs in this process, without a server. Batches are
whole and aligned to the stream whichever shard a digit falls into, so a digit's bytes do not depend on how the work was split.
On different processors or providers they are equal within one grey level.

A shard is written beside its place and renamed once complete: a killed process leaves no shard, and an existing shard is kept.
idx files have the layout of MNIST's; all digits are training digits unless ``--test-share`` says how many are test digits. A
conditional model's labels are the stream's own, or with ``--labels`` the given ones in turn; an unconditional model's digits have
label 255, for none. With ``--filter``, a digit that the judge does not read as its label is replaced by one at a later address
(filter.py).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve.command_line import INT63, UINT32, UINT64, OneLineParser, failed, within
from serve.dataset.filter import BUNDLED_JUDGE, TRAINED_ON, Judge
from serve.dataset.header import ATTEMPTS, MOST_SHARDS, Dataset, read_header
from serve.dataset.hub import write_parquet
from serve.dataset.joining import UNKNOWN_LABEL, join, write_idx, write_keras, write_npz
from serve.dataset.shards import Generator, write_shard
from serve.dataset.verifying import verify
from serve.engine.provider import EngineOptions, choose_provider
from serve.engine.resources import usable_cores
from serve.errors import ServeError, SettingsError
from serve.latents import INDEX_LIMIT
from serve.manifest import BUNDLED_DIR, Manifest
from serve.models.repository import Bundle, Repository
from serve.settings import DEFAULT_MODEL

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
OWN_JUDGE = "write a judge of the model's data and name it: python -m export judge --data-dir … --out judge.onnx"
ENGINES_ON_CUDA = 2  # one computes while the digits of the other are on their way


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a shard, join them or check them. Returns the exit status; an error is one line on stderr."""
    flags = _parser().parse_args(arguments)
    try:
        {"write": _write, "join": _join, "verify": _verify}[flags.action](flags)
    except ServeError as error:
        return failed(error)
    except OSError as error:  # a disk that is full, a folder that may not be written to
        where = error.filename or flags.out
        return failed(f"{where}: {error.strerror or error}; make room there, or name another --out")
    return 0


def _write(flags: argparse.Namespace) -> None:
    for flag, value, high in (("--start", flags.start, INDEX_LIMIT - flags.count), ("--shard", flags.shard, flags.shards - 1)):
        if value > high:
            raise SettingsError(f"{flag} must be from 0 to {high}, got {value}")
    bundle = _bundle(flags.models_dir, flags.model, flags.version)
    manifest = bundle.manifest
    for label in flags.labels:
        if not 0 <= label < manifest.labels:
            known = f"has 0 to {manifest.labels - 1}" if manifest.labels else "is unconditional"
            raise SettingsError(f"--labels {label}: model {manifest.name}/{manifest.version} {known}")
    judge = _judge(flags, manifest) if flags.filter != 0 else None
    dataset = Dataset(
        model=manifest.name, version=manifest.version, digest=bundle.digest, seed=flags.seed, start=flags.start,
        count=flags.count, shards=flags.shards, height=manifest.height, width=manifest.width,
        latent_size=manifest.latent_size, classes=manifest.labels, labels=tuple(flags.labels),
        filter=flags.filter, judge=judge.digest if judge else "",
    )  # fmt: skip
    begun = time.perf_counter()
    options = EngineOptions(provider=choose_provider(flags.provider))
    threads = flags.threads or (ENGINES_ON_CUDA if options.provider == "cuda" else usable_cores())
    path = write_shard(flags.out, dataset, flags.shard, Generator(bundle, options, threads, judge))
    _say_unlabelled(dataset)
    seconds, count = time.perf_counter() - begun, dataset.shard_range(flags.shard)[1]
    print(f"{path}: {count:,} digits by {dataset.model}/{dataset.version} in {seconds:.1f} s, {count / seconds:,.0f} a second")


def _join(flags: argparse.Namespace) -> None:
    formats = {
        "idx": write_idx,
        "npz": write_npz,
        "keras": write_keras,
        "parquet": lambda whole: write_parquet(whole, _bundle_of(whole.dataset, flags)),
    }
    for path in join(flags.out, formats[flags.format], flags.test_share):
        print(path)
    dataset = read_header(flags.out)
    if flags.format != "parquet":  # which has no column of labels then
        _say_unlabelled(dataset)


def _verify(flags: argparse.Namespace) -> None:
    dataset = read_header(flags.out)
    options = EngineOptions(provider=choose_provider(flags.provider))
    count, identical = verify(flags.out, _bundle_of(dataset, flags), options, flags.sample)
    same = (
        "all have the bytes that were written"
        if identical == count
        else (f"{identical:,} have the bytes that were written, the others differ by rounding, as on another kind of processor")
    )
    print(f"{flags.out}: {count:,} of {dataset.count:,} digits computed anew; {same}")


def _judge(flags: argparse.Namespace, manifest: Manifest) -> Judge:
    if not 0 < flags.filter < 1:
        raise SettingsError(f"--filter must be from 0 to below 1, got {flags.filter:g}")
    if not manifest.labels:
        raise SettingsError(f"--filter needs a model with labels: {manifest.name}/{manifest.version} is unconditional")
    if flags.start + flags.count * ATTEMPTS > INDEX_LIMIT:
        raise SettingsError(
            f"--filter chooses from {ATTEMPTS} × --count indices after --start, and the last is {INDEX_LIMIT - 1}"
        )
    judge = Judge(flags.judge)
    if judge.classes != manifest.labels:
        raise SettingsError(
            f"--judge {flags.judge} knows {judge.classes} classes, {manifest.name} has {manifest.labels} labels; {OWN_JUDGE}"
        )
    if judge.trained_on and (data := _trained_on(manifest)) and data != judge.trained_on:
        print(
            f"--judge {flags.judge} was trained on other images than {manifest.name}/{manifest.version}; if its labels stand for"
            f" something else, {OWN_JUDGE}",
            file=sys.stderr,
        )
    return judge


def _trained_on(manifest: Manifest) -> Any:
    """The digest of the model's training images, if its manifest has it."""
    try:
        return manifest.training["provenance"]["data"][TRAINED_ON]
    except (KeyError, TypeError):
        return None


def _say_unlabelled(dataset: Dataset) -> None:
    if not dataset.classes:
        print(
            f"{dataset.model} is unconditional: every label is {UNKNOWN_LABEL}, which stands for none; for training a classifier"
            " write a data set of a conditional model, as --model rpgan",
            file=sys.stderr,
        )


def _bundle_of(dataset: Dataset, flags: argparse.Namespace) -> Bundle:
    return _bundle(flags.models_dir, dataset.model, dataset.version)


def _bundle(models_dir: Path, model: str, version: int) -> Bundle:
    repository = Repository(models_dir)
    there = repository.scan().get(model)
    if not there:
        raise SettingsError(f"--models-dir {models_dir} has no model {model[:64]!r}")
    return repository.read(model, version or max(there))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m serve.dataset", description="Make a data set of any size, shard by shard.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    write = actions.add_parser("write", help="write one shard")
    write.add_argument("--count", type=within(1, INDEX_LIMIT), required=True, help="number of digits in the whole data set")
    write.add_argument("--seed", type=UINT64, default=0, help="seed of the stream of digits (default: 0)")
    write.add_argument("--start", type=INT63, default=0, help="index of the data set's first digit (default: 0)")
    write.add_argument("--shards", type=within(1, MOST_SHARDS), default=1, help="number of shards (default: 1)")
    index = os.environ.get(INDEX_VARIABLE, "0")
    write.add_argument("--shard", type=UINT32, default=index, help=f"the shard to write (default: ${INDEX_VARIABLE}, or 0)")
    write.add_argument("--model", default=DEFAULT_MODEL, help=f"model name (default: {DEFAULT_MODEL})")
    write.add_argument("--labels", type=int, nargs="+", default=(), help="labels, in turn (default: derived from the addresses)")
    write.add_argument(
        "--filter",
        type=float,
        default=0.0,
        metavar="CONFIDENCE",
        help="keep only digits to whose label the judge gives at least this probability; replace the others (default: 0, all)",
    )
    write.add_argument("--judge", type=Path, default=BUNDLED_JUDGE, help="the judge's file (default: the bundled one)")
    write.add_argument("--version", type=INT63, default=0, help="model version (default: the highest)")
    text = f"concurrent runs; 0: one per core, {usable_cores()} here; on CUDA {ENGINES_ON_CUDA} (default: 0)"
    write.add_argument("--threads", type=within(0, 256), default=0, help=text)
    join_them = actions.add_parser("join", help="join all shards")
    text = "idx: MNIST's four files; npz: images and labels; keras: npz with x_train, y_train, x_test, y_test; parquet: the"
    text += " Hugging Face Hub's layout (default: idx)"
    join_them.add_argument("--format", choices=("idx", "npz", "keras", "parquet"), default="idx", help=text)
    text = "share of the digits to write into the test files instead of the training files: the last ones (default: 0)"
    join_them.add_argument("--test-share", type=within(0.0, 1.0), default=0.0, metavar="SHARE", help=text)
    check = actions.add_parser("verify", help="compute some digits again and compare them with those in the files")
    check.add_argument(
        "--sample",
        type=within(1, INDEX_LIMIT),
        default=1000,
        help="number of digits to compare, chosen at random (default: 1000)",
    )
    for action in (write, check):
        action.add_argument("--provider", choices=("auto", "cuda", "cpu"), default="auto", help="where the model runs")
    for action in (write, join_them, check):
        text = "folder of bundles (default: the bundled models)"
        action.add_argument("--models-dir", type=Path, default=BUNDLED_DIR, help=text)
        action.add_argument("--out", type=Path, required=True, help="folder of the data set")
    return parser
