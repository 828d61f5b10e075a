"""The generator as it is served: latents in, and labels for a conditional one; ``images`` in [0, 1] and ``pixels`` out,
whatever range it was trained in.

``fold`` makes it faster without changing the function: BatchNorm is folded into the layer before it, and a transposed
convolution over a single position becomes a matrix product. A label's part of that product, its gains and its biases are
looked up in tables.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from export.errors import ExportError
from train.config import TrainConfig
from train.models import CdcganGenerator, LabelledNorm, RpganGenerator

Arrays = Mapping[str, NDArray[Any]]
# Of latents float32 (batch, z), and for a conditional model labels int64 (batch,), else None.
Form = Callable[[NDArray[np.float32], NDArray[np.int64] | None], Arrays]


class ServedGenerator(nn.Module):
    """Wraps a trained generator: maps its range to [0, 1] and makes the bytes."""

    def __init__(self, generator: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.generator = generator
        self.scale = 1.0 / (high - low)
        self.offset = -low / (high - low)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, z) → images float32 (batch, 1, 28, 28) in [0, 1] and pixels uint8 (batch, 28, 28)."""
        return self.outputs(self.generator(latents))

    def outputs(self, trained: Tensor) -> tuple[Tensor, Tensor]:
        """Images in the range they were trained in, and the two outputs made of them."""
        images = trained * self.scale + self.offset
        pixels = torch.round(images * 255.0).to(torch.uint8).squeeze(1)
        return images, pixels


class ServedConditionalGenerator(ServedGenerator):
    """The same for a generator that takes labels."""

    def forward(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(batch, z) and int64 (batch,) → as ``ServedGenerator``."""
        return self.outputs(self.generator(latents, labels))


def served_generator(config: TrainConfig, generator: nn.Module) -> ServedGenerator:
    """A config's generator as it is served, in evaluation mode."""
    kind = ServedConditionalGenerator if config.conditional else ServedGenerator
    return kind(generator, *config.pixel_range).eval()


class FirstLayer(nn.Module):
    """A transposed convolution whose input is one position: a matrix product and a reshape. (batch, z) → NCHW."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        assert isinstance(convolution, nn.ConvTranspose2d)
        inputs, outputs, height, width = convolution.weight.shape
        self.shape = (outputs, height, width)
        self.linear = nn.Linear(inputs, outputs * height * width)
        assert convolution.bias is not None
        with torch.no_grad():
            self.linear.weight.copy_(convolution.weight.reshape(inputs, -1).t())
            self.linear.bias.copy_(convolution.bias.repeat_interleave(height * width))

    def forward(self, latents: Tensor) -> Tensor:
        maps: Tensor = self.linear(latents).unflatten(1, self.shape)
        return maps


class LabelledFirstLayer(nn.Module):
    """The same of latents with a label's embedding behind them: what the layer makes of a label is a row of a table."""

    def __init__(self, first: FirstLayer, embedding: nn.Embedding) -> None:
        super().__init__()
        self.shape = first.shape
        latent_size = first.linear.in_features - embedding.embedding_dim
        weight = first.linear.weight
        self.linear = nn.Linear(latent_size, first.linear.out_features, bias=False)
        self.table = nn.Embedding(embedding.num_embeddings, first.linear.out_features)
        with torch.no_grad():
            self.linear.weight.copy_(weight[:, :latent_size])
            self.table.weight.copy_(embedding.weight @ weight[:, latent_size:].t() + first.linear.bias)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        maps: Tensor = (self.linear(latents) + self.table(labels)).unflatten(1, self.shape)
        return maps


class FoldedCdcgan(nn.Module):
    """A folded conditional generator whose labels go into its first layer alone."""

    def __init__(self, first: LabelledFirstLayer, rest: nn.Sequential) -> None:
        super().__init__()
        self.first = first
        self.rest = rest

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        images: Tensor = self.rest(self.first(latents, labels))
        return images


class LabelledBlock(nn.Module):
    """A convolution with the BatchNorm of its LabelledNorm inside it, then the label's gain and bias. NCHW, (batch,) → NCHW.

    The convolution's own bias b goes into the label's: (x + b) · gain + bias = x · gain + (b · gain + bias).
    """

    def __init__(self, convolution: nn.Module, norm: LabelledNorm) -> None:
        super().__init__()
        self.convolution = _with_norm(convolution, norm.norm)
        own = self.convolution.bias
        assert isinstance(own, Tensor)
        self.convolution.register_parameter("bias", None)
        # Each label's row has the shape that it is multiplied in: it is looked up, and nothing else is done to it.
        gain, bias = norm.gain.weight.detach(), norm.bias.weight.detach()
        self.gain, self.bias = (nn.Parameter(table[:, :, None, None]) for table in (gain, bias + gain * own.detach()))

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        gain, bias = (table.index_select(0, labels) for table in (self.gain, self.bias))
        changed: Tensor = self.convolution(maps) * gain + bias
        return changed


class FoldedRpgan(nn.Module):
    """An RpganGenerator without BatchNorm."""

    def __init__(self, trained: RpganGenerator) -> None:
        super().__init__()
        convolution, norm, _ = trained.first
        self.first = LabelledFirstLayer(FirstLayer(_with_norm(convolution, norm)), trained.embedding)
        self.second = LabelledBlock(trained.second, trained.second_norm)
        self.third = LabelledBlock(trained.third, trained.third_norm)
        self.last = trained.last

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        maps = self.first(latents, labels).relu()
        maps = self.second(maps, labels).relu()
        images: Tensor = self.last(self.third(maps, labels).relu())
        return images


class _Reshaped(nn.Module):
    """Hidden layers, then the (batch, 1, 28, 28) view of what they give."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, latents: Tensor) -> Tensor:
        flat: Tensor = self.layers(latents)
        return flat.view(-1, 1, 28, 28)


def fold(served: ServedGenerator) -> ServedGenerator:
    """A copy, in evaluation mode, with every BatchNorm folded. Raises ExportError when one cannot be."""
    served = copy.deepcopy(served).eval()
    if isinstance(served.generator, RpganGenerator):
        served.generator = FoldedRpgan(served.generator)
        return served.eval()
    layers = served.generator.layers
    if not isinstance(layers, nn.Sequential):
        raise ExportError("the generator has no plain sequence of layers to fold")
    folded: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            folded[-1:] = [_with_norm(folded[-1] if folded else None, layer)]
        else:
            folded.append(layer)
    if isinstance(folded[0], nn.ConvTranspose2d):
        first = FirstLayer(folded[0])
        if isinstance(served.generator, CdcganGenerator):
            labelled = LabelledFirstLayer(first, served.generator.embedding)
            served.generator = FoldedCdcgan(labelled, nn.Sequential(*folded[1:]))
        else:
            served.generator = nn.Sequential(first, *folded[1:])
    else:
        served.generator = _Reshaped(nn.Sequential(*folded))
    return served.eval()


def _with_norm(layer: nn.Module | None, norm: nn.Module) -> nn.Module:
    """The layer with the BatchNorm after it inside. Raises ExportError when that cannot be."""
    if isinstance(norm, nn.BatchNorm1d) and isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm)
    if isinstance(norm, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, nn.ConvTranspose2d))
    raise ExportError(f"BatchNorm after {type(layer).__name__} cannot be folded")


def torch_form(module: nn.Module | torch.jit.ScriptModule) -> Form:
    """An eager or scripted served generator as a function on arrays."""

    def run(latents: NDArray[np.float32], labels: NDArray[np.int64] | None) -> Arrays:
        given = [latents] if labels is None else [latents, labels]
        with torch.no_grad():
            images, pixels = module(*(torch.from_numpy(array) for array in given))
        return {"images": images.numpy(), "pixels": pixels.numpy()}

    return run
