"""Evaluates a run: compares 10,000 of its digits with the data's test set, and real digits in the same way.

For conditional generators, the labels have the test set's frequencies, and so have the real digits: with
other label frequencies two sets of features would differ even if all digits were real.

The results are written into the run's folder: ``quality.json``, which export copies into the bundle, and the digits of whose
labels the judge is least and most confident, ``worst.png`` and ``best.png``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from train.checkpoint import Run, latest_checkpoint, write_json
from train.config import TrainConfig
from train.data.mnist import Mnist
from train.errors import QualityError
from train.evaluation import quality
from train.evaluation.judge import EPOCHS, Judge, train_judge
from train.models import trained_generator, weights_digest
from train.pictures import save_grid

QUALITY_FILE = "quality.json"
SAMPLES = 10_000
SCORED_SAMPLES = 60_000  # as many as MNIST has for training
SEED = 20_260_102
BATCH = 500
SHOWN = 64  # digits of worst.png and best.png
SHOWN_COLUMNS = 8
UNKNOWN = "–"  # in a table

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
    """Judges sets of digits by two judges against one test set. ``samples`` are at most as many as the test set has.

    The classes are the data's, whatever they stand for.

    ``scores`` classifiers, each from a seed of its own, are trained for the classification accuracy score, which is their mean.
    """

    def __init__(
        self,
        data: Mnist,
        judge: Judge,
        second: Judge,
        device: torch.device,
        *,
        samples: int = SAMPLES,
        scored: int = SCORED_SAMPLES,
        scores: int = 1,
    ) -> None:
        self._data = data
        self._judge = judge
        self._second = second
        self._device = device
        self._labels = data.test_labels[:samples]
        self._scored = scored
        self._scores = scores
        self._test_features = {each: each.read(data.test_images)[0] for each in (judge, second)}
        self._training_rows = data.train_images.flatten(1).float().to(device) / 255

    @cached_property
    def real(self) -> dict[str, Any]:
        """The figures of real digits: as many training images as samples, and the test images' neighbours."""
        pixels, labels = self._real_samples()
        report = self._compared(self._judge, self._judge.read(pixels), labels)
        # A training image's nearest training image is itself; the test images' distance is what a new digit should have.
        report["nearest_training_image"] = self._nearest(self._data.test_images)
        judged = self._judge.accuracy(self._data.test_images, self._data.test_labels)
        return report | {"label_accuracy": judged, "classification_accuracy_score": judged}

    @cached_property
    def real_by_second(self) -> dict[str, Any]:
        """The figures of real digits by the second judge."""
        pixels, labels = self._real_samples()
        report = self._compared(self._second, self._second.read(pixels), labels)
        return report | {"label_accuracy": self._second.accuracy(self._data.test_images, self._data.test_labels)}

    def _real_samples(self) -> tuple[Tensor, Tensor]:
        return self._samples_of(self._data.train_images, self._data.train_labels)

    def _samples_of(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Some of them, drawn by the seed, with the test set's labels as far as there are such."""
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(SEED))
        counts = torch.bincount(self._labels, minlength=self._data.classes).tolist()
        chosen = torch.cat([order[labels[order] == label][:count] for label, count in enumerate(counts)])
        return pixels[chosen], labels[chosen]

    def fake(self, run: Run, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """The figures of digits from a checkpoint's generator, beside those of real digits, by both judges."""
        digits = sampler(run.config, checkpoint, self._device)
        scored = scored_by_training(run, self._data)
        samples, labels = digits(len(self._labels), SEED, self._labels if scored else None)
        report, probabilities = self._judged(samples, labels)
        _draw_extremes(run, samples, labels, probabilities)
        if scored:
            trained = self._data.train_labels.unique()  # a number below the highest may have no images
            in_turn = trained[torch.arange(self._scored) % len(trained)]
            report["model"] |= self._score(digits(self._scored, SEED + 1, in_turn)[0], in_turn, digits_of(run))
        return report

    def dataset(self, pixels: Tensor, labels: Tensor, whose: str) -> dict[str, Any]:
        """What any digits reach, uint8 (n, 28, 28) with labels (n,): some of them compared, and classifiers trained on all."""
        report, _ = self._judged(*self._samples_of(pixels, labels))
        report["model"] |= self._score(pixels, labels, whose)
        return report

    def _judged(self, samples: Tensor, labels: Tensor | None) -> tuple[dict[str, Any], Tensor]:
        """The samples beside real digits by both judges, and the first one's probabilities (n, classes)."""
        read = self._judge.read(samples)
        model = self._compared(self._judge, read, labels) | {"nearest_training_image": self._nearest(samples)}
        by_second = self._compared(self._second, self._second.read(samples), labels)
        second = {"model": by_second, "real": self.real_by_second}
        return {"model": model, "real": self.real, "second_judge": second}, read[1]

    def _score(self, pixels: Tensor, labels: Tensor, whose: str) -> dict[str, Any]:
        return accuracy_score(pixels, labels, self._data, self._device, whose=whose, scores=self._scores)

    def evaluate(self, run: Run) -> dict[str, Any]:
        """Judge a run and write ``quality.json`` into its folder; returns what was written. Raises CheckpointError."""
        begun = time.monotonic()
        checkpoint = latest_checkpoint(run)
        report = {
            "step": checkpoint["step"],
            "weights": weights_digest(trained_generator(run.config, checkpoint)),
            "data": self._data.digests,
            "samples": len(self._labels),
            "labels": "the test set's" if scored_by_training(run, self._data) else None,
            "scored_samples": self._scored,
            **self.fake(run, checkpoint),
            "seconds": round(time.monotonic() - begun, 1),
        }
        write_json(run.folder / QUALITY_FILE, report)
        return report

    def _compared(self, judge: Judge, read: tuple[Tensor, Tensor], labels: Tensor | None) -> dict[str, Any]:
        features, probabilities = read  # as the judge's ``read`` has them
        precision, recall = quality.precision_and_recall(features, self._test_features[judge])
        accuracy = None if labels is None else float((probabilities.argmax(1) == labels).double().mean())
        return {
            "label_accuracy": accuracy,
            "confident_share": quality.confident_share(probabilities),
            "class_imbalance": quality.class_imbalance(probabilities),
            "frechet_distance": quality.frechet_distance(features, self._test_features[judge]),
            "precision": precision,
            "recall": recall,
            "nearest_training_image": None,
            "classification_accuracy_score": None,
        }

    def _nearest(self, pixels: Tensor) -> float:  # mean Euclidean distance of images in [0, 1]
        rows = pixels.flatten(1).float().to(self._device) / 255
        return float(quality.nearest(rows, self._training_rows)[0].double().mean())


def _draw_extremes(run: Run, pixels: Tensor, labels: Tensor | None, probabilities: Tensor) -> None:
    sure = probabilities.max(dim=1).values if labels is None else probabilities.gather(1, labels[:, None]).squeeze(1)
    order = sure.argsort(stable=True)
    for name, chosen in (("worst.png", order[:SHOWN]), ("best.png", order.flip(0)[:SHOWN])):
        save_grid(pixels[chosen].unsqueeze(1).float() / 255, SHOWN_COLUMNS, run.folder / name, separator=0.35)


class Sampler(Protocol):
    """A run's digits: ``count`` from ``seed``, uint8 (count, 28, 28), and their labels (count,), None where none are taken.

    ``labels`` (count,) are asked for; without them a conditional generator is asked for its labels in turn.
    """

    def __call__(self, count: int, seed: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]: ...


def sampler(config: TrainConfig, checkpoint: Mapping[str, Any], device: torch.device) -> Sampler:
    """A function that generates digits with the generator of a checkpoint."""
    generator = trained_generator(config, checkpoint).to(device).eval()
    low, high = config.pixel_range

    @torch.no_grad()
    def digits(count: int, seed: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        noise = torch.Generator().manual_seed(seed)
        if config.labels and labels is None:
            labels = torch.arange(count) % config.labels
        made = []
        for first in range(0, count, BATCH):
            rows = torch.randn(min(BATCH, count - first), config.latent_size, generator=noise)
            inputs = [rows] if labels is None else [rows, labels[first : first + len(rows)]]
            images = generator(*(part.to(device) for part in inputs))
            made.append(((images - low) / (high - low) * 255).round().to(torch.uint8).squeeze(1).cpu())
        return torch.cat(made), labels

    return digits


def accuracy_score(
    pixels: Tensor, labels: Tensor, data: Mnist, device: torch.device, *, whose: str, scores: int = 1, epochs: int = EPOCHS
) -> dict[str, Any]:
    """The classification accuracy score of digits: the mean, each classifier's score, the standard error."""
    single = []
    for seed in range(scores):
        which = f" {seed + 1} of {scores}" if scores > 1 else ""
        scorer = train_judge(pixels, labels, device, epochs, seed, classes=data.classes, what=f"judge of {whose}{which}")
        single.append(scorer.accuracy(data.test_images, data.test_labels))
    mean = sum(single) / len(single)
    # Of the test images that were drawn: the classifiers are all asked the same ones, so more of them do not lessen it.
    error = (mean * (1 - mean) / len(data.test_images)) ** 0.5
    return {
        "classification_accuracy_score": mean,
        "classification_accuracy_scores": single,
        "classification_accuracy_score_error": error,
    }


def digits_of(run: Run) -> str:
    """The name of a run's digits in progress messages."""
    return f"{run.config.preset}'s digits"


def scored_by_training(run: Run, data: Mnist) -> bool:
    """Whether a run's digits can be asked for by each label of the data: a classifier is trained on them for their score."""
    return run.config.labels >= data.classes


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
            if not math.isfinite(floors[name]):
                raise ValueError(value)
        except ValueError:
            raise QualityError(f"--min-quality: {name} needs a finite number, got {value[:64]!r}") from None
    return floors


def shown(values: Mapping[str, Any], figure: str) -> str:
    """A figure of COLUMNS as a table has it, a score with its standard error."""
    if values.get(figure) is None:
        return UNKNOWN
    text = COLUMNS[figure][1].format(values[figure])
    error = values.get(f"{figure}_error")
    return text if error is None else f"{text} ± {error * 100:.2f}"


def table(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A Markdown table of reports by name, by both judges; its last rows are the real digits of the last report."""
    rows = [(name, report["model"]) for name, report in reports] + [("real digits", reports[-1][1]["real"])]
    rows += [(f"{name}, second judge", report["second_judge"]["model"]) for name, report in reports]
    rows.append(("real digits, second judge", reports[-1][1]["second_judge"]["real"]))
    lines = [["model", *(title for title, _ in COLUMNS.values())], ["---"] + ["--:"] * len(COLUMNS)]
    lines += [[name, *(shown(values, figure) for figure in COLUMNS)] for name, values in rows]
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table's lines, the second of them its rule."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
