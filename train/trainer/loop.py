"""The training loop: batches, log points, checkpoints, resuming. Knows no command line; ``train.checkpoint`` writes the files.

A resumed run ends with the same bits because the order of the images is a pure function of (seed, epoch), every
other random draw comes from one generator whose state is in the checkpoint, and the sums since the last log point are too.
Bit equality is guaranteed on the CPU with an equal thread count, not on CUDA, where some kernels are not deterministic.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm.contrib.logging import logging_redirect_tqdm

from train.checkpoint import PROGRESS_FILE, RESULT_FILE, Run, save_checkpoint, write_json
from train.device import set_precision
from train.errors import DivergedError, StoppedError
from train.models import build_discriminator, build_generator
from train.pictures import grid_array, save_grid, save_time_lapse
from train.progress import progress_bar
from train.trainer.board import events_of
from train.trainer.capture import Batch, Recording
from train.trainer.log_points import LogPoints
from train.trainer.parallel import Ranks
from train.trainer.step import Step

log = logging.getLogger(__name__)

ALONE = Ranks()
PROGRESS_EVERY = 25  # steps between two looks at the losses: each look waits for the device


class Trainer:
    """Both networks, the average and the position in the run.

    ``examples`` are all images float32 (n, 1, 28, 28), and for a conditional preset their labels int64 (n,), on ``device``.
    ``ranks`` is this process among those that train together; ``recording`` captures the step as a CUDA graph.
    """

    def __init__(
        self,
        run: Run,
        examples: Batch,
        device: torch.device,
        ranks: Ranks = ALONE,
        recording: Callable[[torch.Generator], Recording] | None = None,
    ) -> None:
        config = run.config
        self.run = run
        self.config = config
        self.examples = examples
        self.images = examples[0]
        self.device = device
        self.ranks = ranks
        set_precision(config.precision, device)
        torch.manual_seed(config.seed)
        self.generator = self._prepared(build_generator(config))
        self.discriminator = self._prepared(build_discriminator(config))
        self.average = self._prepared(build_generator(config)) if config.average_decay else None
        if self.average is not None:
            self.average.load_state_dict(self.generator.state_dict())
            # Looked up once: loading a state copies into these same tensors.
            self.averages, self.followed = _floats(self.average), _floats(self.generator)
        example = tuple(part[: config.batch_size] for part in examples)
        self.update = Step(config, self.generator, self.discriminator, example, ranks=ranks, recording=recording)
        self.grid_inputs = self._fixed_inputs(config.grid_images)
        self.step = 0
        self.seconds = 0.0  # of training, up to the last save or the end, all starts together
        self._timed_at = time.monotonic()
        self.stop_wanted = False  # set by a signal: save after the step that is under way, and stop
        self.log_points = LogPoints(run, device)
        self._logged_weights = self._weights()  # as they were at the last log point

    @property
    def steps_per_epoch(self) -> int:
        return self.config.steps_per_epoch(len(self.images), self.ranks.world)

    @property
    def total_steps(self) -> int:
        return self.config.total_steps(len(self.images), self.ranks.world)

    def fit(self) -> None:
        """Train to the last epoch. Raises DivergedError, and the last good checkpoint stands untouched; or StoppedError."""
        if self.step == 0:
            self._save()
        self._timed_at = time.monotonic()
        first_step, seconds_before = self.step, self.seconds
        quiet = not self.ranks.first
        with (
            nullcontext() if quiet else events_of(self.run.folder / "tensorboard", self.step) as board,
            progress_bar(self.total_steps, self.config.preset, initial=self.step, disable=quiet) as bar,
            logging_redirect_tqdm(),  # or lines of the log would tear the bar
        ):
            for batch in self._batches():
                self._announce_epoch(bar, self.step == first_step)
                log_point = self._is_log_point()
                if log_point and board is not None:
                    self._draw(board, batch[0])
                self.update.decay(self.step / self.total_steps)
                latest = self.ranks.mean(self.take_step(batch))
                self._average()
                self.log_points.count(latest)
                if log_point:
                    self._log(board)
                self.step += 1
                bar.update()
                if self.step % PROGRESS_EVERY == 0:
                    generator, discriminator = latest.tolist()
                    bar.set_postfix(refresh=False, G=f"{generator:.3f}", D=f"{discriminator:.3f}")
                last, due = self.step == self.total_steps, self.step % (self.steps_per_epoch * self.config.checkpoint_every) == 0
                stopping = self._stop_agreed()
                if due or last or stopping:
                    self._save()
                if last:
                    break  # with --steps, within an epoch
                if stopping:
                    raise StoppedError(f"stopped at step {self.step} of {self.total_steps} and saved")
            if board is not None:
                self._draw(board)  # what came of it
        self._finish(first_step, seconds_before)

    def _stop_agreed(self) -> bool:
        """Whether to stop after this step; several processes look every few steps whether any of them is to."""
        if self.ranks.world == 1:
            return self.stop_wanted
        return self.step % PROGRESS_EVERY == 0 and self.ranks.any(self.stop_wanted, self.device)

    def _announce_epoch(self, bar: Any, first: bool) -> None:
        """Say at its first step which epoch begins."""
        epoch, step = divmod(self.step, self.steps_per_epoch)
        if step == 0 or first:
            bar.set_description(f"{self.config.preset}, epoch {epoch + 1} of {self.config.epochs}", refresh=False)
        if step == 0 and self.ranks.first:
            log.info("epoch %d of %d", epoch + 1, self.config.epochs)

    def take_step(self, real: Batch) -> Tensor:
        """One step of both networks on ``real``. Returns float64 (2,): generator, discriminator loss."""
        return self.update(real, self.step)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain numbers."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            **({"average": self.average.state_dict()} if self.average is not None else {}),
            **self.update.state(),
            **self.log_points.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, as read from a checkpoint of the same config."""
        self.step = state["step"]
        self.seconds = state.get("seconds", 0.0)  # checkpoints of before 2026-11 do not have it
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.update.load_state(state)
        self.log_points.load(state)
        self._logged_weights = self._weights()

    @torch.no_grad()
    def _average(self) -> None:
        """Let the average follow the generator, weights and BatchNorm's statistics alike, after ``step`` steps."""
        if self.average is None:
            return
        # The first steps count for less, or the average would hold on to the initial weights for thousands of steps.
        decay = min(self.config.average_decay, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(self.averages, self.followed, None)

    def _batches(self) -> Iterator[Batch]:
        first_epoch, skip = divmod(self.step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.config.epochs):
            order_generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.images), generator=order_generator).to(self.device)
            whole_batches = order.split(self.config.batch_size * self.ranks.world)[: self.steps_per_epoch]
            for indices in whole_batches[skip:]:
                mine = self.ranks.mine(indices)
                yield tuple(part[mine] for part in self.examples)
            skip = 0

    def _prepared(self, network: nn.Module) -> nn.Module:
        # channels_last suits the convolutions (a sixth faster on the CPU) and leaves matrices as they are.
        network = network.to(self.device).to(memory_format=torch.channels_last)
        return self.ranks.sync_batch_norm(network, self.device)

    def _fixed_inputs(self, count: int) -> Batch:  # (count, z) and labels in turn, the same in every picture of the run
        generator = torch.Generator().manual_seed(self.config.seed)
        inputs = [torch.randn(count, self.config.latent_size, generator=generator)]
        if self.config.labels:
            inputs.append(torch.arange(count) % self.config.labels)
        return tuple(part.to(self.device) for part in inputs)

    def _is_log_point(self) -> bool:
        """Whether the batch that comes next, number ``step`` counted from 0, is one of those that are reported."""
        if self.config.report_per == "epoch":
            return self.step % self.steps_per_epoch % self.config.report_every == 0
        return self.step > 0 and self.step % self.config.report_every == 0

    def _log(self, board: SummaryWriter | None) -> None:
        """Make batch number ``step`` a log point."""
        self._check_finite()
        _, generator, discriminator = self.log_points.add(self.step)
        if board is None:
            return
        weights = self._weights()
        same = all(torch.equal(now, before) for now, before in zip(weights, self._logged_weights, strict=True))
        self._logged_weights = weights
        verdict = "NOT changed" if same else "changed"  # the test that the MLP's notebook makes as it trains
        losses = (self.step, generator, discriminator, verdict)
        log.info("step %d: generator loss %.8f, discriminator loss %.8f; the generator's weights have %s", *losses)
        self.log_points.write()
        board.add_scalar("loss/generator", generator, self.step)
        board.add_scalar("loss/discriminator", discriminator, self.step)

    def _weights(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.generator.parameters()]

    def _draw(self, board: SummaryWriter, real: Tensor | None = None) -> None:
        """Save grids of fakes, as the generator is after ``step`` steps, and of the ``real`` images of the next one."""
        shown = self.average or self.generator
        shown.eval()  # as exported: running statistics, and the picture leaves no trace in them
        with torch.no_grad():
            fakes = self._to_unit(shown(*self.grid_inputs))
        shown.train()
        save_grid(fakes, self.config.grid_columns, self.run.pictures / f"fake-{self.step:08d}.png")
        if real is not None:
            reals = self._to_unit(real[: self.config.grid_images])
            save_grid(reals, self.config.grid_columns, self.run.pictures / f"real-{self.step:08d}.png")
        board.add_image("fakes", grid_array(fakes, self.config.grid_columns), self.step, dataformats="HW")

    def _save(self) -> None:
        self._check_finite()
        if not self.ranks.first:
            return
        self._count_time()
        save_checkpoint(self.run, self.step, self.state())
        progress = {"step": self.step, "steps": self.total_steps, "seconds": round(self.seconds, 1)}
        write_json(self.run.folder / PROGRESS_FILE, progress)
        self.log_points.write(plot=True)

    def _count_time(self) -> None:
        now = time.monotonic()
        self.seconds, self._timed_at = self.seconds + now - self._timed_at, now

    def _check_finite(self) -> None:
        tensors = [self.log_points.sums, *self.generator.parameters(), *self.discriminator.parameters()]
        if all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return
        kept = [path.name for path in self.run.checkpoints()][-1:]
        raise DivergedError(
            f"a loss or weight is not finite at or before step {self.step}; the last good checkpoint "
            f"({kept[0] if kept else 'none'}) is kept in {self.run.folder}: try a lower --learning-rate"
        )

    def _to_unit(self, images: Tensor) -> Tensor:
        low, high = self.config.pixel_range
        return (images - low) / (high - low)

    def _finish(self, first_step: int, seconds_before: float) -> None:
        """Write what came of the run; the two are its step and ``seconds`` as this start found them."""
        if not self.ranks.first:
            return
        self._count_time()  # the last save took some as well
        closing = self.log_points.closing(self.step)
        for step, generator, discriminator in closing:
            log.info("step %d, the last: generator loss %.8f, discriminator loss %.8f", step, generator, discriminator)
        self.log_points.write(plot=True, closing=closing)
        save_time_lapse(self.run.grids(), self.run.folder / "fakes.gif")
        points = [*self.log_points.points, *closing]
        result = {
            "step": self.step,
            "generator_loss": points[-1][1] if points else None,
            "discriminator_loss": points[-1][2] if points else None,
            "seconds": round(self.seconds, 1),
            "seconds_since_last_start": round(self.seconds - seconds_before, 1),
            "steps_since_last_start": self.step - first_step,
        }
        write_json(self.run.folder / RESULT_FILE, result)


def _floats(network: nn.Module) -> list[Tensor]:
    """Weights and BatchNorm's statistics, without its counters."""
    return [value for value in network.state_dict().values() if value.is_floating_point()]
