"""Run folders and checkpoints: state dicts and JSON, written atomically, read with ``weights_only=True``.

    runs/<preset>/<time>/
        config.json           the resolved config, the data's digests, the machine and versions
        checkpoints/*.pt      both networks, both optimizers, noise generator, step, losses so far
        losses.npy            (log points, 3) float64: step, generator loss, discriminator loss
        result.json           written last: a run without it is not finished

A resumed run depends on its checkpoint alone; losses.npy and the pictures are made from it.
"""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch

from train.config import DEFAULT_PRESET, PRESETS, TrainConfig
from train.errors import CheckpointError

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
LOSSES_FILE = "losses.npy"
DEFAULT_RUNS_DIR = Path("runs")


@dataclass(frozen=True)
class Run:
    """A run folder and what its config.json says."""

    folder: Path
    config: TrainConfig
    provenance: dict[str, Any]

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT_FILE).exists()

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*.pt"))


def create_run(runs_dir: Path, config: TrainConfig, provenance: dict[str, Any]) -> Run:
    """Make a new run folder with its config. Raises CheckpointError when it cannot be written."""
    name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parent = runs_dir / config.preset
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = _first_free(parent, name)
        (folder / "checkpoints").mkdir()
        (folder / "pictures").mkdir()
        write_json(folder / CONFIG_FILE, {"config": config.to_json(), "provenance": provenance})
    except OSError as error:
        raise CheckpointError(f"cannot write a run to {parent} ({error.strerror}); name another with --runs-dir") from None
    return Run(folder, config, provenance)


def open_run(folder: Path) -> Run:
    """Read a run folder's config. Raises CheckpointError."""
    try:
        stored = json.loads((folder / CONFIG_FILE).read_text())
        provenance = stored["provenance"]
        if not isinstance(provenance.get("data", {}), dict):
            raise TypeError(CONFIG_FILE)  # as what a missing key raises
        return Run(folder, TrainConfig.from_json(stored["config"]), provenance)
    except OSError:
        raise CheckpointError(f"{folder} is not a run folder: it has no readable {CONFIG_FILE}") from None
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged; the run cannot be used") from None


def newest_run(runs_dir: Path, preset: str, *, finished: bool) -> Run:
    """The newest run of a preset, finished or not as asked; one that has saved nothing yet is passed over.

    Raises CheckpointError when there is none.
    """
    parent = runs_dir / preset
    folders = sorted((entry for entry in parent.glob("*") if (entry / CONFIG_FILE).exists()), reverse=True)
    for folder in folders:
        if (folder / RESULT_FILE).exists() == finished and any((folder / "checkpoints").glob("step-*.pt")):
            return open_run(folder)
    state = "finished" if finished else "unfinished"
    raise CheckpointError(f"no {state} run of {preset} in {parent}; start one with: {how_to_train(preset, runs_dir)}")


def how_to_train(preset: str, runs_dir: Path) -> str:
    """What to type for a run of a preset in ``runs_dir``."""
    return f"make train PRESET={preset}" + f' ARGS="--runs-dir {runs_dir}"' * (runs_dir != DEFAULT_RUNS_DIR)


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


def save_checkpoint(run: Run, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint atomically, then drop the oldest beyond ``keep_checkpoints``."""
    path = run.folder / "checkpoints" / f"step-{step:08d}.pt"
    write_atomically(path, lambda stream: torch.save(state, stream))
    if run.config.keep_checkpoints:
        for old in run.checkpoints()[: -run.config.keep_checkpoints]:
            old.unlink()
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as plain tensors and numbers. Raises CheckpointError when it is damaged."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); delete it to use the one before") from None
    return state


def latest_checkpoint(run: Run) -> dict[str, Any]:
    """The newest checkpoint's content. Raises CheckpointError when the run has none."""
    paths = run.checkpoints()
    if not paths:
        raise CheckpointError(f"{run.folder} has no checkpoint yet; start the run anew")
    return load_checkpoint(paths[-1])


def final_checkpoint(run: Run) -> dict[str, Any]:
    """The newest checkpoint of a finished run. Raises CheckpointError when it is of an earlier step than the run's last."""
    state = latest_checkpoint(run)
    try:
        last = json.loads((run.folder / RESULT_FILE).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{run.folder / RESULT_FILE} cannot be read; train the run again") from None
    if state["step"] != last:
        raise CheckpointError(
            f"{run.folder} ended at step {last}, and its newest checkpoint is of step {state['step']}: what was trained last is"
            " lost; train the run again"
        )
    return state


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda stream: stream.write(text.encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside and rename: after a crash at any moment the old content or the whole new one is there."""
    content = io.BytesIO()
    write(content)  # in memory: of a full disk PyTorch's own writing makes an error that names nothing
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _first_free(parent: Path, name: str) -> Path:
    for suffix in ["", *(f"-{number}" for number in range(2, 100))]:
        folder = parent / (name + suffix)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise CheckpointError(f"{parent} holds 99 runs named {name}; wait a second")
