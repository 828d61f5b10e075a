"""The command line of export."""

from __future__ import annotations

import argparse
import logging
import random
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, start_http_server
from torch import nn

from export import batch_size, speedrun
from export.bundle import check_run, export_run, floors_of_labels, judged, model_name, verify
from export.errors import ExportError
from export.gallery import Gallery
from export.graphs.judge import export_judge
from export.graphs.to_onnx import to_onnx
from export.watch import Watch, WatchMetrics, table, watch_forever
from serve.client import DigitClient, DigitError
from serve.client.channel import access_from, add_flags
from serve.command_line import OneLineParser, failed, told, within
from serve.errors import ServeError
from serve.manifest import BUNDLED_DIR, PRECISIONS
from serve.models.repository import read_bundle
from train.checkpoint import DEFAULT_RUNS_DIR, Run, open_run
from train.data.mnist import DEFAULT_DATA_DIR, load_mnist
from train.device import choose_device, limit_threads
from train.errors import TrainError
from train.evaluation.evaluate import SCORED_SAMPLES, parse_floors
from train.evaluation.judge import BATCH as JUDGE_BATCH
from train.evaluation.judge import JUDGE_FOLDER, kept_judge
from train.models import PointConvTranspose2d, build_generator
from train.presets import DEFAULT_PRESET, PRESETS
from train.reports.judging import judge_runs, of_other_data
from train.runs import each_run, make_arguments, make_variable, moment, newest_finished, newest_run


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m export", description="Export trained generators and prove their parity.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="publish the newest finished run of each preset, or one run")
    run.add_argument("--run", type=Path, help="the run folder to export (default: the newest finished one of each preset)")
    run.add_argument("--runs-dir", type=Path, default=DEFAULT_RUNS_DIR, help="where runs are kept (default: runs)")
    run.add_argument("--models-dir", type=Path, default=Path("models"), help="where bundles go (default: models)")
    run.add_argument("--name", help="the model's name (default: its preset, and the precision if it is not fp32)")
    run.add_argument("--precision", choices=PRECISIONS, default="fp32", help="precision of the ONNX graph (default: fp32)")
    run.add_argument(
        "--min-quality",
        default="",
        metavar="FIGURE=VALUE,...",
        help="refuse to export a run of lower quality, for example label_accuracy=0.99",
    )
    run.add_argument(
        "--judge",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="first evaluate runs that have not been evaluated (default: no)",
    )
    run.add_argument(
        "--data-dir", type=Path, default=DEFAULT_DATA_DIR, help="folder of the real images that --judge compares with"
    )
    check = commands.add_parser("verify", help="compare a bundle's TorchScript and ONNX graph on fresh latents")
    check.add_argument("bundle", type=Path, help="a folder such as models/dcgan/1")
    sizes = commands.add_parser("batch-size", help="measure which maximum batch size a bundle's manifest should have")
    sizes.add_argument("bundle", type=Path, help="a folder such as models/dcgan/1")
    sizes.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    sizes.add_argument("--write", action="store_true", help="write the choice into the bundle's manifest")
    plain = commands.add_parser("plain", help="write untrained, unfolded graphs of every preset, for the benchmark")
    plain.add_argument("folder", type=Path, help="where to write <preset>.onnx")
    pictures = commands.add_parser("gallery", help="draw pictures of a run's digits: truncation, interpolation, neighbours")
    pictures.add_argument("--run", type=Path, help="run folder (default: the newest finished one of the default preset)")
    pictures.add_argument("--runs-dir", type=Path, default=DEFAULT_RUNS_DIR, help="where runs are kept (default: runs)")
    pictures.add_argument("--data-dir", type=Path, default=DEFAULT_DATA_DIR, help="folder of the training images' files")
    pictures.add_argument("--out", type=Path, default=Path("build/gallery"), help="where to write (default: build/gallery)")
    judge = commands.add_parser("judge", help="write the classifier of `train evaluate` as ONNX, for serve.dataset's --filter")
    judge.add_argument(
        "--runs-dir", type=Path, default=DEFAULT_RUNS_DIR, help="folder that keeps the judge's weights (default: runs)"
    )
    judge.add_argument(
        "--data-dir", type=Path, default=DEFAULT_DATA_DIR, help="folder of the images that the judge was trained on"
    )
    judge.add_argument(
        "--out", type=Path, default=Path("models/judge.onnx"), help="the file to write (default: models/judge.onnx)"
    )
    whole = commands.add_parser("speedrun", help="run the whole pipeline in one command: short training, score, export, serve")
    whole.add_argument(
        "--epochs",
        type=within(1, 1_000_000),
        default=speedrun.EPOCHS,
        help=f"epochs of the training (default: {speedrun.EPOCHS})",
    )
    whole.add_argument(
        "--scored",
        type=within(JUDGE_BATCH, 10_000_000),
        default=SCORED_SAMPLES,
        help="number of digits to train the score's classifier on",
    )
    whole.add_argument("--data-dir", type=Path, default=DEFAULT_DATA_DIR, help="folder of the training images' files")
    whole.add_argument("--out", type=Path, default=Path("build/speedrun"), help="where to write (default: build/speedrun)")
    whole.add_argument("train_flags", nargs="*", metavar="FLAG", help="more flags for python -m train, after --")
    live = commands.add_parser("watch", help="compare a running server with PyTorch repeatedly")
    add_flags(live)
    live.add_argument(
        "--models-dir",
        type=Path,
        default=BUNDLED_DIR,
        help="folder of the bundles that the server serves (default: the bundled models)",
    )
    live.add_argument("--interval-s", type=within(0.1, 86400.0), default=30.0, help="time between two comparisons (default: 30)")
    live.add_argument("--metrics-host", default="127.0.0.1", help="address of /metrics (default: 127.0.0.1)")
    live.add_argument("--metrics-port", type=within(0, 65535), default=9090, help="port of /metrics (default: 9090)")
    live.add_argument("--once", action="store_true", help="compare once, print a table, exit 1 on a breach")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Errors are one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Exporting is what is wanted most: ``python -m export`` alone, or with its flags, is ``python -m export run``.
    bare = not given or (given[0].startswith("-") and given[0] not in ("-h", "--help"))
    flags = build_parser().parse_args(["run", *given] if bare else given)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("train").setLevel(logging.INFO)  # which judges are trained, and where they are kept
    limit_threads()
    try:
        return COMMANDS[flags.command](flags)
    except (ExportError, TrainError, ServeError) as error:
        return failed(error)
    except OSError as error:  # a disk that is full, a folder that has gone
        return failed(told(error))


def _run(flags: argparse.Namespace) -> int:
    floors = parse_floors(flags.min_quality)
    if flags.run:
        runs = [open_run(flags.run)]
    elif flags.name:
        raise ExportError("--name needs --run: without it, each preset's newest run is exported under its own name")
    else:
        runs = newest_finished(flags.runs_dir)
        runs = [run for run in runs if not _left_out(run, floors)]
        if not runs:
            raise ExportError(f"no run in {flags.runs_dir} is left; name one with --run to see why")
    if not flags.run:
        for run in runs:
            print(f"the newest finished {run.config.preset} run: {run.folder}, begun {moment(run)}", file=sys.stderr)
    usable: list[Run] = []

    def check(run: Run) -> None:
        check_run(run, flags.models_dir, flags.name or model_name(run, flags.precision), floors)
        usable.append(run)

    refused = each_run(runs, check, ExportError, TrainError)
    runs = usable
    if flags.judge:
        runs = _judged_first(runs, flags)
    published: list[Path] = []

    def publish(run: Run) -> None:
        done = export_run(run, flags.models_dir, flags.name, flags.precision, floors)
        print(f"{done.path}: worst difference {done.worst_images:.2g} of the image range, {done.worst_pixel_levels} pixel levels")
        published.append(done.path)

    status = max(refused, each_run(runs, publish, ExportError, TrainError))
    if published:
        print(f"next: make serve{make_arguments('--models-dir', flags.models_dir)}")
    return status


def _left_out(run: Run, floors: Mapping[str, float]) -> bool:
    """Whether a run that nobody named cannot have what is asked of all; says so on stderr."""
    if of_labels := floors_of_labels(run, floors):
        print(f"skipped: {run.folder}: {of_labels[0]} is not known of a model without labels", file=sys.stderr)
    return bool(of_labels)


def _judged_first(runs: Sequence[Run], flags: argparse.Namespace) -> list[Run]:
    """The runs, those that were not judged judged. One of other data that nobody named is left out, which is said on stderr."""
    waiting = [run for run in runs if not judged(run)]
    if not waiting:
        return list(runs)
    data, other = load_mnist(flags.data_dir), []
    for run in (run for run in waiting if of_other_data(run, data)):
        reason = (
            f"{run.folder} was not judged, and was trained on other data than {flags.data_dir} holds: name its own folder, as"
            f' make export{make_variable("RUN", run.folder)} ARGS="--data-dir …", or export without judging:'
            f" {_without_judging(run)}"
        )
        if flags.run:
            raise ExportError(reason)
        print(f"skipped: {reason}", file=sys.stderr)
        other.append(run)
    waiting = [run for run in waiting if run not in other]
    for run in waiting:
        without = _without_judging(run)
        print(f"{run.folder} was not judged and is judged first; to export without judging: {without}", file=sys.stderr)
    if waiting:
        judge_runs(waiting, flags.data_dir, flags.runs_dir, choose_device("auto"))
    return [run for run in runs if run not in other]


def _without_judging(run: Run) -> str:
    return f"make export{make_variable('RUN', run.folder)} ARGS=--no-judge"


def _gallery(flags: argparse.Namespace) -> int:
    run = open_run(flags.run) if flags.run else newest_run(flags.runs_dir, DEFAULT_PRESET, finished=True)
    for path in Gallery(run, flags.out).draw(load_mnist(flags.data_dir)):
        print(path)
    return 0


def _judge(flags: argparse.Namespace) -> int:
    data = load_mnist(flags.data_dir)
    judge = kept_judge(data, flags.runs_dir / JUDGE_FOLDER, torch.device("cpu"))
    difference = export_judge(judge, data, flags.out)
    known = judge.accuracy(data.test_images, data.test_labels)
    print(f"{flags.out}: {known:.2%} of the test images known, worst difference {difference:.2g} of a probability")
    return 0


def _speedrun(flags: argparse.Namespace) -> int:
    options = speedrun.Options(flags.out, flags.data_dir, epochs=flags.epochs, scored=flags.scored, train_flags=flags.train_flags)
    print(speedrun.speedrun(options))
    return 0


def _plain(flags: argparse.Namespace) -> int:
    try:
        flags.folder.mkdir(parents=True, exist_ok=True)
        for name, config in PRESETS.items():
            generator = build_generator(config).eval()
            for layer in generator.modules():  # as the notebooks have it: what is measured against this has no head start
                if isinstance(layer, PointConvTranspose2d):
                    layer.__class__ = nn.ConvTranspose2d  # type: ignore[assignment]
            (flags.folder / f"{name}.onnx").write_bytes(to_onnx(generator, config, ("images",)))
    except OSError as error:
        raise ExportError(f"cannot write to {flags.folder} ({error.strerror}); name another folder") from None
    return 0


def _watch(flags: argparse.Namespace) -> int:
    try:
        opened = DigitClient(flags.target, access=access_from(flags), wait_for_server=not flags.once)
    except DigitError as error:
        raise ExportError(error.details()) from None
    with opened as client:
        watch = Watch(client, flags.models_dir, random.Random())
        if flags.once:
            try:
                done = watch.round()
            except DigitError as error:
                raise ExportError(f"{flags.target}: {error}") from None
            print(table(done.checks))
            for failure in done.failures:
                print(f"error: {failure}", file=sys.stderr)
            return 1 if done.failures or any(check.breach for check in done.checks) else 0
        registry = CollectorRegistry()
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        try:
            server, _ = start_http_server(flags.metrics_port, flags.metrics_host, registry)
        except OSError as error:
            raise ExportError(f"--metrics-port {flags.metrics_port} cannot be had ({error.strerror}); name another") from None
        print(f"watching {flags.target}; metrics on http://{flags.metrics_host}:{server.server_port}/metrics", flush=True)
        watch_forever(watch, WatchMetrics(registry), flags.interval_s, stop)
        server.shutdown()
    return 0


def _verify(flags: argparse.Namespace) -> int:
    report = verify(flags.bundle)
    print("pair                          batch  images max  levels  identical")
    for row in report["rows"]:
        print(
            f"{' ↔ '.join(row['pair']):30s}{row['batch_size']:5d}  {row['images_max_abs']:10.2e}"
            f"  {row['pixel_levels_max']:6d}  {row['pixels_identical_share']:9.4%}"
        )
    return 0


def _batch_size(flags: argparse.Namespace) -> int:
    bundle = read_bundle(flags.bundle)
    timings = batch_size.time_batches(bundle, flags.provider)
    print("images  fastest run, ms  images a second")
    for timing in timings:
        print(f"{timing.size:6d}  {timing.run_s * 1e3:15.3f}  {timing.images_per_s:15,.0f}")
    size = batch_size.choose(timings)
    least = f"{batch_size.WORTH:.0%} of the most images a second"
    print(f"{size}: the largest within {batch_size.BATCH_SECONDS * 1e3:g} ms that makes {least}")
    if flags.write:
        print(batch_size.write(bundle, flags.provider, size))
    return 0


COMMANDS = {
    "run": _run, "verify": _verify, "watch": _watch, "plain": _plain, "gallery": _gallery, "judge": _judge, "speedrun": _speedrun,
    "batch-size": _batch_size,
}  # fmt: skip
