"""``python -m train <preset>``: starts or resumes a run, in one process or several, and stops it on signals."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import Run, create_run, latest_checkpoint, newest_run, open_run
from train.config import TrainConfig, parse_field, preset
from train.data import DEFAULT_DATA_DIR, Mnist, load_mnist, training_examples
from train.device import describe, prepare_machine, set_precision
from train.errors import CheckpointError, ConfigError, QualityError
from train.evaluation.judge import check_data
from train.reports import activations
from train.reports.run_page import write_page
from train.trainer.capture import CudaRecording
from train.trainer.loop import Trainer
from train.trainer.parallel import Ranks, joined, own_device

NEWEST = "newest"
AUTO = "auto"


def train(flags: argparse.Namespace) -> int:
    """Train what the flags of a preset's subcommand ask for. Returns the exit status; raises TrainError or StoppedError."""
    device = own_device(prepare_machine(flags.device, flags.threads))
    with joined(device) as ranks:
        return _train_as(ranks, device, flags)


def _train_as(ranks: Ranks, device: torch.device, flags: argparse.Namespace) -> int:
    captured = _wants_capture(flags.capture, device, ranks)
    named = {spec.name for spec in dataclasses.fields(TrainConfig)} & set(vars(flags))
    overrides = {name: parse_field(name, getattr(flags, name)) for name in sorted(named)}
    config = preset(flags.command).replace(overrides)
    resumed = _resumed_run(flags, overrides) if flags.resume and ranks.first else None  # for auto: if there is one
    if ranks.first:
        data = load_mnist(flags.data_dir)  # fetches what is not there
    folder = ranks.agree(resumed.folder if resumed else None)
    data = data if ranks.first else load_mnist(flags.data_dir)
    if folder is not None:
        run = open_run(folder)
        if (processes := run.provenance.get("processes", 1)) != ranks.world:
            raise ConfigError(f"{run.folder} was trained by {processes} processes, and these are {ranks.world}; start as many")
        if run.provenance["data"] != data.digests:
            raise ConfigError(f"{run.folder} was trained on other data than {flags.data_dir} holds; name its own --data-dir")
    else:
        # What cannot be had is refused before there is a folder.
        set_precision(config.precision, device)
        if config.architecture == "mlp" and len(data.train_images) % (config.batch_size * ranks.world) == 1:
            raise ConfigError(f"--batch-size {config.batch_size} leaves one image for the last step, and BatchNorm needs two")
        provenance = {"data": data.digests, **describe(device), "processes": ranks.world, "captured": captured}
        run = open_run(ranks.agree(create_run(flags.runs_dir, config, provenance).folder if ranks.first else None))
    recording = CudaRecording if captured else None
    trainer = Trainer(run, training_examples(data, run.config, device), device, ranks, recording)
    if folder is not None:
        trainer.load_state(latest_checkpoint(run))
    if ranks.first:
        if run.config.precision == "bf16" and not trainer.update.mixed:
            print(f"bf16 is not among the instructions of this {device.type.upper()}: fp32 is used", file=sys.stderr)
        print(f"training {run.config.preset} on {device.type} into {run.folder}, from step {trainer.step}", file=sys.stderr)
    try:
        with _stopped_by_signals(trainer):
            trainer.fit()
    finally:
        if ranks.first:
            write_page(run)
    if not ranks.first:
        return 0
    activations.draw(run, 0)
    print(f"finished: {run.folder}\nnext: {_next(run, data, flags.data_dir)}")
    return 0


def _next(run: Run, data: Mnist, data_dir: Path) -> str:
    """What exports the run: judged by the data that it was trained on, if that can judge."""
    export = f"make export RUN={run.folder}"
    try:
        check_data(data)
    except QualityError:
        return f"{export} ARGS=--no-judge"
    return export if data_dir == DEFAULT_DATA_DIR else f'make evaluate RUN={run.folder} ARGS="--data-dir {data_dir}" && {export}'


@contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM let the step end, save and stop; a second one stops at once. As process 1 too, in a container.

    Of several processes each has more than one signal, from the terminal and from torchrun: there a second one says nothing new.
    """

    def stop(number: int, frame: object) -> None:
        if trainer.stop_wanted and trainer.ranks.world == 1:
            raise KeyboardInterrupt
        trainer.stop_wanted = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wants_capture(wanted: str, device: torch.device, ranks: Ranks) -> bool:
    possible = device.type == "cuda" and ranks.world == 1
    if wanted == "on" and not possible:
        raise ConfigError("--capture on takes one process and CUDA; leave it at auto")
    return possible and wanted != "off"


def _resumed_run(flags: argparse.Namespace, overrides: dict[str, Any]) -> Run | None:
    if flags.resume == AUTO:
        try:
            unfinished = newest_run(flags.runs_dir, flags.command, finished=False)
        except CheckpointError:
            return None
        flags.resume = str(unfinished.folder)
    newest = flags.resume == NEWEST
    run = newest_run(flags.runs_dir, flags.command, finished=False) if newest else open_run(Path(flags.resume))
    for name, value in overrides.items():
        if (own := getattr(run.config, name)) != value:
            flag, shown = "--" + name.replace("_", "-"), ",".join(map(str, own)) if isinstance(own, tuple) else own
            raise ConfigError(
                f"{flag} cannot be changed by --resume: {run.folder} has {shown}; start a new run for other numbers"
            )
    if run.finished:
        raise ConfigError(f"{run.folder} is finished; there is nothing to resume")
    if run.config.preset != flags.command:
        raise ConfigError(f"{run.folder} is a {run.config.preset} run; resume it with: python -m train {run.config.preset}")
    for leftover in (run.folder / "checkpoints").glob(".*.pt.*"):  # half-written when the run was killed
        leftover.unlink()
    return run
