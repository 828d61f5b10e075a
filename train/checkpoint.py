"""Run folders and checkpoints: state dicts and JSON, written atomically, read with ``weights_only=True``.

    runs/<preset>/<time>/
        config.json           the resolved config, the data's digests, when it began, the machine and versions
        checkpoints/*.pt      both networks, both optimizers, noise generator, step, losses so far
        progress.json         the last checkpoint's step, of how many, and the time so far
        losses.npy            (log points, 3) float64: step, generator loss, discriminator loss
        result.json           written last: a run without it is not finished

A resumed run depends on its checkpoint alone; losses.npy and the pictures are made from it. ``train.runs`` chooses among runs.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from serve.files import locked, remove_abandoned_in, replacing
from train.config import TrainConfig
from train.errors import CheckpointError, ConfigError, OtherVersionError

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
PROGRESS_FILE = "progress.json"
LOSSES_FILE = "losses.npy"
DEFAULT_RUNS_DIR = Path("runs")
NAMED_BY_TIME = "%Y%m%d-%H%M%S"

Losses = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


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

    @property
    def started(self) -> datetime:
        """When the run began, by its config; runs from before 2026-12: by the folder's name, or else by the config file's age."""
        try:
            return datetime.fromisoformat(self.provenance["started"]).astimezone(UTC)
        except (KeyError, TypeError, ValueError):
            pass
        try:
            return datetime.strptime(self.folder.name[:15], NAMED_BY_TIME).replace(tzinfo=UTC)
        except ValueError:
            return datetime.fromtimestamp((self.folder / CONFIG_FILE).stat().st_mtime, UTC)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return numbered(self.folder / "checkpoints", "step", ".pt")

    def grids(self) -> list[Path]:
        """Pictures of generated digits, oldest first."""
        return numbered(self.pictures, "fake", ".png")

    def losses(self) -> Losses:
        """``losses.npy``: (log points, 3); (0, 3) if the file is missing or damaged."""
        path = self.folder / LOSSES_FILE
        try:
            losses: Losses = np.load(path, allow_pickle=False)
            if losses.ndim == 2 and losses.shape[1] == 3:
                return losses
        except FileNotFoundError:
            return np.zeros((0, 3))
        except (OSError, ValueError, EOFError, AttributeError):  # the last one: of an archive of arrays
            pass
        log.warning("%s cannot be read", path)
        return np.zeros((0, 3))


def numbered(folder: Path, name: str, suffix: str) -> list[Path]:
    """Files with names such as ``step-00000469.pt``, in the order of their numbers; other names are skipped."""
    pattern = re.compile(rf"{name}-[0-9]{{1,18}}{re.escape(suffix)}")
    return sorted((path for path in folder.glob(f"{name}-*{suffix}") if pattern.fullmatch(path.name)), key=number_of)


def number_of(path: Path) -> int:
    """The number in a name of ``numbered``."""
    return int(path.stem.rpartition("-")[2])


def create_run(runs_dir: Path, config: TrainConfig, provenance: dict[str, Any]) -> Run:
    """Make a new run folder with its config. Raises CheckpointError when it cannot be written."""
    now = datetime.now(UTC)
    provenance = {"started": now.isoformat(timespec="seconds"), **provenance}
    parent = runs_dir / config.preset
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = _first_free(parent, now.strftime(NAMED_BY_TIME))
        (folder / "checkpoints").mkdir()
        (folder / "pictures").mkdir()
        run = Run(folder, config, provenance)
        write_config(run)
    except OSError as error:
        raise CheckpointError(f"cannot write a run to {parent} ({error.strerror}); name another with --runs-dir") from None
    return run


def write_config(run: Run) -> None:
    """Write ``config.json``. Raises OSError."""
    write_json(run.folder / CONFIG_FILE, {"config": run.config.to_json(), "provenance": run.provenance})


def open_run(folder: Path) -> Run:
    """Read a run folder's config. Raises CheckpointError naming the run; OtherVersionError when its fields are not ours."""
    try:
        stored = json.loads((folder / CONFIG_FILE).read_bytes())
        provenance = stored["provenance"]
        if not isinstance(provenance.get("data", {}), dict):
            raise TypeError(CONFIG_FILE)  # as what a missing key raises
        return Run(folder, TrainConfig.from_json(stored["config"]), provenance)
    except OSError:
        raise CheckpointError(f"{folder} is not a run folder: it has no readable {CONFIG_FILE}") from None
    except ConfigError as error:
        raise OtherVersionError(f"{folder} was made by another version of this project ({error}); use that version") from None
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged; the run cannot be used") from None


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Lock the run for the block: no other process can train it. Raises CheckpointError when one does already.

    What a killed process has left half-written is cleared away first.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run.folder, wait_s=0))
        except BlockingIOError:
            raise CheckpointError(f"{run.folder} is being trained by another process; let it end, or stop it first") from None
        for folder in (run.folder, run.folder / "checkpoints", run.pictures):
            remove_abandoned_in(folder)
        yield


def save_checkpoint(run: Run, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint atomically, then drop the oldest beyond ``keep_checkpoints``."""
    path = run.folder / "checkpoints" / f"step-{step:08d}.pt"
    write_atomically(path, lambda stream: torch.save(state, stream))
    if run.config.keep_checkpoints:
        for old in run.checkpoints()[: -run.config.keep_checkpoints]:
            old.unlink()
    return path


def load_checkpoint(path: Path, way_out: str) -> dict[str, Any]:
    """Read tensors and plain numbers by name. Raises CheckpointError, which names the way out, when the file is damaged."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state.keys()  # or it is something else
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); {way_out}") from None
    return state


def latest_checkpoint(run: Run) -> dict[str, Any]:
    """The newest checkpoint's content. Raises CheckpointError when the run has none, or it is damaged."""
    paths = run.checkpoints()
    if not paths:
        raise CheckpointError(f"{run.folder} has no checkpoint yet; start the run anew")
    way_out = "delete it to use the one before" if len(paths) > 1 else "start the run anew"
    state = load_checkpoint(paths[-1], way_out)
    if "step" not in state:
        raise CheckpointError(f"{paths[-1]} is no checkpoint; {way_out}")
    return state


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda stream: stream.write(text.encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a temporary file and rename it: after a crash at any moment the file has its old or its whole new content."""
    content = io.BytesIO()
    write(content)  # in memory: of a full disk PyTorch's own writing makes an error that names nothing
    with replacing([path], 0o644) as (stream,):
        stream.write(content.getbuffer())


def _first_free(parent: Path, name: str) -> Path:
    for suffix in ["", *(f"-{number}" for number in range(2, 100))]:
        folder = parent / (name + suffix)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise CheckpointError(f"{parent} holds 99 runs named {name}; wait a second")
