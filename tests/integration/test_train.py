"""Training runs as a user starts them: in a process of their own, on a small real data set."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from tests.command_lines import in_process
from tests.conftest import SUBSET
from tests.full_disk import files_of_at_most
from train import pictures
from train.checkpoint import create_run, save_checkpoint
from train.cli import main
from train.errors import DivergedError
from train.presets import preset
from train.trainer.loop import Trainer

TIMEOUT_S = 170
SMALL = {
    # Small networks, several epochs, a mark in the middle of an epoch, a partial last batch.
    "mlp": ["--generator-widths=16,32", "--discriminator-widths=32,16", "--batch-size=48", "--epochs=6", "--report-every=4"],
    "dcgan": ["--generator-widths=8,8,8", "--discriminator-widths=4,4,4", "--batch-size=48", "--epochs=6", "--report-every=4"],
    "cdcgan": ["--generator-widths=8,8,8", "--discriminator-widths=4,4,4", "--batch-size=48", "--epochs=6", "--report-every=4"],
    "rpgan": ["--generator-widths=8,8,8", "--discriminator-widths=4,4,4", "--batch-size=48", "--epochs=6", "--report-every=4"],
}


def command(name: str, runs: Path, *flags: str) -> list[str]:
    base = [sys.executable, "-m", "train", name, f"--runs-dir={runs}", f"--data-dir={SUBSET}", "--device=cpu", "--threads=1"]
    return [*base, *flags]


def train(name: str, runs: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(name, runs, *flags), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def train_here(name: str, runs: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """As ``train``, in this process, which has loaded torch."""
    return in_process(main, *command(name, runs, *flags)[3:])


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small preset's whole run; each is trained once, for all tests that look at one."""

    @cache
    def trained(name: str) -> Path:
        runs = tmp_path_factory.mktemp("whole")
        done = train_here(name, runs, *SMALL[name])
        assert done.returncode == 0, done.stderr
        return only_run(runs, name)

    return trained


def only_run(runs: Path, name: str) -> Path:
    (folder,) = (runs / name).iterdir()
    return folder


def final_state(folder: Path) -> dict[str, Any]:
    newest = sorted((folder / "checkpoints").glob("step-*.pt"))[-1]
    state: dict[str, Any] = torch.load(newest, weights_only=True)
    return state


def assert_same(ours: Any, theirs: Any, where: str = "state") -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), f"{where} differs"
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours.keys() - {"seconds"}:  # how long it took is each run's own
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    else:
        assert ours == theirs, where


def test_a_run_leaves_all_that_it_promises(whole_run: Callable[[str], Path]) -> None:
    folder = whole_run("dcgan")
    stored = json.loads((folder / "config.json").read_text())
    assert stored["config"]["generator_widths"] == [8, 8, 8]
    assert set(stored["provenance"]["data"]) == {
        "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
    }  # fmt: skip
    assert len(list((folder / "checkpoints").iterdir())) == 7  # one at the start and one per epoch
    losses = np.load(folder / "losses.npy")
    in_each_epoch = [6 * epoch + batch for epoch in range(6) for batch in (0, 4)]
    assert losses[:, 0].tolist() == [*in_each_epoch, 35], "the first batch of each epoch and every fourth after it, and the last"
    assert np.isfinite(losses).all()
    assert sorted(int(path.stem[5:]) for path in (folder / "pictures").glob("fake-*")) == [*in_each_epoch, 36]
    for picture in ("fake-00000034.png", "real-00000034.png"):
        with Image.open(folder / "pictures" / picture) as grid:
            rows = 8 if picture.startswith("fake") else 6  # the real ones are the batch's own 48
            assert grid.size == (4 * (8 * 30 + 2), 4 * (rows * 30 + 2)), "eight digits a row, each pixel 4 × 4"
    with Image.open(folder / "fakes.gif") as lapse:
        assert lapse.n_frames == len(in_each_epoch) + 1, "a frame a log point, and what came of it"
        assert lapse.info["duration"] == 410, "few frames go slowly, 5 s in all"
    with Image.open(folder / "losses.png") as plot:
        assert plot.size[0] > 500
    activations = np.load(folder / "activations" / "activations.npz")
    assert activations["latents"].shape == (36, 100)
    assert [activations[f"layer{number}"].shape for number in (1, 2, 3, 4)] == [
        (36, 8, 4, 4), (36, 8, 8, 8), (36, 8, 16, 16), (36, 1, 28, 28),
    ]  # fmt: skip
    assert list((folder / "tensorboard").glob("events*"))
    assert json.loads((folder / "result.json").read_text())["step"] == 36


def test_the_average_follows_the_generator_and_the_learning_rate_decays(tmp_path: Path) -> None:
    done = train_here("cdcgan", tmp_path, *SMALL["cdcgan"], "--average-decay=0.9", "--learning-rate-end=0.25")
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path, "cdcgan")
    state = final_state(folder)
    assert state["average"].keys() == state["generator"].keys()
    moved = [name for name, value in state["generator"].items() if not torch.equal(value, state["average"][name])]
    assert {"embedding.weight", "layers.0.weight", "layers.1.running_mean"} <= set(moved)
    for name in ("layers.0.weight", "layers.1.running_mean"):
        lag = (state["generator"][name] - state["average"][name]).abs().mean()
        assert float(lag) < 0.5 * float(state["generator"][name].abs().mean()), "it follows"
    whole = json.loads((folder / "config.json").read_text())["config"]["learning_rate"]
    for optimizer in ("generator_optimizer", "discriminator_optimizer"):
        [group] = state[optimizer]["param_groups"]
        assert group["lr"] == pytest.approx(whole * (1 - 0.75 * 35 / 36)), "at the last of 36 steps"
    with np.load(folder / "activations" / "activations.npz") as activations:
        assert activations["layer4"].shape == (36, 1, 28, 28)


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bits(
    name: str, tmp_path: Path, whole_run: Callable[[str], Path]
) -> None:
    whole, broken = whole_run(name), tmp_path / "broken"
    chance = random.Random(name)
    kills = 0
    flags: list[str] = SMALL[name]
    for _ in range(2):
        process = subprocess.Popen(command(name, broken, *flags), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_for_checkpoint(broken / name, process, newer_than=newest_step(broken / name))
        time.sleep(chance.random() * 0.2)  # the moment of the kill is meant to be arbitrary
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        flags = ["--resume"]
        if (only_run(broken, name) / "result.json").exists():
            break
    assert kills, "the run was over before it could be killed"
    if not (only_run(broken, name) / "result.json").exists():
        done = train(name, broken, "--resume")
        assert done.returncode == 0, done.stderr
    assert_same(final_state(only_run(broken, name)), final_state(whole))
    ours, theirs = (np.load(folder / "losses.npy") for folder in (only_run(broken, name), whole))
    assert ours.tolist() == theirs.tolist()
    assert not list((only_run(broken, name) / "checkpoints").glob(".*"))


def test_a_run_saves_its_last_step_whatever_the_interval(tmp_path: Path) -> None:
    """Issue: with --epochs 1 --checkpoint-every 2 the untrained generator was all that was kept, and exported."""
    done = train_here("mlp", tmp_path, *SMALL["mlp"], "--epochs=3", "--checkpoint-every=2")
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path, "mlp")
    assert final_state(folder)["step"] == json.loads((folder / "result.json").read_text())["step"] == 18


def test_a_log_point_says_whether_the_generators_weights_have_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = {"generator_widths": (8,), "discriminator_widths": (8,), "batch_size": 4, "epochs": 3, "report_every": 2}
    config = preset("mlp").replace(small)
    trainer = Trainer(create_run(tmp_path, config, {}), (torch.rand(12, 1, 28, 28),), torch.device("cpu"))
    honest = trainer.take_step
    still = torch.zeros(2, dtype=torch.float64)
    trainer.take_step = lambda real: honest(real) if trainer.step not in (5, 6) else still
    caplog.set_level("INFO")
    trainer.fit()
    verdicts = [line.rpartition("; ")[2] for line in caplog.messages if "generator loss" in line]
    changed, unchanged = "the generator's weights have changed", "the generator's weights have NOT changed"
    assert verdicts == [changed, changed, unchanged, changed]


def test_a_closed_terminal_saves_and_nohup_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: a closed laptop's ssh ended a run without saving."""
    honest = Trainer.take_step

    def hang_up(self: Trainer, real: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for _ in range(2 * (self.step == 4)):  # from the kernel and from the shell
            os.kill(os.getpid(), signal.SIGHUP)
        return honest(self, real)

    monkeypatch.setattr(Trainer, "take_step", hang_up)
    flags = [*SMALL["mlp"], "--epochs=1"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train_here("mlp", tmp_path / "nohup", *flags).returncode == 0
        signal.signal(signal.SIGHUP, lambda *_: None)  # as by default, less the end of the tests
        done = train_here("mlp", tmp_path / "ssh", *flags)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (done.returncode, "stopped at step 5 of 6 and saved" in done.stderr) == (130, True)


def raises(error: BaseException) -> Callable[..., Any]:
    """Stands for a function that fails."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_advice_to_resume_is_given_where_it_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: Ctrl-C in evaluate said that --resume should be added, and it has none; so did training that had no run yet."""
    for place in ("train.cli._evaluate", "train.run_command.load_mnist"):
        monkeypatch.setattr(place, raises(KeyboardInterrupt()))
    for command in ("evaluate", "mlp"):
        done = in_process(main, command, f"--runs-dir={tmp_path}")
        assert (done.returncode, done.stderr) == (130, "stopped\n")
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "take_step", raises(KeyboardInterrupt()))
    done = train_here("mlp", tmp_path, *SMALL["mlp"])
    assert done.returncode == 130
    assert done.stderr.endswith(
        "\nstopped; what was trained since the last checkpoint is lost; add --resume to the same command to go on\n"
    )
    monkeypatch.undo()
    done = train_here("mlp", tmp_path, *SMALL["mlp"], "--resume")
    assert done.returncode == 0, done.stderr


def test_a_disk_that_fills_while_a_run_is_judged_is_not_to_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.cli._evaluate", raises(OSError(errno.ENOSPC, "No space left on device", "quality.json")))
    done = in_process(main, "evaluate")
    assert (done.returncode, done.stderr) == (2, "error: quality.json: No space left on device; make room\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_saves_and_the_same_command_with_resume_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    """Issue: Ctrl-C saved nothing, and the advice it gave failed."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = [*SMALL["mlp"], "--epochs=30", "--checkpoint-every=30", "--report-every=25"]
    process = subprocess.Popen(command("mlp", broken, *flags), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    wait_for_losses(broken / "mlp", process)
    process.send_signal(number)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, said
    stopped = final_state(only_run(broken, "mlp"))["step"]
    assert 0 < stopped < 180
    assert f"stopped at step {stopped} of 180 and saved; add --resume to the same command" in said
    done = train_here("mlp", broken, *flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert train_here("mlp", whole, *flags).returncode == 0
    assert_same(final_state(only_run(broken, "mlp")), final_state(only_run(whole, "mlp")))


def wait_for_losses(parent: Path, process: subprocess.Popen[str]) -> None:
    """Until the run has drawn its first grid: it trains, and has saved nothing of that."""
    deadline = time.monotonic() + TIMEOUT_S
    while not list(parent.glob("*/pictures/fake-*.png")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("held", [False, True])
def test_it_is_said_once_that_bf16_is_not_to_be_had(held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": held})
    flags = ["--precision=bf16", "--steps=1", f"--runs-dir={tmp_path}", f"--data-dir={SUBSET}", "--device=cpu"]
    done = in_process(main, "mlp", *SMALL["mlp"], *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fp32 is used") == (not held)
    config = json.loads((only_run(tmp_path, "mlp") / "config.json").read_text())
    assert (config["config"]["precision"], config["provenance"]["bf16"]) == ("bf16", held)


def test_resuming_refuses_other_numbers_and_passes_over_runs_that_saved_nothing(tmp_path: Path) -> None:
    """Issue: a run folder without a checkpoint blocked --resume for ever."""
    done = train_here("mlp", tmp_path, *SMALL["mlp"], "--precision=tf32")
    assert (done.returncode, list(tmp_path.iterdir())) == (2, []), "refused before there is a folder"
    create_run(tmp_path, preset("mlp"), {})
    done = train_here("mlp", tmp_path, "--resume")
    assert done.returncode == 2
    assert "no unfinished run of mlp" in done.stderr
    config = preset("mlp").replace({"generator_widths": (16, 32), "epochs": 6})
    save_checkpoint(create_run(tmp_path, config, {}), 0, {"step": 0})
    done = train_here("mlp", tmp_path, "--resume", "--epochs=7")
    assert done.returncode == 2
    assert "--epochs cannot be changed by --resume" in done.stderr
    assert "has 6; start a new run" in done.stderr


def test_a_last_batch_of_one_image_is_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    count = len(np.frombuffer((SUBSET / "train-labels-idx1-ubyte").read_bytes(), np.uint8)) - 8
    done = train_here("mlp", tmp_path, f"--batch-size={count - 1}")
    assert done.returncode == 2
    assert f"--batch-size {count - 1} leaves one image for the last step, and BatchNorm needs two" in done.stderr
    assert not list(tmp_path.iterdir())


def newest_step(parent: Path) -> int:
    return max((int(path.stem.split("-")[1]) for path in parent.glob("*/checkpoints/step-*.pt")), default=-1)


def wait_for_checkpoint(parent: Path, process: subprocess.Popen[bytes], newer_than: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while newest_step(parent) <= newer_than and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    config = preset("mlp").replace({"generator_widths": (8,), "discriminator_widths": (8,), "batch_size": 4, "epochs": 3})
    images = torch.rand(12, 1, 28, 28)
    trainer = Trainer(create_run(tmp_path, config, {}), (images,), torch.device("cpu"))
    honest_step = trainer.take_step

    def poisoned_step(real: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return honest_step(real if trainer.step < 4 else (real[0] * float("nan"),))

    trainer.take_step = poisoned_step
    with pytest.raises(DivergedError, match=r"step 6.*step-00000003\.pt"):
        trainer.fit()
    folder = only_run(tmp_path, "mlp")
    state = final_state(folder)
    assert state["step"] == 3
    assert all(torch.isfinite(value).all() for value in state["generator"].values())
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["vae"], "invalid choice: 'vae'"),
        (["mlp", "--epochs=zero"], "--epochs cannot take 'zero': a whole number is needed"),
        (["mlp", "--batch-size=1"], "batch_size must be from 2 to 131072, got 1"),
        (["mlp", "--device=tpu"], "invalid choice: 'tpu'"),
        (["mlp", "--resume=nowhere"], "nowhere is not a run folder"),
        (["mlp", "--resume", "--epochs=3"], "no unfinished run of mlp"),
        (["mlp", "--seed=17592186044416"], "seed must be from 0 to 17592186044415"),
        (["mlp", "--learning-rat=1"], "unrecognized arguments: --learning-rat=1"),
        (["activations", "--run=nowhere"], "nowhere is not a run folder"),
        (["mlp", "--threads=100000"], "--threads must be from 0 to 4096, got 100000"),
        (["mlp", "--weight-init-std=-1"], "weight_init_std must be from 0 to 10, got -1.0"),
        (["rpgan", "--gradient-penalty=inf"], "gradient_penalty must be from 0 to 1000000, got inf"),
        (["rpgan", f"--data-dir={SUBSET}", "--labels=5"], "the data has label 9, and --labels is 5; it must be 10 at least"),
        (["bench", "--seconds=-1"], "--seconds must be over 0 and at most 3600, got -1"),
        (["mlp", "--data-dir=nowhere/mnist"], "--data-dir nowhere/mnist: there is no nowhere; make it"),
        (["activations", "--sample=36", "--runs-dir=nowhere"], "there is no finished run in nowhere; start one with: make train"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing_behind(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = in_process(main, *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_missing_is_one_line(tmp_path: Path) -> None:
    done = train_here("mlp", tmp_path, "--device=cuda")
    assert done.returncode == 2
    assert "error: --device cuda: PyTorch finds no usable CUDA device here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unwritable_runs_folder_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = train_here("mlp", blocker)
    assert done.returncode == 2
    assert f"error: cannot write a run to {blocker / 'mlp'}" in done.stderr
    assert "--runs-dir" in done.stderr


def evaluate(runs: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    machine = (f"--runs-dir={runs}", f"--data-dir={SUBSET}", "--device=cpu", "--threads=1")
    return in_process(main, "evaluate", *machine, *flags)


def test_evaluating_needs_runs_and_a_judge_worth_the_name(tmp_path: Path, whole_run: Callable[[str], Path]) -> None:
    done = evaluate(tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f'error: there is no finished run in {tmp_path}; start one with: make train PRESET=rpgan ARGS="--runs-dir {tmp_path}"\n'
    )
    shutil.copytree(whole_run("dcgan"), tmp_path / "dcgan" / "one")
    done = evaluate(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("skipped: no finished run of") == 3
    assert "judging takes about 1 min here: it trains the judge and the second judge\n" in done.stderr
    assert re.search(r"% of the test images, and 73\.44% are needed.*--no-judge", done.stderr.strip().splitlines()[-1])
    folder = only_run(tmp_path, "dcgan")
    assert not (folder / "quality.json").exists()
    (folder / "quality.json").write_text("{}")
    done = evaluate(tmp_path, "--missing")
    assert (done.returncode, done.stdout) == (0, ""), "it has been judged"


def test_a_run_may_end_within_an_epoch_and_says_which_epoch_it_is_in(tmp_path: Path) -> None:
    done = train_here("mlp", tmp_path, *SMALL["mlp"], "--steps=8", "--checkpoint-every=100")
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path, "mlp")
    assert final_state(folder)["step"] == json.loads((folder / "result.json").read_text())["step"] == 8
    assert "epoch 1 of 6" in done.stderr
    assert "epoch 2 of 6" in done.stderr
    assert "epoch 3 of 6" not in done.stderr


def test_the_first_picture_is_of_the_untrained_generator(tmp_path: Path) -> None:
    small = {"generator_widths": (4, 4, 4), "discriminator_widths": (4, 4, 4), "batch_size": 4, "epochs": 1, "grid_images": 8}
    config = preset("dcgan").replace(small)
    trainer = Trainer(create_run(tmp_path, config, {}), (torch.rand(12, 1, 28, 28) * 2 - 1,), torch.device("cpu"))
    untrained = copy.deepcopy(trainer.generator).eval()
    trainer.fit()
    with torch.no_grad():
        pictures.save_grid((untrained(*trainer.grid_inputs) + 1) / 2, 8, tmp_path / "expected.png")
    assert (trainer.run.pictures / "fake-00000000.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert trainer.log_points.points[0][0] == 0


def test_what_a_resumed_run_reports_again_is_purged_from_the_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch number ``step`` is reported before the step is counted: a run that was killed after that reports it again."""
    purged: list[int] = []
    honest = SummaryWriter.__init__

    def noted(self: SummaryWriter, folder: str, purge_step: int) -> None:
        purged.append(purge_step)
        honest(self, folder, purge_step=purge_step)

    monkeypatch.setattr(SummaryWriter, "__init__", noted)
    small = {"generator_widths": (8,), "discriminator_widths": (8,), "batch_size": 4, "epochs": 2}
    config = preset("mlp").replace(small)
    trainer = Trainer(create_run(tmp_path, config, {}), (torch.rand(12, 1, 28, 28),), torch.device("cpu"))
    trainer.step = 3
    trainer.fit()
    assert purged == [3]


def test_activations_are_drawn_of_every_preset(tmp_path: Path, whole_run: Callable[[str], Path]) -> None:
    for name in ("mlp", "dcgan"):
        shutil.copytree(whole_run(name), tmp_path / name / "one", ignore=shutil.ignore_patterns("activations"))
    done = in_process(main, "activations", "--sample=3", f"--runs-dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "mlp" / "one" / "activations" / "activations.npz") as activations:
        assert [activations[f"layer{number}"].shape for number in (1, 2, 3)] == [(36, 16), (36, 32), (36, 784)]
        strongest = int(activations["layer2"][3].argmax())
    with Image.open(tmp_path / "mlp" / "one" / "activations" / "sample-03-layer2.png") as units:
        assert units.size == (8 * 10 + 2, 4 * 10 + 2), "32 units, eight in a row"
        assert units.getpixel((2 + strongest % 8 * 10, 2 + strongest // 8 * 10)) == 255
    assert (tmp_path / "dcgan" / "one" / "activations" / "sample-03-image.png").exists()


def test_the_losses_are_on_disk_between_two_checkpoints(tmp_path: Path) -> None:
    small = {"generator_widths": (8,), "discriminator_widths": (8,), "batch_size": 4, "epochs": 9}
    config = preset("mlp").replace({**small, "report_every": 2, "checkpoint_every": 9})
    trainer = Trainer(create_run(tmp_path, config, {}), (torch.rand(12, 1, 28, 28),), torch.device("cpu"))
    honest = trainer.take_step
    seen: dict[int, int] = {}

    def step(real: tuple[torch.Tensor, ...]) -> torch.Tensor:
        losses = trainer.run.folder / "losses.npy"
        seen[trainer.step] = len(np.load(losses)) if losses.exists() else 0
        return honest(real)

    trainer.take_step = step
    trainer.fit()
    assert [seen[number] for number in (2, 3, 4, 5, 9)] == [0, 1, 1, 2, 4]
    assert (trainer.run.folder / "losses.png").exists()


@pytest.mark.parametrize("kept", [0, 1])
def test_a_full_disk_is_one_line_and_keeps_what_was_saved(kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing was saved: the advice said to resume what could not be."""
    honest, saved = torch.save, []

    def save(state: object, stream: Any) -> None:
        if len(saved) == kept:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(True)
        honest(state, stream)

    monkeypatch.setattr(torch, "save", save)
    done = train_here("mlp", tmp_path, *SMALL["mlp"])
    assert done.returncode == 2
    full, _, advice = done.stderr.strip().splitlines()[-1].partition(": make room, and add ")
    assert full == "error: No space left on device; what was saved before is kept"
    folder = only_run(tmp_path, "mlp")
    assert len(list((folder / "checkpoints").iterdir())) == kept
    monkeypatch.undo()
    done = train_here("mlp", tmp_path, *SMALL["mlp"], advice.removesuffix(" to the same command"))
    assert done.returncode == 0, done.stderr
    assert (folder / "result.json").exists() == bool(kept)


@pytest.mark.parametrize("size", [1, 5_000, 399_000])
def test_a_checkpoint_that_does_not_fit_is_an_error_of_the_disks(size: int, tmp_path: Path) -> None:
    run = create_run(tmp_path, preset("mlp"), {"data": {}})
    with files_of_at_most(size), pytest.raises(OSError, match="File too large"):
        save_checkpoint(run, 1, {"weights": torch.zeros(100_000)})
    assert not list((run.folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"config": {}, "provenance": []}', '{"config": 3, "provenance": {"data": {}}}', "[" * 99_999]
)
def test_a_damaged_config_is_one_line(content: str, tmp_path: Path) -> None:
    run = create_run(tmp_path, preset("mlp"), {"data": {}})
    (run.folder / "config.json").write_text(content)
    done = train_here("mlp", tmp_path, f"--resume={run.folder}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_choices_are_in_the_help() -> None:
    said = in_process(main, "mlp", "--help").stdout
    assert "--precision {fp32,tf32,bf16}" in said
    assert "--discriminator-loss {mean,sum,relativistic}" in said
