"""The MLP notebook's own loss table, compared with a run's losses: ``python -m train compare``."""

from __future__ import annotations

from pathlib import Path

from train.checkpoint import Run
from train.errors import CheckpointError
from train.runs import how_to_train, runs_of

# Running means over 500 steps at batch 128 and learning rate 1e-5: step → (generator, discriminator).
NOTEBOOK_MLP_LOSSES = {
    500: (1.3898, 0.4192),
    1000: (1.6771, 0.2984),
    1500: (1.9655, 0.1731),
    2000: (1.7840, 0.1933),
    2500: (1.7590, 0.1902),
    3000: (2.0049, 0.1539),
    3500: (2.4872, 0.1204),
}
GENERATOR_TOLERANCE = 0.10
DISCRIMINATOR_TOLERANCE = 0.15


def comparable_run(runs_dir: Path) -> Run:
    """The newest mlp run, finished or not, that has come as far as the table. Raises CheckpointError without one."""
    for run in runs_of(runs_dir, "mlp"):
        if set(NOTEBOOK_MLP_LOSSES) <= set(run.losses()[:, 0].astype(int).tolist()):
            return run
    raise CheckpointError(
        f"no mlp run in {runs_dir} has come to step {max(NOTEBOOK_MLP_LOSSES)}; train one with: {how_to_train('mlp', runs_dir)}"
    )


def compare_losses(run: Run) -> tuple[str, bool]:
    """The run's log points beside the notebook's as a table, and whether all are within tolerance. Raises CheckpointError."""
    if run.config.architecture != "mlp":
        raise CheckpointError(f"{run.folder} is a {run.config.preset} run; the notebook's table is the mlp's")
    ours = {int(step): (generator, discriminator) for step, generator, discriminator in run.losses()}
    if missing := [step for step in NOTEBOOK_MLP_LOSSES if step not in ours]:
        raise CheckpointError(f"{run.folder} has no log point at step {missing[0]}; the table needs a run of 3,501 steps or more")
    lines = ["  step  generator: ours  notebook      off  discriminator: ours  notebook      off"]
    within = True
    for step, (generator, discriminator) in NOTEBOOK_MLP_LOSSES.items():
        generator_off = ours[step][0] / generator - 1
        discriminator_off = ours[step][1] / discriminator - 1
        fits = abs(generator_off) <= GENERATOR_TOLERANCE and abs(discriminator_off) <= DISCRIMINATOR_TOLERANCE
        within = within and fits
        lines.append(
            f"{step:6d}  {ours[step][0]:15.4f}  {generator:8.4f}  {generator_off:+6.1%}"
            f"  {ours[step][1]:19.4f}  {discriminator:8.4f}  {discriminator_off:+6.1%}{'' if fits else '  outside'}"
        )
    return "\n".join(lines), within
