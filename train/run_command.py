"""``python -m train <preset>``: starts or resumes a run, in one process or several, and stops it on signals."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import RESULT_FILE, Run, create_run, held, latest_checkpoint, number_of, open_run, write_config
from train.config import TrainConfig, parse_field
from train.data.mnist import DEFAULT_DATA_DIR, Mnist, load_mnist, training_examples
from train.device import describe, prepare_machine, set_precision
from train.errors import CheckpointError, ConfigError, QualityError, StoppedError
from train.evaluation.judge import check_data
from train.models import OTHER_NETWORKS
from train.presets import preset
from train.reports import activations
from train.reports.run_page import write_page
from train.runs import how_to_resume, make_arguments, make_variable, newest_run
from train.trainer.capture import CudaRecording
from train.trainer.loop import Trainer
from train.trainer.parallel import Ranks, joined, own_device

NEWEST = "newest"
AUTO = "auto"
LENGTHS = ("epochs", "steps")  # what may be changed of a finished run
OF_THE_BITS = ("device", "device_name", "cpu_threads", "bf16", "torch")  # of a machine: what a result's bits depend on


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
    with ExitStack() as stack:
        run = None
        if flags.resume and ranks.first and (chosen := _chosen(flags)):  # for auto: if there is one
            stack.enter_context(held(chosen))
            run = _resumed(open_run(chosen.folder), flags.command, overrides)  # as it is now that nobody else trains it
        data = load_mnist(flags.data_dir) if ranks.first else None  # fetches what is not there
        run = ranks.agree(run)
        data = data or load_mnist(flags.data_dir)
        resumed = run is not None
        if run is not None:
            _check_resumable(run, ranks, data, flags.data_dir)
            examples = training_examples(data, run.config, device)
            if ranks.first:
                run = _recorded(run, device)
        else:
            # What cannot be had is refused before there is a folder.
            set_precision(config.precision, device)
            if config.architecture == "mlp" and len(data.train_images) % (config.batch_size * ranks.world) == 1:
                raise ConfigError(f"--batch-size {config.batch_size} leaves one image for the last step, and BatchNorm needs two")
            examples = training_examples(data, config, device)
            provenance = {"data": data.digests, **describe(device), "processes": ranks.world, "captured": captured}
            if ranks.first:
                run = create_run(flags.runs_dir, config, provenance)
                stack.enter_context(held(run))
            run = ranks.agree(run)
        recording = CudaRecording if captured else None
        trainer = Trainer(run, examples, device, ranks, recording)
        if resumed:
            try:
                trainer.load_state(latest_checkpoint(run))
            except (KeyError, RuntimeError, ValueError):
                raise CheckpointError(f"{run.folder}: {OTHER_NETWORKS}") from None
        return _fit(trainer, data, flags.data_dir)


def _fit(trainer: Trainer, data: Mnist, data_dir: Path) -> int:
    run, ranks = trainer.run, trainer.ranks
    if ranks.first:
        if run.config.precision == "bf16" and not trainer.update.mixed:
            print(f"bf16 is not among the instructions of this {trainer.device.type.upper()}: fp32 is used", file=sys.stderr)
        print(
            f"training {run.config.preset} on {trainer.device.type} into {run.folder}, from step {trainer.step}", file=sys.stderr
        )
        write_page(run)
    try:
        with _stopped_by_signals(trainer):
            trainer.fit()
    except KeyboardInterrupt:
        if not run.checkpoints():
            raise
        raise StoppedError("stopped; what was trained since the last checkpoint is lost") from None
    finally:
        if ranks.first:
            write_page(run)
    if not ranks.first:
        return 0
    activations.draw(run, 0)
    write_page(run)  # with them
    print(f"finished: {run.folder}\nnext: {_next(run, data, data_dir)}")
    return 0


def _next(run: Run, data: Mnist, data_dir: Path) -> str:
    """What exports the run: judged by the data that it was trained on, if that can judge."""
    export = f"make export{make_variable('RUN', run.folder)}"
    try:
        check_data(data)
    except QualityError:
        return f"{export} ARGS=--no-judge"
    return export + make_arguments("--data-dir", data_dir) * (data_dir != DEFAULT_DATA_DIR)


@contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP let the step end, save and stop; a second one stops at once. As process 1 too, in a container.

    A terminal that closes sends SIGHUP more than once, and each of several processes has signals from the terminal and from
    torchrun: there a second one says nothing new.
    """

    def stop(number: int, frame: object) -> None:
        if trainer.stop_wanted and trainer.ranks.world == 1 and number != signal.SIGHUP:
            raise KeyboardInterrupt
        trainer.stop_wanted = True

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
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


def _chosen(flags: argparse.Namespace) -> Run | None:
    """The run that ``--resume`` means; None: there is none, and auto begins one."""
    if flags.resume not in (NEWEST, AUTO):
        return open_run(Path(flags.resume))
    try:
        return newest_run(flags.runs_dir, flags.command, finished=False)
    except CheckpointError:
        if flags.resume == AUTO:
            return None
        raise


def _resumed(run: Run, preset_name: str, overrides: dict[str, Any]) -> Run:
    """The run with the numbers that it goes on with: its own, but that a finished one may be made longer."""
    if run.config.preset != preset_name:
        raise ConfigError(f"{run.folder} is a {run.config.preset} run; resume it with: {how_to_resume(run)}")
    longer = {name: value for name, value in overrides.items() if run.finished and name in LENGTHS}
    for name, value in overrides.items():
        own = getattr(run.config, name)
        if own != value and name not in longer:
            flag, shown = "--" + name.replace("_", "-"), ",".join(map(str, own)) if isinstance(own, tuple) else own
            raise ConfigError(
                f"{flag} cannot be changed by --resume: {run.folder} has {shown}; start a new run for other numbers"
            )
    return dataclasses.replace(run, config=run.config.replace(longer))


def _check_resumable(run: Run, ranks: Ranks, data: Mnist, data_dir: Path) -> None:
    if not run.checkpoints():
        raise CheckpointError(f"{run.folder} has no checkpoint yet; start the run anew")
    if (processes := run.provenance.get("processes", 1)) != ranks.world:
        raise ConfigError(f"{run.folder} was trained by {processes} processes, and these are {ranks.world}; start as many")
    if run.provenance["data"] != data.digests:
        raise ConfigError(f"{run.folder} was trained on other data than {data_dir} holds; name its own --data-dir")
    if run.finished:
        done, wanted = latest_checkpoint(run)["step"], run.config.total_steps(len(data.train_images), ranks.world)
        if wanted <= done:
            raise ConfigError(f"{run.folder} is finished at step {done}, and these numbers end at {wanted}; name more --epochs")


def _recorded(run: Run, device: torch.device) -> Run:
    """Record this start, on which machine and with which threads, and say what differs from the first; the run is unfinished."""
    machine, begun = describe(device), run.provenance
    differing = [name for name in OF_THE_BITS if name in begun and machine[name] != begun[name]]
    for name in differing:
        print(f"{name.replace('_', ' ')}: {machine[name]} now, {begun[name]} when {run.folder} began", file=sys.stderr)
    if differing:
        print("the result will not have the bits that it would have had without stopping", file=sys.stderr)
    start = {"step": number_of(run.checkpoints()[-1]), "at": datetime.now(UTC).isoformat(timespec="seconds"), **machine}
    run = dataclasses.replace(run, provenance={**begun, "resumed": [*begun.get("resumed", []), start]})
    write_config(run)
    (run.folder / RESULT_FILE).unlink(missing_ok=True)
    return run
