"""A run's quality: 10,000 of its digits judged beside the MNIST test set, and real digits judged in the same way.

What comes of it is written as ``quality.json`` into the run's folder; export carries it into the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train import quality
from train.checkpoint import Run, latest_checkpoint, write_json
from train.data import Mnist
from train.errors import QualityError
from train.judge import LABELS, Judge, judge_file, train_judge, training_seconds
from train.models import trained_generator

QUALITY_FILE = "quality.json"
SAMPLES = 10_000
SCORED_SAMPLES = 60_000  # as many as MNIST has for training
SEED = 20_260_102
BATCH = 500

# What is written of a set of digits, and how a table shows it.
COLUMNS = {
    "label_accuracy": ("label acc.", "{:.2%}"),
    "confident_share": ("confident", "{:.2%}"),
    "class_imbalance": ("imbalance", "{:.4f}"),
    "frechet_distance": ("Fréchet", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "nearest_training_image": ("nearest", "{:.2f}"),
    "classification_accuracy_score": ("CAS", "{:.2%}"),
}


class Evaluator:
    """Judges sets of digits by one judge against one test set. ``samples`` are at most as many as the test set has."""

    def __init__(
        self, data: Mnist, judge: Judge, device: torch.device, samples: int = SAMPLES, scored: int = SCORED_SAMPLES
    ) -> None:
        self._data = data
        self._judge = judge
        self._device = device
        self._samples = samples
        self._scored = scored
        self._test_features, self._test_probabilities = judge.read(data.test_images)
        self._training_rows = data.train_images.flatten(1).float().to(device) / 255

    @cached_property
    def real(self) -> dict[str, Any]:
        """What real digits reach: as many training images in the samples' place, and test images' own neighbours."""
        chosen = torch.randperm(len(self._data.train_images), generator=torch.Generator().manual_seed(SEED))[: self._samples]
        report = self._compared(self._data.train_images[chosen], self._data.train_labels[chosen])
        # A training image's nearest training image is itself; the test images' distance is what a new digit should have.
        report["nearest_training_image"] = self._nearest(self._data.test_images)
        judged = self._judge.accuracy(self._data.test_images, self._data.test_labels)
        return report | {"label_accuracy": judged, "classification_accuracy_score": judged}

    def fake(self, run: Run, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """What the digits of a run's generator reach, as the checkpoint has it."""
        generator = trained_generator(run.config, checkpoint).to(self._device).eval()
        classes = run.config.labels
        low, high = run.config.pixel_range

        @torch.no_grad()
        def digits(count: int, seed: int) -> tuple[Tensor, Tensor | None]:
            noise = torch.Generator().manual_seed(seed)
            labels = torch.arange(count) % classes if classes else None
            made = []
            for first in range(0, count, BATCH):
                rows = torch.randn(min(BATCH, count - first), run.config.latent_size, generator=noise)
                inputs = [rows] if labels is None else [rows, labels[first : first + len(rows)]]
                images = generator(*(part.to(self._device) for part in inputs))
                made.append(((images - low) / (high - low) * 255).round().to(torch.uint8).squeeze(1).cpu())
            return torch.cat(made), labels

        samples, labels = digits(self._samples, SEED)
        report = self._compared(samples, labels)
        report["nearest_training_image"] = self._nearest(samples)
        if scored_by_training(run):
            scored, scored_labels = digits(self._scored, SEED + 1)
            assert scored_labels is not None
            scorer = train_judge(scored, scored_labels, self._device, what=f"judge of {run.config.preset}'s digits")
            report["classification_accuracy_score"] = scorer.accuracy(self._data.test_images, self._data.test_labels)
        return report

    def evaluate(self, run: Run) -> dict[str, Any]:
        """Judge a run and write ``quality.json`` into its folder; returns what was written. Raises CheckpointError."""
        checkpoint = latest_checkpoint(run)
        report = {
            "step": checkpoint["step"],
            "data": self._data.digests,
            "samples": self._samples,
            "scored_samples": self._scored,
            "model": self.fake(run, checkpoint),
            "real": self.real,
        }
        write_json(run.folder / QUALITY_FILE, report)
        return report

    def _compared(self, pixels: Tensor, labels: Tensor | None) -> dict[str, Any]:
        features, probabilities = self._judge.read(pixels)
        precision, recall = quality.precision_and_recall(features, self._test_features)
        accuracy = None if labels is None else float((probabilities.argmax(1) == labels).double().mean())
        return {
            "label_accuracy": accuracy,
            "confident_share": quality.confident_share(probabilities),
            "class_imbalance": quality.class_imbalance(probabilities),
            "frechet_distance": quality.frechet_distance(features, self._test_features),
            "precision": precision,
            "recall": recall,
            "nearest_training_image": None,
            "classification_accuracy_score": None,
        }

    def _nearest(self, pixels: Tensor) -> float:  # mean Euclidean distance of images in [0, 1]
        rows = pixels.flatten(1).float().to(self._device) / 255
        return float(quality.nearest(rows, self._training_rows)[0].double().mean())


def scored_by_training(run: Run) -> bool:
    """Whether a run's digits can be asked for by label, so that a classifier is trained on them for their score."""
    return run.config.labels == LABELS


def foretold(data: Mnist, runs: Sequence[Run], judge_folder: Path, device: torch.device) -> str:
    """What judging the runs trains on this machine, and about how long that takes."""
    judges = [] if judge_file(data, judge_folder).exists() else ["the judge"]
    trained = judges + [f"a classifier on {run.config.preset}'s digits" for run in runs if scored_by_training(run)]
    if not trained:
        return "judging takes less than a minute: the judge is there, and no classifier is to be trained"
    minutes = training_seconds(len(data.train_images), device) * len(trained) / 60
    return f"judging takes about {max(1, round(minutes))} min here: it trains {' and '.join(trained)}"


# Figures with a better end: which way it lies. A distance to the training images is good in the middle.
HIGHER_IS_BETTER = {
    "label_accuracy": True,
    "confident_share": True,
    "class_imbalance": False,
    "frechet_distance": False,
    "precision": True,
    "recall": True,
    "classification_accuracy_score": True,
}

OF_LABELS = {"label_accuracy", "classification_accuracy_score"}  # known only of what can be asked for a digit


def parse_floors(text: str) -> dict[str, float]:
    """Read ``label_accuracy=0.99,frechet_distance=12``. Raises QualityError naming the figure."""
    floors = {}
    for entry in filter(None, text.split(",")):
        name, _, value = entry.strip().partition("=")
        if name not in HIGHER_IS_BETTER:
            raise QualityError(f"--min-quality: {name[:64]!r} is unknown; there are {', '.join(HIGHER_IS_BETTER)}")
        try:
            floors[name] = float(value)
        except ValueError:
            raise QualityError(f"--min-quality: {name} needs a number, got {value[:64]!r}") from None
    return floors


def table(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Reports by name, side by side, with what the last one's real digits reach below them. Markdown."""
    rows = [(name, report["model"]) for name, report in reports] + [("real digits", reports[-1][1]["real"])]
    lines = [["model", *(title for title, _ in COLUMNS.values())], ["---"] + ["--:"] * len(COLUMNS)]
    for name, values in rows:
        shown = ["–" if values[key] is None else form.format(values[key]) for key, (_, form) in COLUMNS.items()]
        lines.append([name, *shown])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
