"""The configuration of a training run: one frozen dataclass, whose instances are checked when they are made.

Fields become command-line flags of the same name (``--learning-rate`` for ``learning_rate``), and the resolved config is
written beside the weights. ``train.presets`` has the numbers.
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
MANY = 1_000_000
_OF_AN_RPGAN = {
    "gradient_penalty": "has no BatchNorm",
    "shift": "takes shifted images",
    "label_loss": "has a logit for each label",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every number of one run. Raises ConfigError, naming the field, when made with an unusable value."""

    preset: str = field(metadata={"help": "the preset that this config started from"})
    architecture: str = field(metadata={"help": "network family", "choices": ("mlp", "dcgan", "cdcgan", "rpgan")})
    latent_size: int = field(metadata={"within": (1, 4096), "help": "z: length of the generator's input vector"})
    labels: int = field(
        default=0,
        metadata={"within": (0, 1000), "help": "number of labels of a conditional model (cdcgan, rpgan); 0: unconditional"},
    )
    label_size: int = field(
        default=0,
        metadata={"within": (0, 4096), "help": "length of the label embedding that the generator gets beside the latents"},
    )
    projection_size: int = field(
        default=0, metadata={"within": (0, 4096), "help": "length of the label embedding in the projection discriminator"}
    )
    generator_widths: tuple[int, ...] = field(
        metadata={"within": (1, 8192), "help": "hidden widths (mlp) or channels (dcgan) of the generator, first to last"}
    )
    discriminator_widths: tuple[int, ...] = field(
        metadata={"within": (1, 8192), "help": "hidden widths (mlp) or channels (dcgan) of the discriminator, first to last"}
    )
    leaky_slope: float = field(metadata={"help": "negative slope of the discriminator's LeakyReLU"})
    weight_init_std: float | None = field(
        metadata={"within": (0, 10), "help": "std of the normal initial convolution weights; none = PyTorch's own initialisation"}
    )
    norm_init_std: float | None = field(
        metadata={"within": (0, 10), "help": "std around 1 of the initial BatchNorm weights; none = PyTorch's own initialisation"}
    )
    discriminator_loss: str = field(
        metadata={
            "help": "mean or sum of the cross-entropies of real and fake images; or a loss of pairs of a real and a fake",
            "choices": ("mean", "sum", RELATIVISTIC),
        }
    )
    gradient_penalty: float = field(
        default=0.0,
        metadata={
            "within": (0, MANY),
            "help": "weight of the gradient penalty: the squared gradient of the logits at real and fake images (R1, R2)",
        },
    )
    shift: int = field(
        default=0,
        metadata={
            "within": (0, 8),
            "help": "largest random shift, in pixels, of half of the discriminator's input images; 0: no shift",
        },
    )
    label_loss: float = field(
        default=0.0,
        metadata={
            "within": (0, MANY),
            "help": "weight of the cross-entropy with which the discriminator learns to classify real images; 0: none",
        },
    )
    label_loss_end: float = field(
        default=1.0,
        metadata={
            "within": (0, 1),
            "help": "label loss weight at the last step as a share of the first, after a linear decay; 1: no decay",
        },
    )
    penalty_every: int = field(
        default=1,
        metadata={"within": (1, MANY), "help": "compute the gradient penalty every so many steps, multiplied by that number"},
    )
    learning_rate: float = field(metadata={"help": "Adam's learning rate, for both networks"})
    learning_rate_end: float = field(
        default=1.0,
        metadata={
            "within": (0, 1),
            "help": "learning rate at the last step as a share of the first, after a linear decay; 1: no decay",
        },
    )
    average_decay: float = field(
        default=0.0,
        metadata={"help": "decay of the exponential moving average of the generator's weights, which is exported; 0: no average"},
    )
    beta1: float = field(metadata={"help": "Adam's decay of the first moment"})
    beta2: float = field(metadata={"help": "Adam's decay of the second moment"})
    batch_size: int = field(
        metadata={"within": (2, 1 << 17), "help": "images per step; the last partial batch of an epoch is kept"}
    )
    epochs: int = field(metadata={"within": (1, MANY), "help": "passes over the training set"})
    steps: int = field(
        default=0, metadata={"within": (0, 1 << 40), "help": "end the run after this many steps; 0: after all epochs"}
    )
    precision: str = field(
        default="fp32",
        metadata={
            "help": "precision of the arithmetic; tf32: on CUDA only; bf16: mixed precision",
            "choices": ("fp32", "tf32", "bf16"),
        },
    )
    seed: int = field(
        default=0,
        metadata={"within": (0, (1 << 44) - 1), "help": "random seed of the initial weights, the shuffling and the noise"},
    )
    report_every: int = field(
        metadata={
            "within": (1, 1 << 40),
            "help": "batches between two log points, which record the losses and save grids of images",
        }
    )
    report_per: str = field(
        default="run",
        metadata={
            "help": "what --report-every counts: batches of the run (not its first), or of each epoch (its first too)",
            "choices": ("run", "epoch"),
        },
    )
    reported_loss: str = field(
        metadata={
            "help": "the loss at a log point: the mean since the last log point, or the loss of the last step",
            "choices": ("mean", "last"),
        }
    )
    grid_images: int = field(metadata={"within": (1, 10_000), "help": "images in a saved grid"})
    grid_columns: int = field(metadata={"within": (1, 1000), "help": "images in one row of a saved grid"})
    checkpoint_every: int = field(default=1, metadata={"within": (1, MANY), "help": "epochs between two checkpoints"})
    keep_checkpoints: int = field(metadata={"within": (0, MANY), "help": "number of checkpoints to keep, the newest; 0: all"})

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            choices = spec.metadata.get("choices")
            if choices and value not in choices:
                raise ConfigError(f"{spec.name} must be one of {', '.join(choices)}, got {value!r}")
            self._check_bounds(spec.name, value, spec.metadata.get("within"))
        _require(self, "learning_rate", 0 < self.learning_rate < 1, "between 0 and 1")
        _require(self, "average_decay", 0 <= self.average_decay < 1, "in [0, 1)")
        _require(self, "beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        _require(self, "beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        _require(self, "leaky_slope", 0 <= self.leaky_slope < 1, "in [0, 1)")
        for name in ("generator_widths", "discriminator_widths"):
            _require(self, name, 1 <= len(getattr(self, name)) <= 16, "a list of 1 to 16 widths")
        if self.architecture != "mlp":
            # Three doublings lead from 4x4 to 28x28 and back; another number of layers gives another picture size.
            for name in ("generator_widths", "discriminator_widths"):
                _require(self, name, len(getattr(self, name)) == 3, "three channel counts for a dcgan")
        if (self.architecture == "rpgan") != (self.discriminator_loss == RELATIVISTIC):
            # Pairs go through the discriminator together: the other ones have BatchNorm, which must see each half alone.
            raise ConfigError(f"discriminator_loss must be {RELATIVISTIC} for an rpgan, and for no other")
        for name, reason in _OF_AN_RPGAN.items():
            if getattr(self, name) and self.architecture != "rpgan":
                raise ConfigError(f"{name} must be 0: only an rpgan's discriminator {reason}")
        wanted = "at least 1 for a cdcgan or rpgan" if self.conditional else "0: only a cdcgan or rpgan takes labels"
        for name in ("labels", "label_size", "projection_size"):
            value = getattr(self, name)
            _require(self, name, value >= 1 if self.conditional else value == 0, wanted)

    def _check_bounds(self, name: str, value: Any, bounds: tuple[float, float] | None) -> None:
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if bounds and not all(bounds[0] <= each <= bounds[1] for each in values):  # NaN is not
            raise ConfigError(f"{name} must be from {bounds[0]} to {bounds[1]}, got {value!r}")

    @property
    def conditional(self) -> bool:
        """Whether the networks take a label beside their input."""
        return self.architecture in ("cdcgan", "rpgan")

    @property
    def pixel_range(self) -> tuple[float, float]:
        """Lowest and highest value of an image as the networks see it: sigmoid or tanh."""
        return (0.0, 1.0) if self.architecture == "mlp" else (-1.0, 1.0)

    def steps_per_epoch(self, images: int, processes: int) -> int:
        """Batches of an epoch of so many images."""
        whole, rest = divmod(images, self.batch_size * processes)
        least = 1 if processes == 1 else 2 * processes  # BatchNorm needs two images in each process
        return whole + (rest >= least)

    def total_steps(self, images: int, processes: int) -> int:
        """Steps of the whole run."""
        whole = self.steps_per_epoch(images, processes) * self.epochs
        return min(whole, self.steps) if self.steps else whole

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
