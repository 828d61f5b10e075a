"""The networks' shapes and sizes as the notebooks have them, their initial weights, and the losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from train.models import PointConvTranspose2d, build_discriminator, build_generator
from train.presets import preset
from train.reports.activations import record
from train.trainer.losses import discriminator_loss, generator_loss


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Counted by hand from the layers' sizes: weights, biases and BatchNorm pairs.
SIZES = {
    "mlp": (
        (64 * 128 + 128 * 256 + 256 * 512 + 512 * 1024) + 3 * (128 + 256 + 512 + 1024) + 1024 * 784 + 784,
        (784 * 512 + 512) + (512 * 256 + 256) + (256 * 128 + 128) + (128 + 1),
    ),
    "dcgan": (
        16 * (100 * 256 + 256 * 128 + 128 * 64 + 64) + 2 * (256 + 128 + 64),
        16 * (64 + 64 * 128 + 128 * 256 + 256) + 2 * (128 + 256),
    ),
    "cdcgan": (
        10 * 32 + 16 * (132 * 256 + 256 * 128 + 128 * 64 + 64) + 2 * (256 + 128 + 64),
        10 * 64 + 16 * (64 + 64 * 128 + 128 * 256 + 256 + 256 * 64) + 2 * (128 + 256),
    ),
    "rpgan": (
        10 * 32 + 49 * 132 * 128 + 2 * 128 + 16 * 128 * 64 + 9 * 64 * 64 + 4 * 10 * 64 + 16 * 64 + 1,
        (16 * 64 + 64) + (16 * 64 * 128 + 128) + (9 * 128 * 384 + 384) + 65 * 16 * 384 + 64 + 10 * 64,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_networks_have_the_sizes_that_their_layers_add_up_to(name: str) -> None:
    config = preset(name)
    assert (parameters(build_generator(config)), parameters(build_discriminator(config))) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
def test_generator_makes_images_in_its_range_and_discriminator_judges_each(name: str) -> None:
    config = preset(name)
    labels = [torch.arange(5)] if config.conditional else []
    images = build_generator(config)(torch.randn(5, config.latent_size), *labels).detach()
    assert images.shape == (5, 1, 28, 28)
    low, high = config.pixel_range
    assert low <= float(images.min()) < float(images.max()) <= high
    judged = build_discriminator(config)(*((images,) if name == "rpgan" else (images, *labels)))
    assert judged.shape == ((5, 10) if name == "rpgan" else (5,))


@pytest.mark.parametrize("name", ["cdcgan", "rpgan"])
def test_the_label_reaches_both_networks_of_a_conditional_preset(name: str) -> None:
    torch.manual_seed(0)
    config = preset(name)
    latents, ones, twos = torch.randn(4, 100), torch.full((4,), 1), torch.full((4,), 2)
    generator, discriminator = build_generator(config).eval(), build_discriminator(config).eval()
    images = generator(latents, ones)
    assert not torch.allclose(images, generator(latents, twos))
    if name == "rpgan":  # it answers for every label
        assert len(discriminator(images)[0].unique()) == 10
    else:
        assert not torch.allclose(discriminator(images, ones), discriminator(images, twos))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
def test_a_transposed_convolution_of_points_is_pytorchs_own(bias: bool, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    layer = PointConvTranspose2d(5, 3, (4, 2), bias=bias).to(memory_format=layout)
    points, slopes = torch.randn(6, 5, 1, 1, requires_grad=True), torch.randn(6, 3, 4, 2)
    given = [points, layer.weight, *([layer.bias] if bias else [])]
    maps = layer(points)
    expected = nn.functional.conv_transpose2d(points, layer.weight, layer.bias)
    torch.testing.assert_close(maps, expected)
    for own, pytorchs in zip(torch.autograd.grad(maps, given, slopes), torch.autograd.grad(expected, given, slopes), strict=True):
        torch.testing.assert_close(own, pytorchs)


def test_dcgan_weights_start_as_the_notebook_draws_them() -> None:
    torch.manual_seed(0)
    for network in (build_generator(preset("dcgan")), build_discriminator(preset("dcgan"))):
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                assert module.bias is None
                if module.weight.numel() > 10_000:
                    assert abs(float(module.weight.detach().std()) - 0.02) < 0.001
            if isinstance(module, nn.BatchNorm2d):
                assert abs(float(module.weight.detach().mean()) - 1) < 0.005
                assert abs(float(module.weight.detach().std()) - 0.01) < 0.004
                assert not module.bias.any()


def test_activations_are_those_after_each_relu_and_the_tanh() -> None:
    layers = record(build_generator(preset("dcgan")), torch.randn(36, 100))
    assert [tuple(layer.shape) for layer in layers] == [(36, 256, 4, 4), (36, 128, 8, 8), (36, 64, 16, 16), (36, 1, 28, 28)]
    assert all(float(layer.min()) >= 0 for layer in layers[:-1])
    assert float(layers[-1].min()) < 0


def test_losses_are_the_cross_entropies_they_claim_to_be() -> None:
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])

    def entropy(probability: float) -> float:
        return -math.log(probability)

    def sigmoid(logit: float) -> float:
        return 1 / (1 + math.exp(-logit))

    real_half = (entropy(sigmoid(2.0)) + entropy(sigmoid(-1.0))) / 2
    fake_half = (entropy(1 - sigmoid(0.5)) + entropy(1 - sigmoid(3.0))) / 2
    assert float(discriminator_loss(real, fake, "sum")) == pytest.approx(real_half + fake_half)
    assert float(discriminator_loss(real, fake, "mean")) == pytest.approx((real_half + fake_half) / 2)
    assert float(generator_loss(fake)) == pytest.approx((entropy(sigmoid(0.5)) + entropy(sigmoid(3.0))) / 2)


def test_losses_stay_finite_where_sigmoid_saturates() -> None:
    far = torch.tensor([1000.0, -1000.0])
    assert math.isfinite(float(discriminator_loss(far, far, "sum")))
