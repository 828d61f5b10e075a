"""The whole pipeline in one command: train, score, export, serve, request digits, and write a report.

Each stage is the command that a user would type, except for the score, whose classifier has a shorter training than in
``python -m train evaluate``. The bundled judge measures how many digits match their labels.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from export.errors import ExportError
from export.server_process import started
from serve.client import DigitClient
from serve.dataset.filter import Judge
from train.checkpoint import Run, latest_checkpoint, write_atomically
from train.data.mnist import Mnist, load_mnist
from train.device import choose_device
from train.evaluation.evaluate import SCORED_SAMPLES, SEED, accuracy_score, sampler
from train.evaluation.judge import MNIST_CLASSES, check_data, training_seconds
from train.presets import DEFAULT_PRESET, preset
from train.reports.bench import milliseconds_per_step
from train.reports.run_page import embedded, rendered
from train.runs import newest_run

EPOCHS = 8
SCORE_EPOCHS = 3
JUDGED = 10_000
OF_EACH = 10  # digits that the served model is asked for
REST_S = 30.0  # exporting, serving and asking, foretold
TIMED_S = 2.0
TEMPLATE = Path(__file__).with_suffix(".html")

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What the command line chose. ``train_flags`` go to ``python -m train`` behind all others."""

    out: Path
    data_dir: Path
    epochs: int = EPOCHS
    score_epochs: int = SCORE_EPOCHS
    scored: int = SCORED_SAMPLES
    train_flags: Sequence[str] = ()


class Stages:
    """Says which stage begins and about how long everything takes still; keeps what each took."""

    def __init__(self, foretold_s: dict[str, float]) -> None:
        self._foretold_s = foretold_s
        self.took_s: dict[str, float] = {}

    def run(self, name: str, stage: Callable[[], T]) -> T:
        """Do one stage. Whatever it raises comes through."""
        left = sum(seconds for other, seconds in self._foretold_s.items() if other not in self.took_s)
        number = len(self.took_s) + 1
        print(f"{number} of {len(self._foretold_s)}: {name}; about {_minutes(left)} left", file=sys.stderr, flush=True)
        begun = time.monotonic()
        result = stage()
        self.took_s[name] = time.monotonic() - begun
        return result


def speedrun(options: Options) -> Path:
    """Run all of it in ``options.out`` and return the page. Raises ExportError when a command fails."""
    device = choose_device("auto")
    data = load_mnist(options.data_dir)
    check_data(data)
    if data.classes != MNIST_CLASSES:
        raise ExportError(
            f"{options.data_dir} has {data.classes} classes, and the speedrun takes data with {MNIST_CLASSES}, as MNIST has; for"
            " others there are make train, make evaluate and make export"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    stages = Stages(_foretold(data, device, options))
    run = stages.run("training", lambda: _train(options))
    figures = stages.run("scoring", lambda: _score(run, data, device, options))
    bundle = stages.run("exporting", lambda: _export(run, options))
    figures |= stages.run("serving", lambda: _serve(bundle, options))
    figures["parity"] = json.loads((bundle / "parity.json").read_bytes())["worst_images"]
    return _write_page(options, run, stages.took_s, figures)


def _foretold(data: Mnist, device: torch.device, options: Options) -> dict[str, float]:
    config = preset(DEFAULT_PRESET)
    steps = options.epochs * -(-len(data.train_images) // config.batch_size)
    training = milliseconds_per_step(config, device, TIMED_S) / 1e3 * steps
    scoring = training_seconds(options.scored, device, options.score_epochs)
    return {"training": training, "scoring": scoring, "exporting": REST_S / 2, "serving": REST_S / 2}


def _train(options: Options) -> Run:
    runs_dir = options.out / "runs"
    _command("train", DEFAULT_PRESET, f"--epochs={options.epochs}", f"--runs-dir={runs_dir}", f"--data-dir={options.data_dir}",
             *options.train_flags)  # fmt: skip
    return newest_run(runs_dir, DEFAULT_PRESET, finished=True)


def _score(run: Run, data: Mnist, device: torch.device, options: Options) -> dict[str, Any]:
    digits = sampler(run.config, latest_checkpoint(run), device)
    pixels, labels = digits(JUDGED, SEED)
    assert labels is not None
    read = Judge().read(pixels.numpy()).argmax(axis=1)
    scored, scored_labels = digits(options.scored, SEED + 1)
    assert scored_labels is not None
    score = accuracy_score(scored, scored_labels, data, device, whose="the run's digits", epochs=options.score_epochs)
    return {"label_accuracy": float((read == labels.numpy()).mean())} | score


def _export(run: Run, options: Options) -> Path:
    models_dir = options.out / "models"
    _command("export", "run", f"--run={run.folder}", f"--models-dir={models_dir}")
    return max((models_dir / run.config.preset).iterdir(), key=lambda path: int(path.name))


def _serve(bundle: Path, options: Options) -> dict[str, Any]:
    """Ten of each digit from the served model, as ``digits.png``; and how long a call for one digit takes."""
    flags = (f"--models-dir={bundle.parents[1]}", f"--default-model={bundle.parent.name}", "--grpc-port=0", "--http-port=0")
    try:
        with started("serve", *flags) as server, DigitClient(server.target) as client:
            digits = client.generate(10 * OF_EACH, seed=SEED, labels=[number // OF_EACH for number in range(10 * OF_EACH)])
            content = digits.to_png()
            calls = []
            for index in range(100):
                begun = time.perf_counter()
                client.generate(1, seed=SEED, start=index)
                calls.append(time.perf_counter() - begun)
    except RuntimeError as error:
        raise ExportError(str(error)) from None
    write_atomically(options.out / "digits.png", lambda stream: stream.write(content))
    return {"call_ms": float(np.median(calls)) * 1e3}


def _write_page(options: Options, run: Run, took_s: dict[str, float], figures: dict[str, Any]) -> Path:
    machine = run.provenance  # what it was trained on, and with how many threads
    total, score = sum(took_s.values()), figures["classification_accuracy_score"]
    error = figures["classification_accuracy_score_error"]
    shown = {
        "classification accuracy score": f"{score:.2%} ± {error * 100:.2f}",
        "digits read as their labels, by a judge of MNIST": f"{figures['label_accuracy']:.2%}",
        "worst difference between PyTorch and ONNX Runtime, of the image range": f"{figures['parity']:.2g}",
        "a call for one digit, median": f"{figures['call_ms']:.1f} ms",
    }
    shown |= {f"time for {name}": _minutes(seconds) for name, seconds in took_s.items()}
    shown["time in all"] = _minutes(total)
    where = f"{machine['device']}, {machine['device_name']}, {_counted(machine['cpu_threads'], 'thread')}"
    picture = embedded(options.out / "digits.png")
    page = rendered(TEMPLATE, preset=run.config.preset, length=_length(run), figures=shown, machine=where, picture=picture)
    path = options.out / "report.html"
    write_atomically(path, lambda stream: stream.write(page))
    for name, value in shown.items():
        print(f"{value:>16}  {name}")
    today = datetime.now(UTC).date()
    print(f"for docs/speedrun.md: | {today} | … | {_minutes(total)} | {score:.2%} ± {error * 100:.2f} | {where} |")
    return path


def _command(module: str, *flags: str) -> None:
    """``python -m module`` with its own progress on the terminal. Raises ExportError when it fails."""
    done = subprocess.run([sys.executable, "-m", module, *flags], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ExportError(f"python -m {module} {' '.join(flags)} ended with status {done.returncode}; its own error is above")


def _length(run: Run) -> str:
    """How long a run was trained, by its own config: flags behind ``--`` may have changed it."""
    return _counted(run.config.steps, "step") if run.config.steps else _counted(run.config.epochs, "epoch")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
