"""The figures that judge digits: against cases whose answer is known, and against the definitions done the long way."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import SUBSET
from train.checkpoint import create_run, save_checkpoint
from train.data.files import DIGESTS
from train.data.mnist import load_mnist
from train.errors import CheckpointError, QualityError
from train.evaluation import evaluate, judge, quality
from train.evaluation.evaluate import Evaluator, parse_floors, table
from train.models import build_generator
from train.presets import preset

CPU = torch.device("cpu")
SCORED = 64  # digits that the classifier for a score is trained on


def normal(count: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_shifted_and_stretched_normals_is_the_closed_form() -> None:
    features = normal(20_000, 3)
    features = (features - features.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(features.T))).T
    assert quality.frechet_distance(features, features) < 1e-6
    assert abs(quality.frechet_distance(features, features + torch.tensor([3.0, 4.0, 0.0])) - 25) < 1e-3
    stretched = features * torch.tensor([2.0, 1.0, 3.0])
    assert abs(quality.frechet_distance(features, stretched) - (1 + 0 + 4)) < 1e-3, "Σ (σ₁ - σ₂)²"
    assert abs(quality.frechet_distance(stretched, features) - 5) < 1e-3


def test_frechet_distance_takes_covariances_that_do_not_commute() -> None:
    generator = np.random.default_rng(3)
    some, others = (torch.from_numpy(generator.standard_normal((500, 4)) @ generator.standard_normal((4, 4))) for _ in range(2))
    a, b = np.cov(some.numpy().T), np.cov(others.numpy().T)
    roots = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    expected = float(np.square(some.numpy().mean(0) - others.numpy().mean(0)).sum() + np.trace(a + b) - 2 * roots)
    assert abs(quality.frechet_distance(some, others) - expected) < 1e-6


def test_features_that_never_vary_do_no_harm() -> None:
    assert quality.frechet_distance(torch.zeros(10, 3), torch.zeros(10, 3)) == 0


def share_within(rows: torch.Tensor, members: torch.Tensor, neighbours: int) -> float:
    """The definition, one row at a time."""
    inside = 0
    reach = []
    for index, member in enumerate(members):
        others = torch.cat([members[:index], members[index + 1 :]])
        reach.append(float((others - member).norm(dim=1).sort().values[neighbours - 1]))
    for row in rows:
        inside += any(float((row - member).norm()) <= radius for member, radius in zip(members, reach, strict=True))
    return inside / len(rows)


def test_precision_and_recall_are_their_definition() -> None:
    fakes, reals = normal(60, 5, 1) * 1.3, normal(80, 5, 2)
    expected = share_within(fakes, reals, 3), share_within(reals, fakes, 3)
    assert quality.precision_and_recall(fakes, reals) == pytest.approx(expected)
    assert min(expected) > 0


def test_few_modes_have_precision_without_recall_and_noise_has_neither() -> None:
    reals = normal(400, 8)
    precision, recall = quality.precision_and_recall(reals[:1].repeat(400, 1) + 1e-3 * normal(400, 8, 1), reals)
    assert (precision, recall < 0.02) == (1.0, True)
    assert quality.precision_and_recall(normal(400, 8, 2) + 100, reals) == (0.0, 0.0)


def test_nearest_finds_the_nearest_in_order() -> None:
    among = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    distances, found = quality.nearest(torch.zeros(1, 2), among, 3)
    assert found.tolist() == [[0, 2, 1]]
    assert distances[0].tolist() == pytest.approx([0.0, 1.0, 5.0])


def test_balance_and_confidence() -> None:
    even = torch.eye(10).repeat(3, 1)
    assert quality.class_imbalance(even) == pytest.approx(0)
    assert quality.class_imbalance(torch.eye(10)[:1].repeat(30, 1)) == pytest.approx(math.log(10))
    assert quality.confident_share(torch.tensor([[0.95, 0.05], [0.9, 0.1], [0.6, 0.4], [0.05, 0.95]])) == 0.5


def test_a_moved_image_is_itself_a_little_further_on() -> None:
    torch.manual_seed(0)
    image = torch.zeros(64, 1, 28, 28)
    image[:, :, 10:18, 12:16] = 1
    moved = judge.moved(image)
    assert moved.shape == image.shape
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1.0001
    assert not torch.equal(moved, image)
    weights = moved.sum((1, 2, 3)) / image.sum((1, 2, 3))
    assert float(weights.min()) > 0.6, "nothing is pushed out of the picture"


def test_the_judge_learns(subset: Path, judges: list[judge.Judge]) -> None:
    data = load_mnist(subset)
    features, probabilities = judges[0].read(data.test_images)
    assert (features.shape, probabilities.shape) == ((64, 128), (64, 10))
    assert torch.allclose(probabilities.sum(1), torch.ones(64), atol=1e-5)
    assert judges[0].accuracy(data.train_images, data.train_labels) > 0.8, "twenty looks at 256 digits"


def test_training_a_judge_leaves_the_callers_chance_alone(subset: Path) -> None:
    data = load_mnist(subset)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    short, again = (judge.train_judge(data.train_images, data.train_labels, CPU, epochs=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(short.read(data.test_images)[0], again.read(data.test_images)[0]), "the same seed, the same judge"


def untrained(*_: Any, classes: int, **__: Any) -> judge.Judge:
    return judge.Judge(classes).eval()


def test_a_judge_that_is_not_good_enough_is_refused_and_not_trained_again(
    subset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of other data than MNIST as many are needed as the nearest training image's label is right for."""
    data = load_mnist(subset)
    with caplog.at_level("INFO"), pytest.raises(QualityError, match=r"%.* 73\.44% .*ARGS=--no-judge") as first:
        judge.kept_judge(data, tmp_path / "judge", CPU, train=untrained)
    said = [Path(message.partition("kept as ")[2]) for message in caplog.messages if "kept as" in message]
    assert [path.exists() for path in said] == [True], "what is said to be kept is there"
    with pytest.raises(QualityError) as second:
        judge.kept_judge(data, tmp_path / "judge", CPU, train=lambda *_, **__: pytest.fail("trained again"))
    assert str(second.value) == str(first.value)


@pytest.mark.parametrize("name", ["SHA256SUMS", "judge"])
def test_a_folder_that_cannot_keep_a_judge_is_refused_before_one_is_trained(name: str, subset: Path) -> None:
    data, folder = load_mnist(subset), subset / name / "judge"
    if name == "judge":
        judge.judge_file(data, folder).with_suffix(".json").mkdir(parents=True)
    with pytest.raises(QualityError, match=r"cannot keep the judge in .* \((Not|Is) a directory\); name another with --runs-dir"):
        judge.kept_judge(data, folder, CPU, train=lambda *_, **__: pytest.fail("trained in vain"))


def test_of_mnist_itself_a_fixed_share_is_needed(subset: Path) -> None:
    data = load_mnist(subset)
    assert judge.accuracy_needed(dataclasses.replace(data, digests=DIGESTS), CPU) == 0.993
    known = dataclasses.replace(data, test_images=data.train_images, test_labels=data.train_labels)
    assert judge.accuracy_needed(known, CPU) == 0.993, "and of nothing more"


def test_a_good_judge_is_kept_and_not_trained_again(subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_mnist(subset)
    monkeypatch.setattr(judge, "ACCURACY_NEEDED", 0.0)
    first = judge.kept_judge(data, tmp_path, CPU, train=untrained)
    second = judge.kept_judge(data, tmp_path, CPU, train=lambda *_, **__: pytest.fail("trained again"))
    assert torch.equal(first.read(data.test_images)[0], second.read(data.test_images)[0])
    for record in tmp_path.glob("*.json"):
        record.write_text("{}")
    with pytest.raises(QualityError, match=r"\.json cannot be read; delete it"):
        judge.kept_judge(data, tmp_path, CPU, train=untrained)
    for record in tmp_path.glob("*.json"):
        record.unlink()
    judge.kept_judge(data, tmp_path, CPU, train=lambda *_, **__: pytest.fail("one that was kept without a record was good"))
    [kept] = tmp_path.glob("*.pt")
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{kept} cannot be read .*; delete it to train the judge again"):
        judge.kept_judge(data, tmp_path, CPU, train=untrained)
    kept.unlink()
    judge.kept_judge(data, tmp_path, CPU, train=untrained)


class Copying(nn.Module):
    """A generator that knows the training images by heart: the latents pick one of the label's."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__()
        self.images, self.labels = images, labels

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        picks = (latents[:, 0].abs() * 1e4).long()
        chosen = []
        for label, pick in zip(labels.tolist(), picks.tolist(), strict=True):
            own = (self.labels == label).nonzero().squeeze(1)
            chosen.append(own[pick % len(own)])
        return self.images[torch.stack(chosen)].unsqueeze(1).float() / 127.5 - 1


@pytest.fixture(scope="module")
def judges() -> list[judge.Judge]:
    data = load_mnist(SUBSET)
    return [
        judge.train_judge(data.train_images, data.train_labels, CPU, epochs=epochs, network=network, what=None)
        for network, epochs in ((judge.Judge, 20), (judge.SecondJudge, 15))
    ]


@pytest.fixture(scope="module")
def evaluator(judges: list[judge.Judge]) -> Evaluator:
    return Evaluator(load_mnist(SUBSET), *judges, CPU, samples=64, scored=SCORED, scores=1)


def small_run(tmp_path: Path, name: str) -> Any:
    config = preset(name).replace({"generator_widths": (8, 8, 8), "discriminator_widths": (4, 4, 4)})
    run = create_run(tmp_path, config, {})
    weights = build_generator(config).state_dict()
    save_checkpoint(run, 12, {"step": 12, "generator": weights, "average": weights})
    return run


@pytest.mark.long
def test_a_generator_that_copies_is_told_by_its_nearest_training_images(
    judges: list[judge.Judge], subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_mnist(subset)
    evaluator = Evaluator(data, *judges, CPU, samples=64, scored=256, scores=2)
    run = small_run(tmp_path, "cdcgan")
    monkeypatch.setattr(evaluate, "trained_generator", lambda *_: Copying(data.train_images, data.train_labels))
    report = evaluator.evaluate(run)
    assert re.fullmatch("[0-9a-f]{64}", report["weights"])
    model, real = report["model"], report["real"]
    assert model["nearest_training_image"] < 0.01 < real["nearest_training_image"]
    assert model["class_imbalance"] < 0.5
    assert model["label_accuracy"] > 0.5
    assert 0 <= model["classification_accuracy_score"] <= 1
    assert model["frechet_distance"] < 3 * real["frechet_distance"] + 1
    shown = table([("copy", report)])
    assert shown.splitlines()[2].startswith("| copy | ")
    assert shown.splitlines()[3].startswith("| real digits | ")
    assert re.search(r"% ± \d", shown.splitlines()[2]), "the score has its standard error"
    assert [line.split(" | ")[0] for line in shown.splitlines()[4:]] == ["| copy, second judge", "| real digits, second judge"]
    single = model["classification_accuracy_scores"]
    assert len(set(single)) == 2, "each classifier has a seed of its own"
    assert model["classification_accuracy_score"] == pytest.approx(sum(single) / 2)
    mean = model["classification_accuracy_score"]
    assert model["classification_accuracy_score_error"] == pytest.approx(math.sqrt(mean * (1 - mean) / 64))
    second = report["second_judge"]
    assert second["model"]["label_accuracy"] > 0.5
    for whose in ("model", "real"):
        assert second[whose]["frechet_distance"] != report[whose]["frechet_distance"], "judged by another"


def test_real_and_generated_digits_have_the_test_sets_labels(
    evaluator: Evaluator, subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other shares of the labels two sets of real digits differ as well."""
    data = load_mnist(subset)
    shares = torch.bincount(data.test_labels, minlength=10)
    assert len(shares.unique()) > 1, "labels in turn would have even shares"
    asked: list[torch.Tensor] = []

    class Asked(Copying):
        def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            asked.append(labels)
            return super().forward(latents, labels)

    monkeypatch.setattr(evaluate, "trained_generator", lambda *_: Asked(data.train_images, data.train_labels))
    report = evaluator.evaluate(small_run(tmp_path, "cdcgan"))
    assert torch.equal(asked[0], data.test_labels)
    assert torch.equal(torch.cat(asked[1:]), torch.arange(SCORED) % 10), "what a classifier is trained on has even shares"
    pixels, labels = evaluator._real_samples()
    assert torch.equal(torch.bincount(labels, minlength=10), shares)
    assert all(
        bool((data.train_images[data.train_labels == label] == image).all((1, 2)).any())
        for image, label in zip(pixels, labels, strict=True)
    )
    assert report["labels"] == "the test set's"


def test_the_worst_and_the_best_digits_are_drawn(
    evaluator: Evaluator, subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the digits are copies of what was asked for; half are blank, and nobody reads them as that."""
    data = load_mnist(subset)
    copying = Copying(data.train_images, data.train_labels)

    class HalfBlank(nn.Module):
        def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            blank = (torch.arange(len(labels)) // 10 % 2 == 0)[:, None, None, None]
            return torch.where(blank, -1.0, copying(latents, labels))

    monkeypatch.setattr(evaluate, "trained_generator", lambda *_: HalfBlank())
    monkeypatch.setattr(evaluate, "SHOWN", 16)
    run = small_run(tmp_path, "cdcgan")
    evaluator.evaluate(run)
    levels = {}
    for name in ("worst.png", "best.png"):
        with Image.open(run.folder / name) as picture:
            assert picture.size == (4 * (8 * 30 + 2), 4 * (2 * 30 + 2))
            levels[name] = np.asarray(picture).astype(int)
    assert (levels["worst.png"] > 200).mean() < 0.5 * (levels["best.png"] > 200).mean()


def test_an_untrained_unconditional_generator_is_judged_bad(evaluator: Evaluator, tmp_path: Path) -> None:
    report = evaluator.evaluate(small_run(tmp_path, "dcgan"))
    assert (report["step"], report["samples"]) == (12, 64)
    model, real = report["model"], report["real"]
    assert model["label_accuracy"] is None
    assert model["classification_accuracy_score"] is None
    assert model["frechet_distance"] > 5 * real["frechet_distance"]
    assert model["recall"] < real["recall"]


def test_floors_are_read_and_refused_by_name() -> None:
    assert parse_floors("label_accuracy=0.99, frechet_distance=12") == {"label_accuracy": 0.99, "frechet_distance": 12.0}
    assert parse_floors("") == {}
    with pytest.raises(QualityError, match=r"--min-quality: 'beauty'.*label_accuracy"):
        parse_floors("beauty=1")
    with pytest.raises(QualityError, match=r"--min-quality: recall .*'x'"):
        parse_floors("recall=x")
