"""Pictures of a generator's digits, by address, so that a server can be asked for everything that they show.

digits.png          a row for each label (of an unconditional model: the first digits of a seed)
styles.png          a row for each latent vector, with every label in turn
truncation.png      the same addresses from truncation 0.2 to none
interpolation.png   from one address to the next on the arc between their latent vectors
neighbours.png      generated digits, and below each the three training images nearest to it
worst.png best.png  of 10,000 digits, those whose labels the judge is least and most confident of, if the run was evaluated
layer1.png …        the activations of each layer for one sample
training.gif        the same latents in the course of training
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.errors import ExportError
from export.generator import served_generator, torch_form
from serve.latents import Span, draw_span, slerp
from train.checkpoint import Run, latest_checkpoint
from train.data.mnist import Mnist
from train.evaluation import quality
from train.models import trained_generator
from train.pictures import save_grid
from train.reports import activations

SEED = 7
COLUMNS = 12
STEPS = 11
TRUNCATIONS = (0.2, 0.5, 1.0, 1.5, 0.0)
TRUNCATED_LABEL = 2  # one digit for all of them: what goes is the variety
NEIGHBOURS = 3

Pixels = NDArray[np.uint8]
Digits = Callable[[NDArray[np.float32], NDArray[np.int64] | None], Pixels]


class Gallery:
    """Draws a run's pictures into ``folder``. Raises CheckpointError when the run has none to draw."""

    def __init__(self, run: Run, folder: Path) -> None:
        self._run = run
        self._folder = folder
        form = torch_form(served_generator(run.config, trained_generator(run.config, latest_checkpoint(run))))
        self._digits: Digits = lambda latents, labels: form(latents, labels)["pixels"]
        self._rows = run.config.labels or 10

    def draw(self, data: Mnist) -> list[Path]:
        """All of them; returns the files. Raises ExportError when they cannot be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._save("digits.png", self._of(Span(SEED, 0, self._rows * COLUMNS), self._each_label(COLUMNS)), COLUMNS)
            if self._run.config.conditional:
                self._save("styles.png", self._styles(), self._rows)
            self._save("truncation.png", self._truncation(), COLUMNS)
            self._save("interpolation.png", self._interpolation(), STEPS)
            self._save("neighbours.png", self._neighbours(data), COLUMNS)
            self._copy_what_the_run_drew()
        except OSError as error:
            raise ExportError(f"cannot write to {self._folder} ({error.strerror}); name another folder with --out") from None
        return sorted(self._folder.iterdir())

    def _of(self, span: Span, labels: NDArray[np.int64] | None) -> Pixels:
        return self._digits(self._latents(span), labels)

    def _latents(self, span: Span) -> NDArray[np.float32]:
        return draw_span(span, self._run.config.latent_size, self._run.config.labels)[0]

    def _each_label(self, times: int) -> NDArray[np.int64] | None:
        return np.repeat(np.arange(self._rows), times) if self._run.config.conditional else None

    def _in_turn(self, count: int) -> NDArray[np.int64] | None:
        return np.arange(count) % self._rows if self._run.config.conditional else None

    def _styles(self) -> Pixels:
        return self._digits(np.repeat(self._latents(Span(SEED, 0, self._rows)), self._rows, axis=0), self._in_turn(self._rows**2))

    def _truncation(self) -> Pixels:
        spans = [Span(SEED, 0, COLUMNS, truncation=truncation) for truncation in TRUNCATIONS]
        labels = np.full(COLUMNS, min(TRUNCATED_LABEL, self._rows - 1)) if self._run.config.conditional else None
        return np.concatenate([self._of(span, labels) for span in spans])

    def _interpolation(self) -> Pixels:
        ends = self._latents(Span(SEED, 0, 2 * self._rows))
        ways = [slerp(ends[2 * row], ends[2 * row + 1], STEPS) for row in range(self._rows)]
        return self._digits(np.concatenate(ways), self._each_label(STEPS))

    def _neighbours(self, data: Mnist) -> Pixels:
        made = self._of(Span(SEED, 0, COLUMNS), self._in_turn(COLUMNS))
        training = data.train_images.flatten(1).float() / 255
        _, found = quality.nearest(torch.from_numpy(made).flatten(1).float() / 255, training, NEIGHBOURS)
        return np.concatenate([made, *(data.train_images[chosen].numpy() for chosen in found.t())])

    def _copy_what_the_run_drew(self) -> None:
        if self._run.config.architecture != "mlp":
            activations.draw(self._run, 0)
            for picture in sorted((self._run.folder / "activations").glob("sample-00-layer*.png")):
                shutil.copyfile(picture, self._folder / picture.name.removeprefix("sample-00-"))
        for drawn, name in (("fakes.gif", "training.gif"), ("worst.png", "worst.png"), ("best.png", "best.png")):
            if (picture := self._run.folder / drawn).exists():
                shutil.copyfile(picture, self._folder / name)

    def _save(self, name: str, pixels: Pixels, columns: int) -> None:
        images: Tensor = torch.from_numpy(pixels).unsqueeze(1).float() / 255
        save_grid(images, columns, self._folder / name, separator=0.35)
