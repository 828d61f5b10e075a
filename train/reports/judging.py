"""Judges runs and data sets by the judges that are kept beside the runs, and says beforehand how long that takes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import Run
from train.data.mnist import Mnist, load_mnist, read_dataset
from train.errors import TrainError
from train.evaluation.evaluate import Evaluator, digits_of, scored_by_training
from train.evaluation.judge import (
    BATCH,
    JUDGE_FOLDER,
    Judge,
    SecondJudge,
    check_data,
    judge_file,
    kept_judge,
    training_seconds,
)
from train.reports.run_page import write_page
from train.runs import each_run

Report = Mapping[str, Any]


def judge_runs(
    runs: Sequence[Run], data_dir: Path, runs_dir: Path, device: torch.device, scores: int = 1
) -> list[tuple[Run, Report]]:
    """Judge runs by the data, write each one's ``quality.json`` and page; returns what was written. Raises TrainError.

    A run that cannot be judged is a line on standard error, and the others go on.
    """
    data = load_mnist(data_dir)
    check_data(data)
    for run in runs:
        if of_other_data(run, data):
            print(f"{run.folder} was trained on other data than {data_dir} holds, and is compared with that", file=sys.stderr)
    evaluator = _kept_evaluator(data, runs_dir, device, [digits_of(run) for run in runs if scored_by_training(run, data)], scores)
    reports: list[tuple[Run, Report]] = []

    def judge(run: Run) -> None:
        reports.append((run, evaluator.evaluate(run)))
        write_page(run)

    each_run(runs, judge, TrainError)
    return reports


def judge_dataset(folder: Path, data_dir: Path, runs_dir: Path, device: torch.device, scores: int = 1) -> Report:
    """Judge a data set of ``serve.dataset`` by the data. Raises TrainError."""
    data = load_mnist(data_dir)
    check_data(data)
    pixels, labels = read_dataset(folder, BATCH, data.classes)
    return _kept_evaluator(data, runs_dir, device, [str(folder)], scores).dataset(pixels, labels, str(folder))


def of_other_data(run: Run, data: Mnist) -> bool:
    """Whether a run says that it was trained on other data."""
    trained_on = run.provenance.get("data")
    return bool(trained_on) and trained_on != data.digests


def _kept_evaluator(data: Mnist, runs_dir: Path, device: torch.device, whose: Sequence[str], scores: int) -> Evaluator:
    folder = runs_dir / JUDGE_FOLDER
    print(foretold(data, whose, folder, device, scores), file=sys.stderr)
    first, second = (kept_judge(data, folder, device, network) for network in (Judge, SecondJudge))
    return Evaluator(data, first, second, device, scored=len(data.train_images), scores=scores)


def foretold(data: Mnist, whose: Sequence[str], judge_folder: Path, device: torch.device, scores: int = 1) -> str:
    """What judging trains on this machine, and about how long that takes; ``whose`` digits classifiers are trained on."""
    trained = [f"the {each.name}" for each in (Judge, SecondJudge) if not judge_file(data, judge_folder, each).exists()]
    number = "a classifier" if scores == 1 else f"{scores} classifiers"
    scored = [f"{number} on {each}" for each in whose]
    counted, trained = len(trained) + scores * len(scored), trained + scored
    if not trained:
        return "judging takes less than a minute: the judges are there, and no classifier is to be trained"
    minutes = training_seconds(len(data.train_images), device) * counted / 60
    return f"judging takes about {max(1, round(minutes))} min here: it trains {' and '.join(trained)}"
