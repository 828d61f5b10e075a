"""Tables of runs: all runs of a folder, and the settings and results of several runs side by side."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from train.checkpoint import CONFIG_FILE, PROGRESS_FILE, RESULT_FILE, Run, number_of, open_run
from train.data.mnist import data_name
from train.errors import CheckpointError, OtherVersionError
from train.evaluation.evaluate import COLUMNS, QUALITY_FILE, UNKNOWN, markdown, shown
from train.presets import DEFAULT_PRESET
from train.runs import how_to_train

log = logging.getLogger(__name__)

Kind = TypeVar("Kind")

LISTED = ("label_accuracy", "frechet_distance", "recall", "classification_accuracy_score")  # of the quality, in a list


def list_runs(runs_dir: Path) -> str:
    """Every run in ``runs_dir``, oldest first within its preset, as a table. Raises CheckpointError when there is none."""
    folders = [path.parent for path in sorted(runs_dir.glob(f"*/*/{CONFIG_FILE}"))]
    if not folders:
        raise CheckpointError(f"there is no run in {runs_dir}; start one with: {how_to_train(DEFAULT_PRESET, runs_dir)}")
    head = ["run", "state", "steps", "trained for", *(COLUMNS[figure][0] for figure in LISTED), "data"]
    rows = []
    for folder in folders:
        try:
            run = open_run(folder)
            cells = [state_of(run), *training_of(run), *_quality(run, LISTED), data_name(run.provenance.get("data", {}))]
            rows.append((folder.parent, run.started.timestamp(), [str(folder), *cells]))
        except CheckpointError as error:
            state = "other version" if isinstance(error, OtherVersionError) else "damaged"
            rows.append((folder.parent, 0.0, [str(folder), state, *([UNKNOWN] * (len(head) - 2))]))
    return markdown([head, ["---"] * len(head), *(cells for *_, cells in sorted(rows))])


def compare_runs(runs: Sequence[Run]) -> str:
    """What the runs differ in, their last losses, their time and their quality: a row for each, a column for each run."""
    settings = [run.config.to_json() for run in runs]
    differing = [name for name in settings[0] if len({json.dumps(values[name]) for values in settings}) > 1]
    names = [*differing, "device", "state", "steps", "trained for", "last generator loss", "last discriminator loss"]
    names += [title for title, _ in COLUMNS.values()]
    columns = []
    for run, values in zip(runs, settings, strict=True):
        came_of_it = [state_of(run), *training_of(run), *_last_losses(run), *_quality(run, tuple(COLUMNS))]
        columns.append([*(_setting(values[name]) for name in differing), run.provenance.get("device_name", UNKNOWN), *came_of_it])
    head = ["", *(str(run.folder) for run in runs)]
    return markdown([head, ["---"] * len(head), *zip(names, *columns, strict=True)])


def read_as(path: Path, kind: type[Kind]) -> Kind | None:
    """A JSON file that a run may have or not, as a msgspec type; None when it is not there, or is something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        log.warning("%s is damaged (%s)", path, str(error)[:100])
        return None


class Training(msgspec.Struct):
    """``result.json``, or of an unfinished run ``progress.json``."""

    step: int
    steps: int = 0  # at the end, of an unfinished run
    seconds: float | None = None  # results of before 2026-11 do not have it
    seconds_since_last_start: float | None = None
    steps_since_last_start: int | None = None


class Judged(msgspec.Struct):
    """Figures by COLUMNS' names, of generated and of real digits."""

    model: dict[str, Any]
    real: dict[str, Any]


class Quality(Judged):
    """``quality.json``."""

    step: int
    samples: int
    second_judge: Judged | None = None
    seconds: float | None = None


def state_of(run: Run) -> str:
    """Finished, unfinished or not begun."""
    if run.finished:
        return "finished"
    return "unfinished" if run.checkpoints() else "not begun"


def training_of(run: Run) -> tuple[str, str]:
    """Steps and time as they are shown, of an unfinished run those of its last checkpoint."""
    known = read_as(run.folder / RESULT_FILE, Training) or read_as(run.folder / PROGRESS_FILE, Training)
    if known is None:
        checkpoints = run.checkpoints()
        return f"{number_of(checkpoints[-1]) if checkpoints else 0:,}", UNKNOWN
    seconds = known.seconds_since_last_start if known.seconds is None else known.seconds
    of = "" if run.finished or not known.steps else f" of {known.steps:,}"
    return f"{known.step:,}{of}", UNKNOWN if seconds is None else f"{seconds / 60:.1f} min"


def _quality(run: Run, figures: Sequence[str]) -> list[str]:
    judged = read_as(run.folder / QUALITY_FILE, Quality)
    return [shown(judged.model if judged else {}, each) for each in figures]


def _last_losses(run: Run) -> list[str]:
    """The generator's and the discriminator's."""
    losses = run.losses()
    return [f"{loss:.4f}" for loss in losses[-1, 1:]] if len(losses) else [UNKNOWN, UNKNOWN]


def _setting(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
