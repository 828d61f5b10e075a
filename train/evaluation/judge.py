"""The judges of generated digits: small convolutional classifiers, trained on real digits and kept on disk.

A judge's last hidden layer is the feature space in which sets of digits are compared. The first judge's network and training,
applied to a generator's digits, give the classification accuracy score. The second judge has another architecture and another
seed: it shows whether a result depends on the first judge, and is never used to choose or filter anything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from train.checkpoint import load_checkpoint, write_atomically, write_json
from train.data.mnist import Mnist
from train.device import has_bf16
from train.errors import QualityError
from train.evaluation import quality
from train.progress import progress_bar

log = logging.getLogger(__name__)

FEATURES = 128
MNIST_CLASSES = 10
EPOCHS = 8
BATCH = 128  # and the least that a judge can be trained on
PEAK_RATE = 4e-3
JUDGE_FOLDER = "judge"  # below the runs' own
ACCURACY_NEEDED = 0.993  # of the MNIST test set; a worse judge says little of digits that are better than it
LEAST_TEST_IMAGES = quality.NEIGHBOURS + 1  # with fewer no test image has so many neighbours among the others
EXPORT_UNJUDGED = "to export without judging: make export RUN=… ARGS=--no-judge"
READ_BATCH = 500
TIMED_STEPS = 8

# How far a training image is moved before it is shown, either way: what leaves a digit the digit that it is.
TURN = 0.17  # radians
STRETCH = 0.1
SHEAR = 0.1
SHIFT = 2 / 14  # of half the width: two pixels


class Judge(nn.Module):
    """Something with ``features`` and ``logits`` of them; the first judge is this class.

    Two blocks of two 3×3 convolutions with BatchNorm and pooling, a hidden layer of 128, and a logit per class.
    """

    name = "judge"
    seed = 0

    def __init__(self, classes: int = MNIST_CLASSES) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64)):
            for channels in (inputs, outputs):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.features: nn.Module = nn.Sequential(
            *layers, nn.Dropout(0.25), nn.Flatten(), nn.Linear(64 * 7 * 7, FEATURES), nn.ReLU(), nn.Dropout(0.5)
        )
        self.logits = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:  # float32 (batch, 1, 28, 28) in [0, 1] → (batch, classes)
        logits: Tensor = self.logits(self.features(images))
        return logits

    @torch.no_grad()
    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features float32 (n, features) and probabilities (n, classes) of ``pixels`` uint8 (n, 28, 28), on the CPU."""
        self.eval()
        device = self.logits.weight.device
        features, probabilities = [], []
        for part in pixels.split(READ_BATCH):
            hidden = self.features(part.to(device).unsqueeze(1).float() / 255)
            features.append(hidden.cpu())
            probabilities.append(self.logits(hidden).softmax(1).cpu())
        return torch.cat(features), torch.cat(probabilities)

    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """Share of ``pixels`` uint8 (n, 28, 28) that are judged as ``labels`` (n,) has them."""
        return float((self.read(pixels)[1].argmax(1) == labels).double().mean())


class _Residual(nn.Module):
    """x + two 3×3 convolutions of it, each after GroupNorm and GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(8, channels), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        changed: Tensor = images + self.layers(images)
        return changed


class SecondJudge(Judge):
    """A residual network with GroupNorm, strided convolutions in place of pooling, and the mean over positions at its end."""

    name = "second judge"
    seed = 1

    def __init__(self, classes: int = MNIST_CLASSES) -> None:
        nn.Module.__init__(self)
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2),
            _Residual(32),
            nn.Conv2d(32, 96, 3, stride=2, padding=1),
            _Residual(96),
            nn.GroupNorm(8, 96),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.logits = nn.Linear(96, classes)


def train_judge(
    pixels: Tensor,
    labels: Tensor,
    device: torch.device,
    epochs: int = EPOCHS,
    seed: int | None = None,
    *,
    network: type[Judge] = Judge,
    classes: int = MNIST_CLASSES,
    what: str | None = "",
) -> Judge:
    """A judge of ``pixels`` uint8 (n, 28, 28) and ``labels`` int64 (n,): AdamW, one-cycle schedule, augmented images.

    ``what`` is said beside its progress bar, the network's name unless given; None: without one.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(network.seed if seed is None else seed)
        judge = network(classes).to(device).to(memory_format=torch.channels_last)
        batches = max(1, len(pixels) // BATCH)
        optimizer = torch.optim.AdamW(judge.parameters(), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * batches)
        pixels, labels = pixels.to(device), labels.to(device)
        mixed = has_bf16(device)
        judge.train()
        with progress_bar(epochs * batches, what or network.name, disable=what is None) as bar:
            for _ in range(epochs):
                for chosen in torch.randperm(len(pixels), device=device).split(BATCH)[:batches]:
                    images = moved(pixels[chosen].unsqueeze(1).float() / 255)
                    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                        logits = judge(images)
                    loss = cross_entropy(logits.float(), labels[chosen])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
    return judge.eval()


def training_seconds(images: int, device: torch.device, epochs: int = EPOCHS) -> float:
    """About how long ``train_judge`` takes on so many images on this machine: some of its steps are timed, on noise."""
    pixels = torch.randint(256, (TIMED_STEPS * BATCH, 28, 28), dtype=torch.uint8)
    labels = torch.arange(len(pixels)) % MNIST_CLASSES
    train_judge(pixels[:BATCH], labels[:BATCH], device, 1, what=None)  # the first step sets up what the others find there
    begun = time.perf_counter()
    train_judge(pixels, labels, device, 1, what=None)
    return (time.perf_counter() - begun) / TIMED_STEPS * epochs * (images // BATCH)


def moved(images: Tensor) -> Tensor:
    """Augmentation: each of ``images`` (batch, 1, 28, 28) slightly rotated, scaled, sheared and shifted, at random."""
    turn, across, along, shear, right, down = (2 * torch.rand(6, len(images), device=images.device) - 1).unbind()
    turn, across, along, shear = TURN * turn, 1 + STRETCH * across, 1 + STRETCH * along, SHEAR * shear
    rows = torch.stack(
        (
            torch.stack((turn.cos() * across, shear - turn.sin(), SHIFT * right), dim=1),
            torch.stack((turn.sin(), turn.cos() * along, SHIFT * down), dim=1),
        ),
        dim=1,
    )
    return grid_sample(images, affine_grid(rows, list(images.shape), align_corners=False), align_corners=False)


def judge_file(data: Mnist, folder: Path, network: type[Judge] = Judge) -> Path:
    """Where the judge of this data is kept, if it has been trained."""
    recipe = {"data": data.digests, "epochs": EPOCHS, "rate": PEAK_RATE, "moved": [TURN, STRETCH, SHEAR, SHIFT], "batch": BATCH}
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{network.name.replace(' ', '-')}-{name}.pt"


def kept_judge(
    data: Mnist,
    folder: Path,
    device: torch.device,
    network: type[Judge] = Judge,
    train: Callable[..., Judge] = train_judge,
) -> Judge:
    """The judge of this data from ``folder``, trained and written there first if need be.

    What it knows of the test images is written beside it. Raises QualityError if that is too little, the next time at once.
    """
    check_data(data)
    path = judge_file(data, folder, network)
    record = path.with_suffix(".json")
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(record, {})  # or minutes of training would end in nothing
            log.info("training the %s", network.name)
            trained = train(data.train_images, data.train_labels, device, network=network, classes=data.classes)
            known = {"accuracy": trained.accuracy(data.test_images, data.test_labels), "needed": accuracy_needed(data, device)}
            write_json(record, known)
            write_atomically(path, lambda stream: torch.save(trained.state_dict(), stream))
        except OSError as error:
            raise QualityError(f"cannot keep the judge in {folder} ({error.strerror}); name another with --runs-dir") from None
        log.info("the %s is kept as %s", network.name, path)
    _check_accuracy(record, network)
    judge = network(data.classes).to(device)
    judge.load_state_dict(load_checkpoint(path, f"delete it to train the {network.name} again"))
    return judge.eval()


def check_data(data: Mnist) -> None:
    """Raises QualityError for data on which no judge can be trained."""
    if (count := len(data.test_images)) < LEAST_TEST_IMAGES:
        raise QualityError(
            f"the data has {count} test images, and judging needs {LEAST_TEST_IMAGES}: a data set of serve.dataset has those of"
            f" join --test-share; {EXPORT_UNJUDGED}"
        )
    if not data.labelled:
        raise QualityError(f"the data has no labels, and judging needs them; {EXPORT_UNJUDGED}")


def accuracy_needed(data: Mnist, device: torch.device) -> float:
    """The least test accuracy of a judge: ``ACCURACY_NEEDED``, or, on other data, that of a nearest-neighbour classifier.

    That one reads an image as the training image that is nearest to it, by the Euclidean distance.
    """
    if data.is_mnist:
        return ACCURACY_NEEDED
    rows, among = (part.flatten(1).float().to(device) / 255 for part in (data.test_images, data.train_images))
    nearest = quality.nearest(rows, among)[1][:, 0].cpu()
    return min(ACCURACY_NEEDED, float((data.train_labels[nearest] == data.test_labels).double().mean()))


def _check_accuracy(record: Path, network: type[Judge]) -> None:
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        accuracy, needed = float(known["accuracy"]), float(known["needed"])
    except FileNotFoundError:  # of an earlier version, which kept no other judges than good ones
        return
    except (OSError, ValueError, KeyError, TypeError):
        raise QualityError(f"{record} cannot be read; delete it and the judge beside it to train it again") from None
    if accuracy < needed:
        raise QualityError(
            f"the {network.name} knows {accuracy:.2%} of the test images, and {needed:.2%} are needed, so it cannot judge:"
            f" train and judge on more images; {EXPORT_UNJUDGED}"
        )
