"""The presets carry the notebooks' numbers, and a config with an unusable one cannot be made."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from train.cli import build_parser
from train.config import TrainConfig, parse_field
from train.errors import ConfigError
from train.presets import PRESETS, preset


def test_mlp_preset_carries_the_notebooks_numbers() -> None:
    config = preset("mlp")
    assert (config.latent_size, config.generator_widths, config.discriminator_widths) == (
        64,
        (128, 256, 512, 1024),
        (512, 256, 128),
    )
    assert (config.learning_rate, config.batch_size, config.epochs, config.seed, config.leaky_slope) == (1e-5, 128, 200, 0, 0.2)
    assert (config.discriminator_loss, config.report_every, config.reported_loss) == ("mean", 500, "mean")
    assert config.report_per == "run"
    assert (config.grid_images, config.grid_columns, config.pixel_range) == (25, 5, (0.0, 1.0))


def test_dcgan_preset_carries_the_notebooks_numbers() -> None:
    config = preset("dcgan")
    assert (config.latent_size, config.generator_widths, config.discriminator_widths) == (100, (256, 128, 64), (64, 128, 256))
    assert (config.learning_rate, config.beta1, config.beta2, config.batch_size, config.epochs) == (2e-4, 0.5, 0.999, 64, 10)
    assert (config.weight_init_std, config.norm_init_std, config.leaky_slope) == (0.02, 0.01, 0.2)
    assert (config.discriminator_loss, config.report_every, config.pixel_range) == ("sum", 25, (-1.0, 1.0))
    assert config.report_per == "epoch"
    assert 10 * len(range(0, 938, 25)) == 380, "log points of a whole run"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dcgan", {"labels": 10}, r"^labels .*\b10$"),
        ("cdcgan", {"labels": 0}, r"^labels .* 1 .*\b0$"),
        ("cdcgan", {"projection_size": 0}, "^projection_size .* 1 "),
        ("cdcgan", {"generator_widths": (8,)}, "three channel counts"),
        ("cdcgan", {"learning_rate_end": 1.5}, "^learning_rate_end "),
        ("cdcgan", {"average_decay": 1.0}, "^average_decay "),
        ("dcgan", {"discriminator_loss": "relativistic"}, "^discriminator_loss .*rpgan"),
        ("rpgan", {"discriminator_loss": "sum"}, "^discriminator_loss .*rpgan"),
        ("cdcgan", {"gradient_penalty": 1.0}, "^gradient_penalty .*rpgan"),
        ("rpgan", {"gradient_penalty": -1.0}, "^gradient_penalty must be from 0 to"),
        ("cdcgan", {"label_loss": 0.1}, "^label_loss .*rpgan"),
        ("cdcgan", {"shift": 1}, "^shift .*rpgan"),
        ("rpgan", {"label_loss_end": 1.5}, "^label_loss_end must be from 0 to 1, got 1.5"),
        ("rpgan", {"shift": 9}, "^shift .* 0 to 8"),
        ("rpgan", {"label_loss": -0.1}, "^label_loss must be from 0 to"),
        ("rpgan", {"penalty_every": 0}, "^penalty_every .* 1"),
    ],
)
def test_what_makes_a_preset_conditional_goes_together(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset(name).replace(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "^learning_rate .*0 and 1.*0.0"),
        ({"learning_rate": float("nan")}, "^learning_rate .*0 and 1.*nan"),
        ({"batch_size": 1}, "^batch_size .* 2"),
        ({"epochs": 0}, "^epochs .* 1.* 0"),
        ({"beta1": 1.0}, "^beta1 "),
        ({"weight_init_std": -1.0}, "^weight_init_std must be from 0 to 10, got -1.0"),
        ({"latent_size": 100_000_000_000}, "^latent_size must be from 1 to 4096, got 100000000000"),
        ({"batch_size": 10**20}, "^batch_size must be from 2 to 131072"),
        ({"generator_widths": (256, 128, 10**9)}, "^generator_widths must be from 1 to 8192"),
        ({"gradient_penalty": float("inf")}, "^gradient_penalty must be from 0 to"),
        ({"generator_widths": ()}, "^generator_widths "),
        ({"generator_widths": (256, 128)}, "three channel counts"),
        ({"discriminator_loss": "max"}, "^discriminator_loss .*mean, sum, relativistic.*'max'"),
    ],
)
def test_an_unusable_number_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset("dcgan").replace(change)


def test_no_number_is_without_bounds() -> None:
    """Issue: some were tracebacks after the run's folder had been made, and an infinite penalty was trained with."""
    for spec in dataclasses.fields(TrainConfig):
        value = getattr(preset("rpgan"), spec.name)
        if isinstance(value, str):
            continue
        for bad in (float("inf"), float("-inf"), float("nan"), 1 << 60, -1):
            with pytest.raises(ConfigError, match=f"^{spec.name} must be "):
                preset("rpgan").replace({spec.name: (bad,) * 3 if isinstance(value, tuple) else bad})


def test_config_survives_json() -> None:
    for config in PRESETS.values():
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in config.to_json().items()}
        assert TrainConfig.from_json(listed) == config


def test_unknown_and_missing_fields_are_refused() -> None:
    values = preset("mlp").to_json()
    with pytest.raises(ConfigError, match="'momentum'"):
        TrainConfig.from_json(values | {"momentum": 0.9})
    del values["epochs"]
    with pytest.raises(ConfigError, match="epochs"):
        TrainConfig.from_json(values)


def test_every_number_of_a_preset_is_a_flag() -> None:
    for name in PRESETS:
        for spec in dataclasses.fields(TrainConfig):
            if spec.name in ("preset", "architecture"):
                continue
            flag = "--" + spec.name.replace("_", "-")
            assert getattr(build_parser().parse_args([name, flag, "7"]), spec.name) == "7"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "3", 3),
        ("learning_rate", "1e-3", 1e-3),
        ("generator_widths", "8,16", (8, 16)),
        ("weight_init_std", "none", None),
        ("discriminator_loss", "sum", "sum"),
    ],
)
def test_flag_text_becomes_the_fields_type(name: str, text: str, value: object) -> None:
    assert parse_field(name, text) == value


def test_flag_text_of_the_wrong_type_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"--batch-size .*'many'"):
        parse_field("batch_size", "many")


def test_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'vae'.*mlp, dcgan, cdcgan"):
        preset("vae")
