"""Whole runs beside the same training written down once more, plainly: networks apart, everything around them anew.

What the two share is the networks' classes and the documented rules of what is drawn from which generator. Both compute in
float64, all but the losses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.checkpoint import create_run
from train.config import TrainConfig
from train.presets import preset
from train.trainer.loop import Trainer

IMAGES, BATCH, EPOCHS = 44, 8, 3
SMALL = {
    "mlp": {"generator_widths": (16, 32), "discriminator_widths": (16,), "learning_rate": 1e-3},
    "dcgan": {"generator_widths": (8, 8, 8), "discriminator_widths": (4, 4, 4)},
    "cdcgan": {"generator_widths": (8, 8, 8), "discriminator_widths": (4, 4, 4), "precision": "fp32", "learning_rate_end": 0.25},
    "rpgan": {
        "generator_widths": (8, 8, 8),
        "discriminator_widths": (4, 4, 4),
        "precision": "fp32",
        "learning_rate_end": 0.25,
        "penalty_every": 4,
        "shift": 2,
        "label_loss": 0.3,
        "label_loss_end": 0.1,
    },
}
LOG_POINTS = {"run": [4, 8, 12, 16], "epoch": [0, 4, 6, 10, 12, 16]}  # of 18 steps in 3 epochs, every 4
COMMON = {"batch_size": BATCH, "epochs": EPOCHS, "report_every": 4, "grid_images": 4, "grid_columns": 2, "seed": 3}


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def cross_entropy(logits: Tensor, wanted: float) -> Tensor:
    """-log of the probability that a sigmoid gives to ``wanted``, written out."""
    probability = torch.sigmoid(logits)
    return -(probability if wanted else 1 - probability).log().mean()


class Reference:
    """The notebooks' training loop, and the cdcgan's."""

    def __init__(self, config: TrainConfig, generator: nn.Module, discriminator: nn.Module) -> None:
        self.config = config
        self.generator, self.discriminator = generator, discriminator
        self.average = copy.deepcopy(generator)
        betas = (config.beta1, config.beta2)
        self.of_generator = torch.optim.Adam(generator.parameters(), config.learning_rate, betas)
        self.of_discriminator = torch.optim.Adam(discriminator.parameters(), config.learning_rate, betas)
        self.noise = torch.Generator().manual_seed(config.seed)
        self.losses: list[float] = []  # the discriminator's

    def fakes(self, count: int) -> tuple[Tensor, list[Tensor]]:
        drawn = torch.randn(count, self.config.latent_size, generator=self.noise)
        labels = [torch.randint(10, (count,), generator=self.noise)] if self.config.conditional else []
        return self.generator(drawn, *labels), labels

    def step(self, real: tuple[Tensor, ...], number: int, steps: int) -> None:
        decayed = self.config.learning_rate * (1 - (1 - self.config.learning_rate_end) * number / steps)
        for optimizer in (self.of_generator, self.of_discriminator):
            optimizer.param_groups[0]["lr"] = decayed
        if self.config.preset == "rpgan":
            label_weight = self.config.label_loss * (1 - (1 - self.config.label_loss_end) * number / steps)
            self.relativistic_step(*real, label_weight)
            if number % self.config.penalty_every == 0:
                self.penalty_step(*real)
        else:
            self.step_by_cross_entropy(real)
        # The average of the generator: mostly what it was, and a little of what the generator is now.
        keep = min(self.config.average_decay, (1 + number) / (10 + number))
        now = self.generator.state_dict()
        for name, value in self.average.state_dict().items():
            if value.is_floating_point():
                value.copy_(keep * value + (1 - keep) * now[name])

    def step_by_cross_entropy(self, real: tuple[Tensor, ...]) -> None:
        # The discriminator: real images are real, fakes are fake.
        fake, labels = self.fakes(len(real[0]))
        loss = cross_entropy(self.discriminator(*real), 1.0) + cross_entropy(self.discriminator(fake.detach(), *labels), 0.0)
        self.of_discriminator.zero_grad()
        loss = loss / 2 if self.config.preset == "mlp" else loss
        self.losses.append(loss.item())
        loss.backward()
        self.of_discriminator.step()
        # The generator: its fakes are to be taken for real.
        fake, labels = self.fakes(len(real[0]))
        self.of_generator.zero_grad()
        cross_entropy(self.discriminator(fake, *labels), 1.0).backward()
        self.of_generator.step()

    def relativistic_step(self, images: Tensor, labels: Tensor, label_weight: float) -> None:
        """Each network's own loss by its own backward pass, both against what the other was before the step."""
        fake = self.generator(torch.randn(len(images), self.config.latent_size, generator=self.noise), labels)
        # Half of what the discriminator sees is moved, real images and fakes each by steps of their own.
        most = self.config.shift
        steps = torch.randint(-most, most + 1, (len(images), 2, 2), generator=self.noise)
        coins = torch.rand((len(images), 2, 1), generator=self.noise)[:, :, 0]

        def moved(seen: Tensor, which: int) -> Tensor:
            rolled = [
                image.roll((-int(down), -int(right)), dims=(1, 2)) if coin < 0.5 else image
                for image, (down, right), coin in zip(seen, steps[:, which], coins[:, which], strict=True)
            ]
            return torch.stack(rolled)

        images, fake = moved(images, 0), moved(fake, 1)

        def lead(of: Tensor, over: Tensor) -> Tensor:
            """-log of the probability that a sigmoid gives to one of a pair being the realer, by their logits."""
            rows = torch.arange(len(labels))
            return -torch.sigmoid(self.discriminator(of)[rows, labels] - self.discriminator(over)[rows, labels]).log().mean()

        loss = lead(images, fake.detach())
        self.losses.append(loss.item())
        # And the discriminator is to know the digit in a real image: -log of the probability of its label.
        exponentials = self.discriminator(images).exp()
        right = torch.stack([row[label] for row, label in zip(exponentials, labels, strict=True)])
        loss = loss - label_weight * (right / exponentials.sum(1)).log().mean()
        of_discriminator = torch.autograd.grad(loss, list(self.discriminator.parameters()), allow_unused=True)
        of_generator = torch.autograd.grad(lead(fake, images), list(self.generator.parameters()))
        for optimizer, network, gradients in (
            (self.of_discriminator, self.discriminator, of_discriminator),
            (self.of_generator, self.generator, of_generator),
        ):
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()

    def penalty_step(self, images: Tensor, labels: Tensor) -> None:
        """γ/2 E‖slope at real images‖² + γ/2 E‖slope at fakes‖², as much heavier as it comes seldom."""
        with torch.no_grad():
            fake = self.generator(torch.randn(len(images), self.config.latent_size, generator=self.noise), labels)
        penalty = torch.zeros(())
        for points in (images.clone().requires_grad_(), fake.requires_grad_()):
            for point, label in zip(points, labels, strict=True):  # an image at a time
                (slope,) = torch.autograd.grad(self.discriminator(point[None])[0, label], point, create_graph=True)
                penalty = penalty + self.config.gradient_penalty / 2 * slope.pow(2).sum() / len(images)
        self.of_discriminator.zero_grad()
        (penalty * self.config.penalty_every).backward()
        self.of_discriminator.step()

    def fit(self, examples: tuple[Tensor, ...]) -> None:
        per_epoch = -(-IMAGES // BATCH)
        for epoch in range(EPOCHS):
            order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch))
            for number, indices in enumerate(order.split(BATCH)):
                batch = tuple(part[indices] for part in examples)
                self.step(batch, epoch * per_epoch + number, per_epoch * EPOCHS)


def apart(ours: nn.Module, theirs: nn.Module, before: dict[str, Tensor]) -> float:
    """The mean distance of weights and statistics, as a share of the way they have come; the worst tensor's."""
    worst = 0.0
    for name, value in theirs.state_dict().items():
        if value.is_floating_point():
            way = float((value - before[name]).abs().mean())
            worst = max(worst, float((ours.state_dict()[name] - value).abs().mean()) / max(way, 1e-6))
    return worst


@pytest.mark.parametrize("name", SMALL)
def test_a_run_is_the_training_that_its_notebook_describes(name: str, tmp_path: Path) -> None:
    config = preset(name).replace({**COMMON, **SMALL[name]})
    low, high = config.pixel_range
    images = torch.rand(IMAGES, 1, 28, 28, generator=torch.Generator().manual_seed(5)) * (high - low) + low
    examples = (images, torch.arange(IMAGES) % 10) if config.conditional else (images,)
    trainer = Trainer(create_run(tmp_path, config, {}), examples, torch.device("cpu"))
    before: dict[str, Any] = {each: copy.deepcopy(getattr(trainer, each).state_dict()) for each in ("generator", "discriminator")}
    reference = Reference(config, copy.deepcopy(trainer.generator), copy.deepcopy(trainer.discriminator))
    trainer.fit()
    reference.fit(examples)
    assert trainer.step == 18
    # Batch 0's own loss, or the mean over the batches to number 4, as the notebooks have them.
    first = reference.losses[:1] if name == "dcgan" else reference.losses[:5]
    assert [step for step, *_ in trainer.log_points.points] == LOG_POINTS[config.report_per]
    assert trainer.log_points.points[0][2] == pytest.approx(sum(first) / len(first), rel=1e-4)
    assert apart(trainer.generator, reference.generator, before["generator"]) < 2e-3
    assert apart(trainer.discriminator, reference.discriminator, before["discriminator"]) < 2e-3
    if config.average_decay:
        assert trainer.average is not None
        assert apart(trainer.average, reference.average, before["generator"]) < 2e-3
        assert apart(trainer.generator, trainer.average, before["generator"]) > 0.1, "it lags behind"
