"""The networks of all presets: generators and discriminators, built from a TrainConfig. Knows nothing of training.

Every generator maps ``latents`` (batch, z) to images (batch, 1, 28, 28) in its own range: [0, 1] after a sigmoid
(mlp), [-1, 1] after a tanh (the others). Every discriminator maps such images to logits (batch,). The cdcgan's
networks and the rpgan's generator take ``labels`` int64 (batch,) as their second argument; the rpgan's discriminator returns
logits for all labels, (batch, labels).
The DCGAN follows Radford, Metz & Chintala 2016 (arXiv:1511.06434), section 3; the cdcgan adds an embedding of the label
to the latents, and to its discriminator the projection of Miyato & Koyama 2018 (arXiv:1802.05637). The rpgan's generator has
that embedding and BatchNorm with a gain and a bias for each label (Dumoulin et al. 2017, arXiv:1610.07629; de Vries et al. 2017,
arXiv:1707.00683); its discriminator has the projection and no normalisation.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.config import TrainConfig
from train.errors import CheckpointError

IMAGE_SIZE = 28
OTHER_NETWORKS = "the newest checkpoint is of other networks than config.json describes; start the run anew"


class MlpGenerator(nn.Module):
    """z → Linear, BatchNorm, ReLU blocks → Linear 784 → sigmoid."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((config.latent_size, *config.generator_widths)):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
        layers += [nn.Linear(config.generator_widths[-1], IMAGE_SIZE * IMAGE_SIZE), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:  # (batch, z) → (batch, 1, 28, 28) in [0, 1]
        images: Tensor = self.layers(latents)
        return images.view(-1, 1, 28, 28)


class MlpDiscriminator(nn.Module):
    """784 → Linear, LeakyReLU blocks → one logit."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((IMAGE_SIZE * IMAGE_SIZE, *config.discriminator_widths)):
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(config.leaky_slope, inplace=True)]
        layers += [nn.Linear(config.discriminator_widths[-1], 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, 28, 28) → (batch,)
        logits: Tensor = self.layers(images.flatten(1))
        return logits.squeeze(1)


class PointConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution of 1×1 maps without padding, (batch, in, 1, 1) → (batch, out, k, k): one matrix product.

    PyTorch's own takes several times as long on a CPU.
    """

    def forward(self, points: Tensor, output_size: list[int] | None = None) -> Tensor:
        # Channels last: so the weights lie in memory while they are trained, and so the next layer takes the maps.
        maps = points.flatten(1) @ self.weight.permute(0, 2, 3, 1).flatten(1)
        maps = maps.view(-1, *self.kernel_size, self.out_channels).permute(0, 3, 1, 2)
        bias = self.bias  # TorchScript follows what a local name may be, and not an attribute
        return maps if bias is None else maps + bias[:, None, None]


class DcganGenerator(nn.Module):
    """z → 4×4 → 8×8 → 16×16 → 28×28 by transposed convolutions without biases, BatchNorm and ReLU between, tanh."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        first, second, third = config.generator_widths
        self.layers = nn.Sequential(
            PointConvTranspose2d(config.latent_size, first, 4, stride=1, padding=0, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(first, second, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(second),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(second, third, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(third),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(third, 1, 4, stride=2, padding=3, bias=False),
            nn.Tanh(),
        )

    def forward(self, latents: Tensor) -> Tensor:  # (batch, z) → (batch, 1, 28, 28) in [-1, 1]
        images: Tensor = self.layers(latents[:, :, None, None])
        return images


class DcganDiscriminator(nn.Module):
    """28×28 → 16×16 → 8×8 → 4×4 → one logit by strided convolutions; no biases, as in the generator."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        first, second, third = config.discriminator_widths
        slope = config.leaky_slope
        self.layers = nn.Sequential(
            nn.Conv2d(1, first, 4, stride=2, padding=3, bias=False),
            nn.LeakyReLU(slope, inplace=True),
            nn.Conv2d(first, second, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(second),
            nn.LeakyReLU(slope, inplace=True),
            nn.Conv2d(second, third, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(third),
            nn.LeakyReLU(slope, inplace=True),
            nn.Conv2d(third, 1, 4, stride=1, padding=0, bias=False),
        )

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, 28, 28) → (batch,)
        logits: Tensor = self.layers(images)
        return logits.flatten()


class CdcganGenerator(nn.Module):
    """The DCGAN's layers on the latents with an embedding of the label behind them."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.labels, config.label_size)
        self.layers = DcganGenerator(config.replace({"latent_size": config.latent_size + config.label_size})).layers

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:  # (batch, z), (batch,) → (batch, 1, 28, 28) in [-1, 1]
        both = torch.cat((latents, self.embedding(labels)), dim=1)
        images: Tensor = self.layers(both[:, :, None, None])
        return images


class CdcganDiscriminator(nn.Module):
    """The DCGAN's layers; the logit is a linear one plus the projection on the label's embedding."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        layers = DcganDiscriminator(config).layers
        self.features = layers[:-1]
        self.logit = layers[-1]
        self.projection = nn.Conv2d(config.discriminator_widths[-1], config.projection_size, 4, bias=False)
        self.embedding = nn.Embedding(config.labels, config.projection_size)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:  # (batch, 1, 28, 28), (batch,) → (batch,)
        features = self.features(images)
        agreement = (self.projection(features).flatten(1) * self.embedding(labels)).sum(1)
        logits: Tensor = self.logit(features).flatten() + agreement
        return logits


class LabelledNorm(nn.Module):
    """BatchNorm without weights of its own, then a gain and a bias for each label: (batch, channels, h, w), (batch,)."""

    def __init__(self, labels: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = nn.Embedding(labels, channels)
        self.bias = nn.Embedding(labels, channels)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        gain, bias = self.gain(labels), self.bias(labels)  # TorchScript knows no generator expressions
        changed: Tensor = self.norm(maps) * gain[:, :, None, None] + bias[:, :, None, None]
        return changed


class RpganGenerator(nn.Module):
    """z and an embedding of the label → 7×7 → 14×14 → a 3×3 convolution there → 28×28; ReLU between, tanh.

    What the label makes of the first maps is in the embedding; the norms after it are ``LabelledNorm``.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        first, second, third = config.generator_widths
        self.embedding = nn.Embedding(config.labels, config.label_size)
        self.first = nn.Sequential(
            PointConvTranspose2d(config.latent_size + config.label_size, first, 7, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(inplace=True),
        )
        self.second = nn.ConvTranspose2d(first, second, 4, stride=2, padding=1, bias=False)
        self.second_norm = LabelledNorm(config.labels, second)
        self.third = nn.Conv2d(second, third, 3, padding=1, bias=False)
        self.third_norm = LabelledNorm(config.labels, third)
        self.second_activation, self.third_activation = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.last = nn.Sequential(nn.ConvTranspose2d(third, 1, 4, stride=2, padding=1), nn.Tanh())

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:  # (batch, z), (batch,) → (batch, 1, 28, 28) in [-1, 1]
        maps = self.first(torch.cat((latents, self.embedding(labels)), dim=1)[:, :, None, None])
        maps = self.second_activation(self.second_norm(self.second(maps), labels))
        images: Tensor = self.last(self.third_activation(self.third_norm(self.third(maps), labels)))
        return images


class RpganDiscriminator(nn.Module):
    """28×28 → 14×14 → 7×7 → 4×4 by strided convolutions with biases; the logit and the projection are the cdcgan's.

    A column of what it answers is the logit of the images as digits of that label; a row's softmax says which label they have.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        first, second, third = config.discriminator_widths
        slope = config.leaky_slope
        self.features = nn.Sequential(
            nn.Conv2d(1, first, 4, stride=2, padding=1),
            nn.LeakyReLU(slope),
            nn.Conv2d(first, second, 4, stride=2, padding=1),
            nn.LeakyReLU(slope),
            nn.Conv2d(second, third, 3, stride=2, padding=1),
            nn.LeakyReLU(slope),
            nn.Flatten(),
        )
        self.logit = nn.Linear(third * 4 * 4, 1, bias=False)  # what all logits have in common falls out of every loss
        self.projection = nn.Linear(third * 4 * 4, config.projection_size)
        self.embedding = nn.Embedding(config.labels, config.projection_size)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, 28, 28) → (batch, labels)
        features = self.features(images)
        logits: Tensor = self.logit(features) + self.projection(features) @ self.embedding.weight.T
        return logits


GENERATORS = {"mlp": MlpGenerator, "dcgan": DcganGenerator, "cdcgan": CdcganGenerator, "rpgan": RpganGenerator}
DISCRIMINATORS = {
    "mlp": MlpDiscriminator,
    "dcgan": DcganDiscriminator,
    "cdcgan": CdcganDiscriminator,
    "rpgan": RpganDiscriminator,
}


def trained_generator(config: TrainConfig, checkpoint: Mapping[str, Any]) -> nn.Module:
    """The generator that a checkpoint is kept for: the average over the steps, if there is one. Raises CheckpointError."""
    generator = build_generator(config)
    try:
        generator.load_state_dict(checkpoint["average" if config.average_decay else "generator"])
    except (KeyError, RuntimeError, TypeError):
        raise CheckpointError(OTHER_NETWORKS) from None
    return generator


def weights_digest(generator: nn.Module) -> str:
    """SHA-256 of a generator's weights and statistics, by name: what a report of its digits holds for."""
    digest = hashlib.sha256()
    for name, value in sorted(generator.state_dict().items()):
        digest.update(name.encode() + b"\0" + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_generator(config: TrainConfig) -> nn.Module:
    """The config's generator with its initial weights, drawn from torch's global generator."""
    network = GENERATORS[config.architecture](config)
    _initialise(network, config)
    return network


def build_discriminator(config: TrainConfig) -> nn.Module:
    """The config's discriminator with its initial weights, drawn from torch's global generator."""
    network = DISCRIMINATORS[config.architecture](config)
    _initialise(network, config)
    return network


@torch.no_grad()
def _initialise(network: nn.Module, config: TrainConfig) -> None:
    for module in network.modules():
        if isinstance(network, RpganDiscriminator) and isinstance(module, nn.Conv2d):
            # Without normalisation the initial weights alone keep what comes out of a layer as large as what goes in.
            nn.init.kaiming_normal_(module.weight, config.leaky_slope)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and config.weight_init_std is not None:
            module.weight.normal_(0.0, config.weight_init_std)
        if isinstance(module, CdcganDiscriminator | RpganDiscriminator):
            # As large as the projection it is multiplied with: a unit normal would drown the features' own logit.
            module.embedding.weight.normal_(0.0, config.projection_size**-0.5)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and config.norm_init_std is not None:
            module.weight.normal_(1.0, config.norm_init_std)
            module.bias.zero_()
