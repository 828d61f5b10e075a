"""Data with other classes than ten, or of another size: judged and exported by what the data has, or refused in one line."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export import gallery, speedrun
from export.cli import build_parser as export_parser
from export.errors import ExportError
from export.graphs.judge import export_judge
from serve.dataset import command as dataset_command
from serve.dataset.filter import Judge as ExportedJudge
from serve.errors import SettingsError
from tests.other_data import write_patterns
from train.checkpoint import Run, create_run, save_checkpoint
from train.data.mnist import Mnist, load_mnist, read_dataset, training_examples
from train.errors import DataError, QualityError
from train.evaluation import judge
from train.evaluation.evaluate import Evaluator, scored_by_training
from train.models import build_generator
from train.presets import preset
from train.reports import judging
from train.run_command import _next

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[27, pytest.param(5, marks=pytest.mark.long)])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mnist:
    return load_mnist(write_patterns(tmp_path_factory.mktemp("other") / "data", request.param, train=270, test=64))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another on a busy machine take long for little."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def untrained(*_: Any, classes: int, **__: Any) -> judge.Judge:
    return judge.Judge(classes).eval()


def run_of(tmp_path: Path, labels: int) -> Run:
    small = {"generator_widths": (8, 8, 8), "discriminator_widths": (4, 4, 4), "labels": labels}
    run = create_run(tmp_path, preset("rpgan").replace(small), {})
    weights = build_generator(run.config).state_dict()
    save_checkpoint(run, 1, {"step": 1, "generator": weights, "average": weights})
    return run


def test_a_run_is_judged_by_the_classes_of_its_data(data: Mnist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it has beyond the data's are not asked for."""
    more = 3 * (data.classes == 5)
    monkeypatch.setattr("train.evaluation.evaluate.train_judge", untrained)
    judges = [network(data.classes).eval() for network in (judge.Judge, judge.SecondJudge)]
    evaluator = Evaluator(data, *judges, CPU, samples=10_000, scored=128)
    report = evaluator.evaluate(run_of(tmp_path, data.classes + more))
    assert (report["samples"], report["labels"]) == (64, "the test set's")
    assert 0 <= report["model"]["classification_accuracy_score"] <= 1
    assert not scored_by_training(run_of(tmp_path, data.classes - 1), data)


def test_a_class_without_training_images_is_not_asked_for_when_a_classifier_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EMNIST's letters are 1 to 26."""
    data = load_mnist(write_patterns(tmp_path / "data", 5, train=270, test=64))
    data.train_labels[data.train_labels == 0] = 1
    scored: list[torch.Tensor] = []
    monkeypatch.setattr(Evaluator, "_score", lambda _, pixels, labels, whose: scored.append(labels) or {})
    Evaluator(data, judge.Judge(5).eval(), judge.SecondJudge(5).eval(), CPU, scored=8).evaluate(run_of(tmp_path, 5))
    assert [labels.tolist() for labels in scored] == [[1, 2, 3, 4, 1, 2, 3, 4]]


def test_a_judge_of_other_classes_takes_their_labels(data: Mnist) -> None:
    learnt = judge.train_judge(data.train_images[:128], data.train_labels[:128], CPU, 1, classes=data.classes, what=None)
    assert learnt.read(data.test_images)[1].shape == (64, data.classes)


def test_a_judge_of_other_classes_is_kept_and_exported(data: Mnist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "accuracy_needed", lambda *_: 0.0)
    kept = judge.kept_judge(data, tmp_path, CPU, train=untrained)
    export_judge(kept, data, tmp_path / "judge.onnx")
    read = ExportedJudge(tmp_path / "judge.onnx")
    assert (read.classes, read.trained_on) == (data.classes, data.digests["train-images-idx3-ubyte"])
    assert np.abs(read.read(data.test_images.numpy()) - kept.read(data.test_images)[1].numpy()).max() < 1e-4


def test_labels_that_do_not_fit_the_data_are_refused_or_said_before_training(
    data: Mnist, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match=rf"--labels is {data.classes - 1}; it must be {data.classes} at least"):
        training_examples(data, preset("rpgan").replace({"labels": data.classes - 1}), CPU)
    training_examples(data, preset("rpgan").replace({"labels": data.classes}), CPU)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        training_examples(data, preset("rpgan").replace({"labels": data.classes + 2}), CPU)
    assert caplog.messages == [
        f"the data has labels 0 to {data.classes - 1}, and --labels is {data.classes + 2}: the others are not trained"
    ]


def test_images_of_another_size_are_refused_with_the_size_that_is_needed(tmp_path: Path) -> None:
    folder = write_patterns(tmp_path / "data", 10, train=20, test=10, side=32)
    with pytest.raises(DataError, match=f"^{folder}: train images are 32×32, and 28×28 is needed"):
        load_mnist(folder)
    shutil.copytree(folder, tmp_path / "MNIST" / "raw")
    with pytest.raises(DataError, match="images are 32×32, and 28×28 is needed"):
        read_dataset(tmp_path, 1, 10)


def test_without_test_images_there_is_training_and_no_judging(tmp_path: Path) -> None:
    data = load_mnist(write_patterns(tmp_path / "data", 5, train=20, test=0))
    assert (data.classes, len(data.test_images)) == (5, 0)
    with pytest.raises(QualityError, match=r"0 test images, and judging needs 4: .*--test-share.* ARGS=--no-judge"):
        judge.kept_judge(data, tmp_path, CPU, train=lambda *_, **__: pytest.fail("trained"))
    run = run_of(tmp_path, 5)
    assert _next(run, data, tmp_path) == f"make export RUN={run.folder} ARGS=--no-judge"
    assert not list(tmp_path.glob("judge*"))
    with pytest.raises(DataError, match="no training images"):
        load_mnist(write_patterns(tmp_path / "none", 5, train=0, test=5))


def test_the_speedrun_refuses_other_classes_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("trained"))
    folder = write_patterns(tmp_path / "data", 5, train=20, test=10)
    with pytest.raises(ExportError, match=r"5 classes.*10, as MNIST has.*make train"):
        speedrun.speedrun(speedrun.Options(tmp_path / "out", folder))
    assert not (tmp_path / "out").exists()


def test_images_without_labels_train_no_conditional_preset_and_no_judge(tmp_path: Path) -> None:
    """Those of an unconditional model in a data set have label 255."""
    data = load_mnist(write_patterns(tmp_path / "data", 1, train=20, test=10))
    unlabelled = dataclasses.replace(data, train_labels=data.train_labels + 255, test_labels=data.test_labels + 255)
    training_examples(unlabelled, preset("dcgan"), CPU)
    with pytest.raises(DataError, match=r"label 255, which stands for none: .*dcgan"):
        training_examples(unlabelled, preset("rpgan"), CPU)
    with pytest.raises(QualityError, match=r"no labels, .*ARGS=--no-judge"):
        judge.kept_judge(unlabelled, tmp_path, CPU)


@pytest.mark.parametrize("labels", [1, 5])
def test_the_gallery_draws_models_of_few_labels(labels: int, tmp_path: Path) -> None:
    data = load_mnist(write_patterns(tmp_path / "data", labels, train=20, test=10))
    drawn = gallery.Gallery(run_of(tmp_path, labels), tmp_path / "gallery").draw(data)
    assert {"truncation.png", "styles.png"} <= {path.name for path in drawn}


def test_a_run_of_other_data_is_told_by_its_digests(data: Mnist, tmp_path: Path) -> None:
    run = run_of(tmp_path, 3)
    assert not judging.of_other_data(run, data), "it does not say"
    run.provenance["data"] = data.digests
    assert not judging.of_other_data(run, data)
    run.provenance["data"] = data.digests | {"train-images-idx3-ubyte": "0" * 64}
    assert judging.of_other_data(run, data)


def manifest(labels: int, digest: str) -> Any:
    training = {"provenance": {"data": {"train-images-idx3-ubyte": digest}}} if digest else {}
    return SimpleNamespace(name="letters", version=1, labels=labels, training=training)


def test_a_file_that_is_no_judge_is_written_by_the_command_that_is_advised(tmp_path: Path) -> None:
    path = tmp_path / "a judge.onnx"
    path.write_bytes(b"none")
    with pytest.raises(SettingsError) as caught:
        ExportedJudge(path)
    command = shlex.split(str(caught.value).partition("write one with: ")[2])
    assert export_parser().parse_args(command[3:]).out == path


def test_a_filter_names_the_judge_that_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled one knows MNIST's ten digits: of another number it is refused, of ten others it is said."""
    content = onnx.load(dataset_command.BUNDLED_JUDGE)
    onnx.helper.set_model_props(content, {"train-images-idx3-ubyte": "a" * 64})
    onnx.save(content, tmp_path / "judge.onnx")
    flags = SimpleNamespace(filter=0.5, judge=tmp_path / "judge.onnx", start=0, count=1)
    with pytest.raises(SettingsError, match=r"10 classes, letters has 27 labels; write a judge .*python -m export judge"):
        dataset_command._judge(flags, manifest(27, ""))  # type: ignore[arg-type]
    for digest in ("", "a" * 64):
        dataset_command._judge(flags, manifest(10, digest))  # type: ignore[arg-type]
        assert capsys.readouterr().err == ""
    dataset_command._judge(flags, manifest(10, "b" * 64))  # type: ignore[arg-type]
    assert "was trained on other images than letters/1" in capsys.readouterr().err
