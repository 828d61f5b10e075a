"""The presets: all numbers of the two notebooks, here and nowhere else; the conditional ones' come from trials with this code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from train.config import RELATIVISTIC, TrainConfig
from train.errors import ConfigError

_DCGAN = TrainConfig(
    preset="dcgan",
    architecture="dcgan",
    latent_size=100,
    generator_widths=(256, 128, 64),
    discriminator_widths=(64, 128, 256),
    leaky_slope=0.2,
    weight_init_std=0.02,
    norm_init_std=0.01,
    discriminator_loss="sum",
    learning_rate=2e-4,
    beta1=0.5,
    beta2=0.999,
    batch_size=64,
    epochs=10,
    report_every=25,
    report_per="epoch",
    reported_loss="last",
    grid_images=64,  # the whole batch, as in the notebook
    grid_columns=8,
    keep_checkpoints=0,
)

# The dcgan's numbers with these changes.
_CDCGAN = dataclasses.replace(
    _DCGAN,
    preset="cdcgan",
    architecture="cdcgan",
    labels=10,
    label_size=32,
    projection_size=64,
    learning_rate_end=0.05,
    average_decay=0.999,
    epochs=40,
    precision="bf16",
    report_every=250,
    report_per="run",
    reported_loss="mean",
    grid_images=100,
    grid_columns=10,
    keep_checkpoints=2,
)

PRESETS: Mapping[str, TrainConfig] = {
    "mlp": TrainConfig(
        preset="mlp",
        architecture="mlp",
        latent_size=64,
        generator_widths=(128, 256, 512, 1024),
        discriminator_widths=(512, 256, 128),
        leaky_slope=0.2,
        weight_init_std=None,
        norm_init_std=None,
        discriminator_loss="mean",
        learning_rate=1e-5,
        beta1=0.9,
        beta2=0.999,
        batch_size=128,
        epochs=200,
        report_every=500,
        reported_loss="mean",
        grid_images=25,
        grid_columns=5,
        keep_checkpoints=2,
    ),
    "dcgan": _DCGAN,
    "cdcgan": _CDCGAN,
    # The cdcgan's with these: docs/decisions/0011-rpgan.md tells what each is good for.
    "rpgan": dataclasses.replace(
        _CDCGAN,
        preset="rpgan",
        architecture="rpgan",
        generator_widths=(128, 64, 64),
        discriminator_widths=(64, 128, 384),
        norm_init_std=None,
        discriminator_loss=RELATIVISTIC,
        label_loss=0.01,
        label_loss_end=0.15,
        gradient_penalty=0.1,
        penalty_every=8,
        beta2=0.99,
        epochs=45,
    ),
}

DEFAULT_PRESET = "rpgan"  # what is trained and shown where nothing else is named


def preset(name: str) -> TrainConfig:
    """The preset of that name; ConfigError lists the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
