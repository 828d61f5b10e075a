"""The configuration of a training run: one frozen dataclass, and an instance of it for each preset.

All numbers of the two notebooks are here and nowhere else; the cdcgan's come from trials with this code. Fields
become command-line flags of the same name (``--learning-rate`` for ``learning_rate``), and the resolved config is written
beside the weights.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from train.errors import ConfigError

RELATIVISTIC = "relativistic"
_OF_AN_RPGAN = {
    "gradient_penalty": "is without BatchNorm",
    "shift": "is shown images that are moved",
    "label_loss": "has a logit for each label",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every number of one run. Raises ConfigError, naming the field, when made with an unusable value."""

    preset: str = field(metadata={"help": "which of the presets this config started from"})
    architecture: str = field(metadata={"help": "network family", "choices": ("mlp", "dcgan", "cdcgan", "rpgan")})
    latent_size: int = field(metadata={"help": "z: length of the generator's input vector"})
    labels: int = field(default=0, metadata={"help": "classes that can be asked for (cdcgan, rpgan); 0: none"})
    label_size: int = field(default=0, metadata={"help": "values that stand for a label beside the latents"})
    projection_size: int = field(default=0, metadata={"help": "features that the discriminator holds against a label"})
    generator_widths: tuple[int, ...] = field(
        metadata={"help": "hidden widths (mlp) or channels (dcgan) of the generator, first to last"}
    )
    discriminator_widths: tuple[int, ...] = field(
        metadata={"help": "hidden widths (mlp) or channels (dcgan) of the discriminator, first to last"}
    )
    leaky_slope: float = field(metadata={"help": "negative slope of the discriminator's LeakyReLU"})
    weight_init_std: float | None = field(
        metadata={"help": "std of the normal initial convolution weights; none = PyTorch's own initialisation"}
    )
    norm_init_std: float | None = field(
        metadata={"help": "std around 1 of the initial BatchNorm weights; none = PyTorch's own initialisation"}
    )
    discriminator_loss: str = field(
        metadata={
            "help": "mean or sum of the real and the fake half's cross-entropy; or of pairs of a real image and a fake",
            "choices": ("mean", "sum", RELATIVISTIC),
        }
    )
    gradient_penalty: float = field(
        default=0.0, metadata={"help": "weight of the squared slope of the discriminator's logits at images and fakes; 0: none"}
    )
    shift: int = field(
        default=0,
        metadata={"help": "pixels by which half of the images that the discriminator is shown are moved, at most; 0: none"},
    )
    label_loss: float = field(
        default=0.0, metadata={"help": "weight of the discriminator's cross-entropy over the labels of real images; 0: none"}
    )
    label_loss_end: float = field(
        default=1.0, metadata={"help": "share of that weight that a linear decay leaves at the last step; 1: no decay"}
    )
    penalty_every: int = field(default=1, metadata={"help": "steps from one gradient penalty to the next, so much heavier"})
    learning_rate: float = field(metadata={"help": "Adam's learning rate, the same for both networks"})
    learning_rate_end: float = field(
        default=1.0, metadata={"help": "share of the learning rate that a linear decay leaves at the last step; 1: no decay"}
    )
    average_decay: float = field(
        default=0.0, metadata={"help": "of the exponential moving average of the generator that is exported; 0: none"}
    )
    beta1: float = field(metadata={"help": "Adam's decay of the first moment"})
    beta2: float = field(metadata={"help": "Adam's decay of the second moment"})
    batch_size: int = field(metadata={"help": "images per step; the last partial batch of an epoch is kept"})
    epochs: int = field(metadata={"help": "passes over the training set"})
    steps: int = field(default=0, metadata={"help": "steps after which the run ends within its epochs; 0: all of them"})
    precision: str = field(
        default="fp32",
        metadata={"help": "of the arithmetic; tf32 is CUDA's, bf16 is mixed precision", "choices": ("fp32", "tf32", "bf16")},
    )
    seed: int = field(default=0, metadata={"help": "seed of the initial weights, the shuffling and the noise"})
    report_every: int = field(metadata={"help": "batches from one log point to the next (losses recorded, grids saved)"})
    report_per: str = field(
        default="run",
        metadata={
            "help": "what --report-every counts through: the run, its first batch left out, or each epoch, from its first batch",
            "choices": ("run", "epoch"),
        },
    )
    reported_loss: str = field(
        metadata={"help": "the loss at a log point: mean since the last one, or that step's own", "choices": ("mean", "last")}
    )
    grid_images: int = field(metadata={"help": "images in a saved grid"})
    grid_columns: int = field(metadata={"help": "images in one row of a saved grid"})
    checkpoint_every: int = field(default=1, metadata={"help": "epochs between two checkpoints"})
    keep_checkpoints: int = field(metadata={"help": "how many of the newest checkpoints are kept; 0 keeps all"})

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            choices = spec.metadata.get("choices")
            if choices and value not in choices:
                raise ConfigError(f"{spec.name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("latent_size", "batch_size", "epochs", "report_every", "grid_images", "grid_columns"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "steps", self.steps >= 0, "0 or more")
        _require(self, "keep_checkpoints", self.keep_checkpoints >= 0, "0 or more")
        _require(self, "seed", 0 <= self.seed < 1 << 44, "from 0 to 2^44 - 1: an epoch's order comes of it in 64 bits")
        _require(self, "checkpoint_every", self.checkpoint_every >= 1, "at least 1")
        _require(self, "learning_rate", 0 < self.learning_rate < 1, "between 0 and 1")
        _require(self, "learning_rate_end", 0 <= self.learning_rate_end <= 1, "in [0, 1]")
        _require(self, "average_decay", 0 <= self.average_decay < 1, "in [0, 1)")
        _require(self, "beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        _require(self, "beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        _require(self, "leaky_slope", 0 <= self.leaky_slope < 1, "in [0, 1)")
        _require(self, "batch_size", self.batch_size >= 2, "at least 2: BatchNorm needs two images")
        for name in ("generator_widths", "discriminator_widths"):
            widths = getattr(self, name)
            _require(self, name, len(widths) > 0 and min(widths) >= 1, "a list of positive widths")
        if self.architecture != "mlp":
            # Three doublings lead from 4x4 to 28x28 and back; another number of layers gives another picture size.
            for name in ("generator_widths", "discriminator_widths"):
                _require(self, name, len(getattr(self, name)) == 3, "three channel counts for a dcgan")
        _require(self, "gradient_penalty", self.gradient_penalty >= 0, "0 or more")
        _require(self, "penalty_every", self.penalty_every >= 1, "at least 1")
        if (self.architecture == "rpgan") != (self.discriminator_loss == RELATIVISTIC):
            # Pairs go through the discriminator together: the other ones have BatchNorm, which must see each half alone.
            raise ConfigError(f"discriminator_loss must be {RELATIVISTIC} for an rpgan, and for no other")
        _require(self, "shift", 0 <= self.shift <= 8, "from 0 to 8 pixels")
        _require(self, "label_loss", self.label_loss >= 0, "0 or more")
        _require(self, "label_loss_end", 0 <= self.label_loss_end <= 1, "in [0, 1]")
        for name, reason in _OF_AN_RPGAN.items():
            if getattr(self, name) and self.architecture != "rpgan":
                raise ConfigError(f"{name} must be 0: only an rpgan's discriminator {reason}")
        wanted = "at least 1 for a cdcgan or rpgan" if self.conditional else "0: only a cdcgan or rpgan takes labels"
        for name in ("labels", "label_size", "projection_size"):
            value = getattr(self, name)
            _require(self, name, value >= 1 if self.conditional else value == 0, wanted)

    @property
    def conditional(self) -> bool:
        """Whether the networks take a label beside their input."""
        return self.architecture in ("cdcgan", "rpgan")

    @property
    def pixel_range(self) -> tuple[float, float]:
        """Lowest and highest value of an image as the networks see it: sigmoid or tanh."""
        return (0.0, 1.0) if self.architecture == "mlp" else (-1.0, 1.0)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Rebuild a config from its JSON. Unknown and missing fields raise ConfigError."""
        known = {spec.name for spec in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown config field {unknown[0]!r}; known are {', '.join(sorted(known))}")
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"config: {error}") from None

    def replace(self, overrides: Mapping[str, Any]) -> TrainConfig:
        return dataclasses.replace(self, **overrides)


def _require(config: TrainConfig, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {wanted}, got {getattr(config, name)!r}")


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


def parse_field(name: str, text: str) -> Any:
    """Turn a flag's text into the field's type. Raises ConfigError naming the flag."""
    kind = typing.get_type_hints(TrainConfig)[name]
    flag = "--" + name.replace("_", "-")
    try:
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if kind == (float | None):
            return None if text == "none" else float(text)
        if kind == tuple[int, ...]:
            return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} cannot take {text!r}: {_WANTED[kind]} is needed") from None
    return text


_WANTED: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    float | None: "a number or 'none'",
    tuple[int, ...]: "a list of whole numbers such as 256,128,64",
}
