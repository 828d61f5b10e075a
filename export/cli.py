"""The command line of export."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.bundle import export_run, verify
from export.errors import ExportError
from serve.errors import ServeError
from train.checkpoint import newest_run, open_run
from train.config import PRESETS
from train.errors import CheckpointError, TrainError


class _OneLineParser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="python -m export", description="Export trained generators and prove their parity.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="publish the newest finished run of each preset, or one run")
    run.add_argument("--run", type=Path, help="the run folder to export (default: the newest finished one of each preset)")
    run.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    run.add_argument("--models-dir", type=Path, default=Path("models"), help="where bundles go (default: models)")
    run.add_argument("--name", help="the model's name (default: its preset)")
    check = commands.add_parser("verify", help="compare a bundle's TorchScript and ONNX graph on fresh latents")
    check.add_argument("bundle", type=Path, help="a folder such as models/dcgan/1")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Errors are one line on stderr."""
    flags = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        return _run(flags) if flags.command == "run" else _verify(flags)
    except (ExportError, TrainError, ServeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(flags: argparse.Namespace) -> int:
    if flags.run:
        runs = [open_run(flags.run)]
    elif flags.name:
        raise ExportError("--name needs --run: without it, each preset's newest run is exported under its own name")
    else:
        runs = []
        for preset in PRESETS:
            try:
                runs.append(newest_run(flags.runs_dir, preset, finished=True))
            except CheckpointError as error:
                print(f"skipped: {error}", file=sys.stderr)
        if not runs:
            raise ExportError(f"there is no finished run in {flags.runs_dir}; start one with: make train PRESET=dcgan")
    for run in runs:
        done = export_run(run, flags.models_dir, flags.name)
        print(f"{done.path}: worst difference {done.worst_images:.2g} of the image range, {done.worst_pixel_levels} pixel levels")
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
