"""The step captured, the step in other precisions: as the plain step, as far as each promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.host_device import ReplayedByHand
from train.checkpoint import create_run
from train.device import set_precision
from train.errors import ConfigError, DeviceError
from train.presets import preset
from train.trainer.capture import WARM_UP_STEPS, Batch, CapturedStep
from train.trainer.loop import Trainer

CPU = torch.device("cpu")
SMALL = {
    "mlp": {"generator_widths": (16, 32), "discriminator_widths": (16,), "batch_size": 8, "epochs": 2},
    "cdcgan": {"generator_widths": (8, 8, 8), "discriminator_widths": (4, 4, 4), "batch_size": 8, "epochs": 2},
    "rpgan": {
        "generator_widths": (8, 8, 8),
        "discriminator_widths": (4, 4, 4),
        "batch_size": 8,
        "epochs": 2,
        "penalty_every": 2,
        "shift": 2,
    },
    "dcgan": {"generator_widths": (8, 8, 8), "discriminator_widths": (4, 4, 4), "batch_size": 8, "epochs": 2},
}


@pytest.fixture(params=["mlp", "dcgan", "cdcgan", "rpgan"])
def trainer_for(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    """Makes trainers of one small preset on the same images."""
    config = preset(request.param).replace(SMALL[request.param])
    low, high = config.pixel_range
    images = torch.rand(44, 1, 28, 28, generator=torch.Generator().manual_seed(5)) * (high - low) + low
    examples = (images, torch.arange(44) % 10) if config.conditional else (images,)

    def make(precision: str = "fp32", recording: Callable[[torch.Generator], ReplayedByHand] | None = None) -> Trainer:
        chosen = config.replace({"precision": precision})
        return Trainer(create_run(tmp_path, chosen, {}), examples, CPU, recording=recording)

    yield make
    set_precision("fp32", CPU)


def train(trainer: Trainer) -> list[list[float]]:
    """The losses of every step of both epochs."""
    losses = []
    for batch in trainer._batches():
        trainer.update.decay(trainer.step / trainer.total_steps)
        losses.append(trainer.take_step(batch).tolist())
        trainer.step += 1
    return losses


def test_a_captured_run_is_the_plain_run_to_the_bit(trainer_for: Callable[..., Trainer]) -> None:
    made: list[ReplayedByHand] = []

    def recording(noise: torch.Generator) -> ReplayedByHand:
        made.append(ReplayedByHand(noise))
        return made[-1]

    plain, captured = trainer_for(), trainer_for(recording=recording)
    assert train(captured) == train(plain)
    for one, other in zip(plain.generator.parameters(), captured.generator.parameters(), strict=True):
        assert torch.equal(one, other)
    # 44 images make five batches of 8 and one of 4 an epoch; the small ones do not go through the graph.
    assert made[0].calls == ["warm up"] * WARM_UP_STEPS + ["record"] + ["replay"] * (10 - WARM_UP_STEPS)
    if captured.config.gradient_penalty:  # every second step, and the sixth of an epoch has the small batch
        assert made[1].calls == ["warm up"] * WARM_UP_STEPS + ["record"] + ["replay"] * (6 - WARM_UP_STEPS)
    assert all(each.noise is captured.update.noise for each in made)


def test_a_run_is_taken_up_as_this_start_has_it_and_not_as_it_was_begun(trainer_for: Callable[..., Trainer]) -> None:
    """Issue: resuming with capture what was begun without crashed at the fourth step: the optimizers had gone back."""
    begun, resumed = trainer_for(), trainer_for()
    train(begun)
    resumed.update.capturable = True  # as with capture on a GPU
    resumed.update.rate = torch.tensor(resumed.config.learning_rate)
    resumed.load_state(begun.state())
    for optimizer in (resumed.update.generator_optimizer, resumed.update.discriminator_optimizer):
        assert optimizer.param_groups[0]["capturable"] is True
        assert optimizer.param_groups[0]["lr"] is resumed.update.rate, "the tensor that a graph reads"
    begun.load_state(resumed.state())
    assert begun.update.generator_optimizer.param_groups[0]["capturable"] is False


def test_the_graph_reads_its_own_copy_of_the_batch() -> None:
    seen: list[Tensor] = []

    def step(real: Batch) -> Tensor:
        seen.extend(real)
        return real[0].sum(dim=0)

    captured = CapturedStep(step, (torch.zeros(3, 2),), ReplayedByHand(torch.Generator()))
    results = [captured((torch.full((3, 2), float(number)),)).tolist() for number in range(WARM_UP_STEPS + 3)]
    assert results == [[3.0 * number] * 2 for number in range(WARM_UP_STEPS + 3)]
    assert len({tensor.data_ptr() for tensor in seen[WARM_UP_STEPS:]}) == 1, "every replay reads the same memory"


def test_bf16_follows_the_losses_of_fp32(trainer_for: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.trainer.step.has_bf16", lambda device: True)
    full, mixed = torch.tensor(train(trainer_for())), torch.tensor(train(trainer_for("bf16")))
    assert not torch.equal(full, mixed)
    assert (full - mixed).abs().max() < 0.05
    assert mixed.isfinite().all()


def test_bf16_is_fp32_on_a_processor_without_it(trainer_for: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.trainer.step.has_bf16", lambda device: False)
    assert train(trainer_for("bf16")) == train(trainer_for())


def test_tf32_is_refused_without_cuda(trainer_for: Callable[..., Trainer]) -> None:
    with pytest.raises(DeviceError, match=r"--precision tf32.*fp32 and bf16"):
        trainer_for("tf32")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision .*fp32, tf32, bf16.*'fp8'"):
        preset("mlp").replace({"precision": "fp8"})
