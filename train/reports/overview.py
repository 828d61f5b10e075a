"""Tables of runs: all runs of a folder, and the settings and results of several runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.checkpoint import CONFIG_FILE, LOSSES_FILE, RESULT_FILE, Run, how_to_train, open_run
from train.config import DEFAULT_PRESET
from train.errors import CheckpointError
from train.evaluation.evaluate import COLUMNS, QUALITY_FILE, UNKNOWN, markdown, shown

LISTED = ("label_accuracy", "frechet_distance", "recall", "classification_accuracy_score")  # of the quality, in a list


def list_runs(runs_dir: Path) -> str:
    """Every run in ``runs_dir``, oldest first within its preset, as a table. Raises CheckpointError when there is none."""
    folders = [path.parent for path in sorted(runs_dir.glob(f"*/*/{CONFIG_FILE}"))]
    if not folders:
        raise CheckpointError(f"there is no run in {runs_dir}; start one with: {how_to_train(DEFAULT_PRESET, runs_dir)}")
    head = ["run", "state", "steps", "trained for", *(COLUMNS[figure][0] for figure in LISTED)]
    rows = []
    for folder in folders:
        try:
            run = open_run(folder)
        except CheckpointError:
            rows.append([str(folder), "damaged", *([UNKNOWN] * (len(head) - 2))])
        else:
            rows.append([str(folder), state_of(run), *training_of(run), *_quality(run, LISTED)])
    return markdown([head, ["---"] * len(head), *rows])


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


def read_json(path: Path) -> Mapping[str, Any]:
    """A file that a run may have or not: empty when it is not there, or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def state_of(run: Run) -> str:
    """Finished, unfinished or not begun."""
    if run.finished:
        return "finished"
    return "unfinished" if run.checkpoints() else "not begun"


def training_of(run: Run) -> tuple[str, str]:
    """Steps and time as they are shown."""
    result = read_json(run.folder / RESULT_FILE)
    checkpoints = run.checkpoints()
    step = result.get("step", int(checkpoints[-1].stem.removeprefix("step-")) if checkpoints else 0)
    seconds = result.get("seconds", result.get("seconds_since_last_start"))
    return f"{step:,}", UNKNOWN if seconds is None else f"{seconds / 60:.1f} min"


def _quality(run: Run, figures: Sequence[str]) -> list[str]:
    judged = read_json(run.folder / QUALITY_FILE).get("model", {})
    return [shown(judged, each) for each in figures]


def _last_losses(run: Run) -> list[str]:
    """The generator's and the discriminator's."""
    path = run.folder / LOSSES_FILE
    losses = np.load(path) if path.exists() else np.zeros((0, 3))
    return [f"{loss:.4f}" for loss in losses[-1, 1:]] if len(losses) else [UNKNOWN, UNKNOWN]


def _setting(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
