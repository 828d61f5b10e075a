"""Chooses among the runs of a folder: the newest, finished or not. Unusable runs are reported and skipped."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from train.checkpoint import CONFIG_FILE, DEFAULT_RUNS_DIR, RESULT_FILE, Run, latest_checkpoint, open_run
from train.errors import CheckpointError
from train.presets import DEFAULT_PRESET, PRESETS

log = logging.getLogger(__name__)

CLOCKS_DIFFER = timedelta(days=1)  # by no more than this


def runs_of(runs_dir: Path, preset: str) -> list[Run]:
    """The runs of a preset that can be used, newest first, by the time that each recorded when it began.

    One that began in the future, by a clock that was wrong, comes last.
    """
    latest = datetime.now(UTC) + CLOCKS_DIFFER
    runs = []
    for folder in sorted(path.parent for path in (runs_dir / preset).glob(f"*/{CONFIG_FILE}")):
        try:
            runs.append(open_run(folder))
        except CheckpointError as error:
            log.warning("skipped: %s", error)
    for run in runs:
        if run.started > latest:
            log.warning("%s began at %s by its clock: it counts as the oldest", run.folder, moment(run))
    return sorted(runs, key=lambda run: (run.started <= latest, run.started, run.folder), reverse=True)


def newest_run(runs_dir: Path, preset: str, *, finished: bool) -> Run:
    """The newest run of a preset, finished or not as asked; one that has saved nothing yet is passed over.

    Raises CheckpointError when there is none.
    """
    for run in runs_of(runs_dir, preset):
        if run.finished == finished and run.checkpoints():
            return run
    state = "finished" if finished else "unfinished"
    raise CheckpointError(f"no {state} run of {preset} in {runs_dir / preset}; start one with: {how_to_train(preset, runs_dir)}")


def newest_finished(runs_dir: Path) -> list[Run]:
    """The newest finished run of each preset; those that have none are named on the log. Raises CheckpointError without any."""
    runs, missing = [], []
    for preset in PRESETS:
        try:
            runs.append(newest_run(runs_dir, preset, finished=True))
        except CheckpointError as error:
            missing.append(error)
    if not runs:
        raise CheckpointError(f"there is no finished run in {runs_dir}; start one with: {how_to_train(DEFAULT_PRESET, runs_dir)}")
    for reason in missing:
        log.warning("skipped: %s", reason)
    return runs


def final_checkpoint(run: Run) -> dict[str, Any]:
    """The newest checkpoint of a finished run. Raises CheckpointError when it is of an earlier step than the run's last."""
    state = latest_checkpoint(run)
    try:
        last = json.loads((run.folder / RESULT_FILE).read_bytes())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{run.folder / RESULT_FILE} cannot be read; train the run again") from None
    if state["step"] != last:
        raise CheckpointError(
            f"{run.folder} ended at step {last}, and its newest checkpoint is of step {state['step']}: what was trained last is"
            f" lost; train it again with: {how_to_resume(run)}"
        )
    return state


def each_run(runs: Sequence[Run], do: Callable[[Run], object], *errors: type[Exception]) -> int:
    """Do something with each run; one of the ``errors`` is a line on standard error, and the others go on.

    Returns the exit status.
    """
    status = 0
    for run in runs:
        try:
            do(run)
        except errors as error:
            whose = "" if str(run.folder) in str(error) else f"{run.folder}: "
            print(f"error: {whose}{error}", file=sys.stderr)
            status = 2
    return status


def moment(run: Run) -> str:
    """When a run began, as text."""
    return f"{run.started:%Y-%m-%d %H:%M} UTC"


def how_to_train(preset: str, runs_dir: Path) -> str:
    """The command that trains a preset in ``runs_dir``."""
    return f"make train PRESET={preset}" + make_arguments("--runs-dir", runs_dir) * (runs_dir != DEFAULT_RUNS_DIR)


def how_to_resume(run: Run) -> str:
    """The command that trains a run further."""
    return f"make train PRESET={run.config.preset}" + make_arguments("--resume", run.folder)


def make_arguments(*words: object) -> str:
    """`` ARGS="..."`` for a make target: words of a shell within a word of a shell."""
    return make_variable("ARGS", shlex.join(map(str, words)), quote=True)


def make_variable(name: str, value: object, quote: bool = False) -> str:
    """`` NAME=value`` for a make target, as it is typed: quoted if that is needed, or wanted."""
    text = str(value).replace("$", "$$")
    safe = shlex.quote(text)
    if (quote or safe != text) and not set(text) & set('"$`\\!'):
        safe = f'"{text}"'
    return f" {name}={safe}"
