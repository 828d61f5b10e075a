"""Two processes by torchrun on the CPU: the losses are those of one process with twice the batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.command_lines import in_process
from tests.waiting import wait_until
from train.cli import main

SMALL = {
    "mlp": ["--generator-widths=32,64", "--discriminator-widths=32,16", "--learning-rate=1e-3"],
    "dcgan": ["--generator-widths=8,8,8", "--discriminator-widths=4,4,4", "--norm-init-std=none", "--weight-init-std=none"],
}
SMALL["cdcgan"] = [*SMALL["dcgan"], "--precision=fp32"]
SMALL["rpgan"] = [*SMALL["dcgan"], "--precision=fp32", "--penalty-every=3"]


def train(processes: int, preset: str, data: Path, runs: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone", "-m"]
    command = [*(torchrun if processes > 1 else [sys.executable, "-m"]), "train", preset, *SMALL[preset]]
    machine = [f"--data-dir={data}", f"--runs-dir={runs}", "--device=cpu", "--threads=1", "--seed=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *machine, *flags], capture_output=True, text=True, timeout=150, check=False, env=environment)


def outcome(runs: Path, preset: str) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """The one run's losses at its marks and the last checkpoint's generator."""
    [run] = (runs / preset).iterdir()
    newest = max((run / "checkpoints").glob("step-*.pt"))
    return np.load(run / "losses.npy"), torch.load(newest, weights_only=True)["generator"]


@pytest.mark.long
@pytest.mark.parametrize("preset", SMALL)
def test_two_processes_train_as_one_with_twice_the_batch(preset: str, subset: Path, tmp_path: Path) -> None:
    common = ("--epochs=4", "--report-every=4", "--report-per=run", "--reported-loss=mean", "--checkpoint-every=4")
    two = train(2, preset, subset, tmp_path / "two", "--batch-size=16", *common)
    assert two.returncode == 0, two.stderr
    one = train(1, preset, subset, tmp_path / "one", "--batch-size=32", *common)
    assert one.returncode == 0, one.stderr
    (losses, weights), (expected, expected_weights) = outcome(tmp_path / "two", preset), outcome(tmp_path / "one", preset)
    assert losses.shape == expected.shape == (8, 3)
    assert np.array_equal(losses[:, 0], expected[:, 0])
    assert np.abs(losses[:, 1:] - expected[:, 1:]).max() < 2e-3
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor.float(), expected_weights[name].float(), atol=5e-3), name
    assert two.stdout.count("finished: ") == 1, "one of them writes"


@pytest.mark.long
def test_sigterm_saves_a_run_of_two_and_the_next_two_resume_it(subset: Path, tmp_path: Path) -> None:
    """As an evicted pod gets it: torchrun passes it on to both, which must stop at the same step."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "train", "mlp"]
    machine = [f"--data-dir={subset}", f"--runs-dir={tmp_path}", "--device=cpu", "--threads=1", *SMALL["mlp"]]
    long = [*torchrun, *machine, "--batch-size=16", "--epochs=4000", "--checkpoint-every=4000", "--report-every=5"]
    with subprocess.Popen(long, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        wait_until(lambda: list(tmp_path.glob("mlp/*/pictures/fake-*.png")))
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    [run] = (tmp_path / "mlp").iterdir()
    stopped = int(max((run / "checkpoints").glob("step-*.pt")).stem.removeprefix("step-"))
    assert stopped > 0, said
    assert stopped % 25 == 0, "a step that both have looked at"
    assert f"stopped at step {stopped} of" in said
    again = [*torchrun, *machine, f"--resume={run}"]
    with subprocess.Popen(again, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        started = next(line for line in process.stderr if "from step" in line)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert f"from step {stopped}" in started


@pytest.mark.long
def test_a_run_of_two_is_resumed_by_two_and_by_no_other_number(subset: Path, tmp_path: Path) -> None:
    flags = ("--batch-size=16", "--report-every=4", "--epochs=3")
    assert train(2, "mlp", subset, tmp_path / "whole", *flags).returncode == 0
    assert train(2, "mlp", subset, tmp_path / "cut", *flags).returncode == 0
    [run] = (tmp_path / "cut" / "mlp").iterdir()
    (run / "result.json").unlink()
    sorted((run / "checkpoints").glob("step-*.pt"))[-1].unlink()  # as if it had been killed in the last epoch
    machine = [f"--data-dir={subset}", "--device=cpu", "--threads=1", f"--resume={run}"]
    alone = subprocess.run(
        [sys.executable, "-m", "train", "mlp", *machine], capture_output=True, text=True, timeout=100, check=False
    )
    assert alone.returncode == 2
    assert "was trained by 2 processes, and these are 1; start as many" in alone.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "train", "mlp"]
    again = subprocess.run([*torchrun, *machine], capture_output=True, text=True, timeout=150, check=False)
    assert again.returncode == 0, again.stderr
    whole, resumed = outcome(tmp_path / "whole", "mlp"), outcome(tmp_path / "cut", "mlp")
    assert np.allclose(whole[0], resumed[0], atol=1e-6)
    assert whole[1].keys() == resumed[1].keys()
    for name, tensor in whole[1].items():
        assert torch.allclose(tensor.float(), resumed[1][name].float(), atol=1e-6), name


def test_capture_with_several_processes_or_without_cuda_is_refused(subset: Path, tmp_path: Path) -> None:
    done = in_process(
        main, "mlp", *SMALL["mlp"], f"--data-dir={subset}", f"--runs-dir={tmp_path}", "--device=cpu", "--capture=on"
    )
    assert done.returncode == 2
    assert "--capture on takes one process and CUDA; leave it at auto" in done.stderr
