"""A training step of both networks on a batch: random draws, losses, gradients, both optimizers. Knows no run.

The two notebooks' step is ``alternating``: the discriminator on real images and fakes, then the generator on fakes of its own.
The rpgan's is ``simultaneous``: its discriminator has no BatchNorm, so an image's gradient does not depend on the other images,
and one backward pass through it serves both networks. Every few steps a gradient penalty is added ("lazy" regularization, Karras
et al. 2020, arXiv:1912.04958, appendix B).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from train.config import RELATIVISTIC, TrainConfig
from train.device import has_bf16
from train.trainer import losses
from train.trainer.capture import Batch, CapturedStep, Recording
from train.trainer.parallel import Ranks

SHIFTED_SHARE = 0.5
LARGEST_LOGIT_DIFFERENCE = 60.0  # its exponential is still a float32


class Step:
    """Both optimizers, the noise, and a step. ``example`` is a batch of the usual size."""

    def __init__(
        self,
        config: TrainConfig,
        generator: nn.Module,
        discriminator: nn.Module,
        example: Batch,
        *,
        ranks: Ranks,
        recording: Callable[[torch.Generator], Recording] | None,
    ) -> None:
        self.config = config
        self.device = example[0].device
        self.ranks = ranks
        self.mixed = config.precision == "bf16" and has_bf16(self.device)
        self.generator, self.discriminator = generator, discriminator
        self.trained_generator = ranks.wrap(generator)
        self.trained_discriminator = ranks.wrap(discriminator)
        self.generator_parameters = list(generator.parameters())
        self.discriminator_parameters = list(discriminator.parameters())
        self.capturable = recording is not None and self.device.type == "cuda"
        if self.capturable:  # every step has the same shapes: the fastest convolutions are worth looking for
            torch.backends.cudnn.benchmark = True
        # A graph reads them from where they were when the step was recorded: there they have to stay.
        self.rate = torch.tensor(config.learning_rate, device=self.device) if self.capturable else config.learning_rate
        self.label_weight = torch.tensor(config.label_loss, device=self.device)
        adam: dict[str, Any] = {
            "lr": self.rate,
            "betas": (config.beta1, config.beta2),
            "fused": True,
            "capturable": self.capturable,
        }
        self.generator_optimizer = torch.optim.Adam(self.generator_parameters, **adam)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator_parameters, **adam)
        self.noise = torch.Generator(self.device).manual_seed(config.seed)
        self._update = self.simultaneous if config.discriminator_loss == RELATIVISTIC else self.alternating
        self._penalty = self.penalise
        if recording:
            self._update = CapturedStep(self._update, example, recording(self.noise))
            if config.gradient_penalty:
                self._penalty = CapturedStep(self._penalty, example, recording(self.noise))

    def __call__(self, real: Batch, number: int) -> Tensor:
        """Step ``number`` of the run on ``real``. Returns float64 (2,): generator, discriminator loss."""
        both = self._update(real)
        if self.config.gradient_penalty and number % self.config.penalty_every == 0:
            self._penalty(real)
        return both

    def alternating(self, real: Batch) -> Tensor:
        """First the discriminator's update, then the generator's against the updated discriminator; losses as ``__call__``."""
        count = len(real[0])
        noise, *labels = self._fake_inputs(count)
        with self._autocast():
            with torch.no_grad():
                fake = self.generator(noise, *labels)
            # Real and fake go through in passes of their own: BatchNorm must see each alone.
            real_logits, fake_logits = self.trained_discriminator(*real), self.trained_discriminator(fake, *labels)
        discriminator_loss = losses.discriminator_loss(real_logits.float(), fake_logits.float(), self.config.discriminator_loss)
        self.discriminator_optimizer.zero_grad()
        discriminator_loss.backward()
        self.discriminator_optimizer.step()

        noise, *labels = self._fake_inputs(count)
        with self._autocast():
            logits = self.discriminator(self.trained_generator(noise, *labels), *labels)
        generator_loss = losses.generator_loss(logits.float())
        self.generator_optimizer.zero_grad()
        # Only the generator's gradients are wanted: the discriminator's weights are left out of this backward pass.
        generator_loss.backward(inputs=self.generator_parameters)
        self.generator_optimizer.step()
        return torch.stack((generator_loss.detach(), discriminator_loss.detach())).double()

    def simultaneous(self, real: Batch) -> Tensor:
        """Both networks against what the other was before; each fake is paired with a real image of its label.

        The losses are softplus(fake - real) and softplus(real - fake) of a pair's logits. By an image of the fake, the one's
        gradient is σ(fake - real) and the other's -σ(real - fake) times the same vector, and the ratio of the two is
        -exp(real - fake): the discriminator's backward pass has made the generator's as well.
        """
        images, labels = real
        noise = self._fake_inputs(len(images))[0]
        with self._autocast():
            fake = self.trained_generator(noise, labels)
        seen = fake.detach().to(images.dtype).requires_grad_()
        with self._autocast():
            logits = self.trained_discriminator(self._shifted(torch.cat((images, seen)))).float()
        real_logits, fake_logits = _of_labels(logits, labels).chunk(2)
        discriminator_loss = losses.relativistic_loss(fake_logits - real_logits)
        generator_loss = losses.relativistic_loss((real_logits - fake_logits).detach())
        # Of real images alone: a fake's label is what it was asked for, not what it shows.
        label_loss = cross_entropy(logits[: len(images)], labels) * self.label_weight
        self.discriminator_optimizer.zero_grad()
        (discriminator_loss + label_loss).backward()
        self.discriminator_optimizer.step()

        ratio = -(real_logits - fake_logits).detach().clamp(max=LARGEST_LOGIT_DIFFERENCE).exp()
        assert seen.grad is not None
        self.generator_optimizer.zero_grad()
        fake.backward((seen.grad * ratio[:, None, None, None]).to(fake.dtype))
        self.generator_optimizer.step()
        return torch.stack((generator_loss, discriminator_loss.detach())).double()

    def penalise(self, real: Batch) -> Tensor:
        """A step of the discriminator on the gradient penalty at real images and fakes (R1 and R2); returns it, float64 (1,)."""
        images, labels = real
        noise = self._fake_inputs(len(images))[0]
        with self._autocast(), torch.no_grad():
            fake = self.generator(noise, labels).to(images.dtype)
        points = torch.cat((images, fake)).requires_grad_()
        with self._autocast():
            logits = self.discriminator(points)
        (slopes,) = torch.autograd.grad(_of_labels(logits.float(), labels).sum(), points, create_graph=True)
        # Mean over each half, halved (Mescheder et al. 2018), and as much larger as it comes seldom.
        penalty = slopes.square().sum(dim=(1, 2, 3)).mean() * self.config.gradient_penalty * self.config.penalty_every
        # Not by backward(): DistributedDataParallel would wait for a forward pass of its own.
        gradients = torch.autograd.grad(penalty, self.discriminator_parameters, allow_unused=True)
        self.discriminator_optimizer.zero_grad()
        for parameter, gradient in zip(self.discriminator_parameters, gradients, strict=True):
            if gradient is not None:  # an added constant has no slope
                # In the parameter's own memory layout: the fused optimizer takes that for granted.
                parameter.grad = torch.empty_like(parameter).copy_(self.ranks.mean(gradient))
        self.discriminator_optimizer.step()
        return penalty.detach().double()[None]

    def compile_networks(self, **options: Any) -> None:
        """From now on run both networks by ``torch.compile``; state dicts keep their names."""
        for network in (self.generator, self.discriminator):
            network.compile(**options)

    def decay(self, done: float) -> None:
        """Set what decays linearly, for the next step: the learning rate and the labels' weight after a share of all steps."""
        config = self.config
        rate = _decayed(config.learning_rate, config.learning_rate_end, done)
        self.rate = self.rate.fill_(rate) if isinstance(self.rate, Tensor) else rate
        if config.label_loss:  # or it is 0 throughout
            self.label_weight.fill_(_decayed(config.label_loss, config.label_loss_end, done))
        for optimizer in (self.generator_optimizer, self.discriminator_optimizer):
            optimizer.param_groups[0]["lr"] = self.rate

    def state(self) -> dict[str, Any]:
        """The state of both optimizers and of the noise generator."""
        return {
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "noise": self.noise.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, as ``state`` gave it, captured or not."""
        for name in ("generator_optimizer", "discriminator_optimizer"):
            optimizer: torch.optim.Adam = getattr(self, name)
            optimizer.load_state_dict(state[name])
            # Also loaded is how the run was taken up before: it may have been without capture, or with.
            optimizer.param_groups[0].update(capturable=self.capturable, lr=self.rate)
        self.noise.set_state(state["noise"])

    def _fake_inputs(self, count: int) -> Batch:  # (count, z) and labels: this process's rows of all drawn for this step
        total = count * self.ranks.world
        drawn = [torch.randn(total, self.config.latent_size, generator=self.noise, device=self.device)]
        if self.config.labels and self.config.discriminator_loss != RELATIVISTIC:  # there the labels are the real images'
            drawn.append(torch.randint(self.config.labels, (total,), generator=self.noise, device=self.device))
        return tuple(self.ranks.mine(part) for part in drawn)

    def _shifted(self, images: Tensor) -> Tensor:
        """Half of ``images`` (2 × batch, 1, 28, 28) moved by up to ``shift`` pixels, round the edges.

        The discriminator would otherwise come to know the training images one by one. The others stay as they are, so that a
        generator of shifted digits is told from one of digits that are not (Karras et al. 2020, arXiv:2006.06676).
        """
        most = self.config.shift
        if not most:
            return images
        total = len(images) // 2 * self.ranks.world
        by = torch.randint(-most, most + 1, (total, 2, 2), generator=self.noise, device=self.device)
        moved = torch.rand((total, 2, 1), generator=self.noise, device=self.device) < SHIFTED_SHARE
        down, right = self.ranks.mine(by * moved).transpose(0, 1).reshape(-1, 2, 1).unbind(1)  # each (2 × batch, 1)
        side = images.shape[-1]
        along = torch.arange(side, device=self.device)
        pixels = (along + down)[:, :, None] % side * side + (along + right)[:, None, :] % side
        return images.flatten(1).gather(1, pixels.flatten(1)).view_as(images)

    def _autocast(self) -> torch.autocast:
        # Without the cache of cast weights: a captured step would go on with the weights of its first run.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed, cache_enabled=False)


def _decayed(value: float, end: float, done: float) -> float:
    """``value`` on the straight way to its share ``end``, of which a share ``done`` is behind it."""
    return value * (1 - (1 - end) * done)


def _of_labels(logits: Tensor, labels: Tensor) -> Tensor:  # (2 × batch, labels) of images and of fakes, (batch,) → (2 × batch,)
    return logits.gather(1, torch.cat((labels, labels))[:, None]).squeeze(1)
