"""The command line of training. Each preset is a subcommand; each of a config's fields is a flag of it."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve.command_line import OneLineParser, failed, told
from train.checkpoint import DEFAULT_RUNS_DIR, Run, open_run
from train.config import TrainConfig
from train.data.mnist import DEFAULT_DATA_DIR
from train.device import prepare_machine
from train.errors import ConfigError, StoppedError, TrainError
from train.evaluation import evaluate
from train.presets import PRESETS
from train.reports import activations, bench, judging, overview, reference
from train.reports.run_page import write_page
from train.run_command import NEWEST, train
from train.runs import each_run, newest_finished

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def build_parser() -> argparse.ArgumentParser:
    """The parser; its flags are made from TrainConfig's fields, so that each option exists once."""
    parser = OneLineParser(prog="python -m train", description="Train the digit GANs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, defaults in PRESETS.items():
        _add_preset(commands, name, defaults)
    view = commands.add_parser("activations", help="draw the activations inside a generator")
    view.add_argument("--run", type=Path, help="run folder (default: the newest finished run of each preset)")
    view.add_argument("--sample", type=int, default=0, help="which of the 36 latents to draw (default: 0)")
    listed = commands.add_parser("list", help="list all runs with progress, time, quality and data")
    table = commands.add_parser("compare", help="compare runs; without RUN, compare an mlp run's losses with the notebook's")
    table.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="two or more run folders")
    table.add_argument("--run", type=Path, help="the run to compare with the notebook (default: the newest mlp run)")
    page = commands.add_parser("report", help="write the report.html of a run again")
    page.add_argument("--run", type=Path, help="run folder (default: the newest finished run of each preset)")
    judged = commands.add_parser(
        "evaluate", help="evaluate 10,000 digits of a run, of the newest finished run of each preset, or of a data set"
    )
    what = judged.add_mutually_exclusive_group()
    what.add_argument("--run", type=Path, help="run folder (default: the newest finished run of each preset)")
    what.add_argument(
        "--dataset",
        type=Path,
        help="folder of a data set to evaluate instead of a run: with labels, joined as idx files by serve.dataset",
    )
    judged.add_argument("--missing", action="store_true", help="skip runs that have been evaluated")
    judged.add_argument(
        "--scores",
        type=int,
        default=1,
        help="number of classifiers to train; the classification accuracy score is their mean (default: 1)",
    )
    speed = commands.add_parser("bench", help="time a training step of each preset on this machine")
    speed.add_argument("--seconds", type=float, default=10.0, help="how long to time each preset (default: 10)")
    for command in (view, listed, table, page, judged):
        command.add_argument("--runs-dir", type=Path, default=DEFAULT_RUNS_DIR, help="where runs are kept (default: runs)")
    for command in (speed, judged):
        _add_machine_flags(command)
    _add_data_flag(judged)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Errors of the user's making are one line on stderr."""
    flags = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    commands = {
        "activations": _activations,
        "list": _list,
        "compare": _compare,
        "report": _report,
        "evaluate": _evaluate,
        "bench": _bench,
    }
    try:
        return commands.get(flags.command, train)(flags)
    except TrainError as error:
        return failed(error)
    except OSError as error:  # a disk that is full, a folder that has gone
        full = "; make room" if error.errno in FULL else ""
        if full and flags.command in PRESETS:  # auto: it may have saved nothing yet
            full = "; what was saved before is kept: make room, and add --resume=auto to the same command"
        return failed(told(error) + full)
    except StoppedError as stopped:
        print(f"{stopped}; add --resume to the same command to go on", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _add_preset(commands: Any, name: str, defaults: TrainConfig) -> None:
    command = commands.add_parser(name, help=f"train the {name} preset", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for spec in dataclasses.fields(TrainConfig):
        if spec.name in ("preset", "architecture"):
            continue
        value = getattr(defaults, spec.name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)
        choices = spec.metadata.get("choices")
        command.add_argument(
            "--" + spec.name.replace("_", "-"),
            help=f"{spec.metadata['help']} (default: {shown})",
            default=argparse.SUPPRESS,
            metavar="{" + ",".join(choices) + "}" if choices else "VALUE",
        )
    _add_machine_flags(command)
    command.add_argument(
        "--capture",
        choices=("auto", "on", "off"),
        default="auto",
        help="capture the training step as a CUDA graph; auto: with one GPU",
    )
    _add_data_flag(command)
    command.add_argument("--runs-dir", type=Path, default=DEFAULT_RUNS_DIR, help="where runs are kept")
    command.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="RUN",
        help="resume this run, or without RUN the newest unfinished one; auto: the same, or begin a new run if there is none",
    )


def _add_data_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data-dir",
        type=Path,
        default=DEFAULT_DATA_DIR,
        help="folder of the four idx files; MNIST is fetched into it if it is missing or empty",
    )


def _add_machine_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    command.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0: PyTorch's default, within the container's CPU quota"
    )


def _activations(flags: argparse.Namespace) -> int:
    return each_run(_chosen_runs(flags), lambda run: print(activations.draw(run, flags.sample)), TrainError)


def _chosen_runs(flags: argparse.Namespace) -> list[Run]:
    """The run that was named, or the newest finished one of each preset. Raises CheckpointError when there is none."""
    return [open_run(flags.run)] if flags.run else newest_finished(flags.runs_dir)


def _list(flags: argparse.Namespace) -> int:
    print(overview.list_runs(flags.runs_dir))
    return 0


def _report(flags: argparse.Namespace) -> int:
    return each_run(_chosen_runs(flags), lambda run: print(write_page(run)), TrainError)


def _compare(flags: argparse.Namespace) -> int:
    if flags.runs:
        if len(flags.runs) < 2 or flags.run:
            raise ConfigError("compare takes two run folders or more; or --run, for the notebook's table")
        print(overview.compare_runs([open_run(folder) for folder in flags.runs]))
        return 0
    run = open_run(flags.run) if flags.run else reference.comparable_run(flags.runs_dir)
    table, within = reference.compare_losses(run)
    print(f"{run.folder}\n{table}")
    return 0 if within else 1


def _evaluate(flags: argparse.Namespace) -> int:
    _check_scores(flags.scores)
    device = prepare_machine(flags.device, flags.threads)
    if flags.dataset:
        report = judging.judge_dataset(flags.dataset, flags.data_dir, flags.runs_dir, device, flags.scores)
        print(evaluate.table([(flags.dataset.resolve().name, report)]))
        return 0
    runs = _chosen_runs(flags)
    if flags.missing:
        runs = [run for run in runs if not (run.folder / evaluate.QUALITY_FILE).exists()]
        if not runs:
            return 0
    reports = judging.judge_runs(runs, flags.data_dir, flags.runs_dir, device, flags.scores)
    if reports:
        print(evaluate.table([(run.config.preset, report) for run, report in reports]))
    return 0 if len(reports) == len(runs) else 2


def _bench(flags: argparse.Namespace) -> int:
    if not 0 < flags.seconds <= 3600:
        raise ConfigError(f"--seconds must be over 0 and at most 3600, got {flags.seconds:g}")
    device = prepare_machine(flags.device, flags.threads)
    print(bench.table(device, flags.seconds))
    return 0


def _check_scores(scores: int) -> None:
    if not 1 <= scores <= 100:
        raise ConfigError(f"--scores must be from 1 to 100, got {scores}")
