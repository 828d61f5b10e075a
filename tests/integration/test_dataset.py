"""A data set comes out the same however the work was split and interrupted, and others can read it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import MNIST

from serve.client import DigitClient
from serve.dataset import shards as shard_writing
from serve.dataset.command import main
from serve.dataset.filter import Judge, filtered_digits
from serve.dataset.header import Dataset, agree, read_header, write_header
from serve.engine.cuda_engine import CudaEngine
from serve.engine.provider import EngineOptions
from serve.errors import GoldenError, SettingsError
from serve.files import locked, replacing
from serve.manifest import BUNDLED_DIR, Manifest
from tests.command_lines import in_process
from tests.full_disk import files_of_at_most
from tests.host_device import HostDevice
from tests.server_process import ServerProcess
from tests.waiting import wait_until
from train.data.mnist import load_mnist

COUNT = 3001
BASE = ["write", "--model=mlp", "--provider=cpu", "--seed=7", "--start=100", f"--count={COUNT}"]


def write(out: Path, shards: int, shard: int) -> None:
    assert main([*BASE, f"--out={out}", f"--shards={shards}", f"--shard={shard}"]) == 0


def whole(folder: Path) -> bytes:
    return b"".join(part.read_bytes() for part in sorted(folder.glob("part-*")))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    write(folder, 1, 0)
    return folder


@pytest.mark.parametrize("shards", [2, 7, pytest.param(64, marks=pytest.mark.long)])
def test_shards_joined_are_the_uninterrupted_run(shards: int, uninterrupted: Path, tmp_path: Path) -> None:
    for shard in reversed(range(shards)):
        write(tmp_path, shards, shard)
    assert whole(tmp_path) == whole(uninterrupted)
    assert len(whole(tmp_path)) == COUNT * 784


def test_its_digits_are_the_servers_at_the_same_addresses(uninterrupted: Path, shared_server: ServerProcess) -> None:
    with DigitClient(shared_server.target) as client:
        served = client.generate(50, model="mlp", seed=7, start=100).pixels.astype(int)
    written = np.frombuffer(whole(uninterrupted), np.uint8).reshape(-1, 28, 28)[:50]
    assert np.abs(served - written).max() <= 1


def test_a_shard_that_is_killed_is_not_there_and_repeats_its_bytes(tmp_path: Path) -> None:
    flags = ["write", "--model=dcgan", "--provider=cpu", "--count=8000", "--shards=2", "--shard=1", f"--out={tmp_path}"]
    command = [sys.executable, "-m", "serve.dataset", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob(".part-*")))
        process.kill()
    assert not list(tmp_path.glob("part-*"))
    assert main(flags) == 0
    assert not list(tmp_path.glob(".part-*")), "nor what it had written"
    [part] = tmp_path.glob("part-*")
    again = tmp_path / "again"
    assert main([*flags[:-1], f"--out={again}"]) == 0
    assert part.read_bytes() == (again / part.name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_shard_that_a_signal_ends_leaves_nothing_half_written(number: signal.Signals, tmp_path: Path) -> None:
    """As process 1 of a container too, where a signal without a handler is dropped."""
    flags = ["write", "--model=dcgan", "--provider=cpu", "--count=80000", f"--out={tmp_path}"]
    # A test run in a shell's background would hand on that Ctrl-C is ignored.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "serve.dataset", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: any(path.stat().st_size for path in tmp_path.glob(".part-*")))
        process.send_signal(number)
        assert b"Traceback" not in process.communicate()[1]
    assert process.returncode == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_writing_says_how_far_it_has_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writing, "PROGRESS_EVERY_S", 0.0)
    assert main(["write", "--provider=cpu", "--count=3000", f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(", about")[0] for line in said] == ["1,024 of 3,000 digits", "2,048 of 3,000 digits"]
    assert all(line.endswith(" s left") for line in said)


def test_torchvision_reads_the_idx_files_and_numpy_the_npz(uninterrupted: Path) -> None:
    pixels = np.frombuffer(whole(uninterrupted), np.uint8).reshape(-1, 28, 28)
    assert main(["join", f"--out={uninterrupted}"]) == 0
    train = MNIST(uninterrupted, train=True)
    assert np.array_equal(train.data.numpy(), pixels), "no digit is a test digit unless that is wanted"
    assert main(["join", f"--out={uninterrupted}", "--test-share=0.25"]) == 0
    train, test = MNIST(uninterrupted, train=True), MNIST(uninterrupted, train=False)
    assert len(test) == COUNT // 4
    assert np.array_equal(np.concatenate([train.data.numpy(), test.data.numpy()]), pixels)
    assert set(train.targets.tolist()) == {255}
    assert main(["join", "--format=npz", f"--out={uninterrupted}"]) == 0
    with np.load(uninterrupted / "digits.npz") as archive:
        assert np.array_equal(archive["images"], pixels)
        assert set(archive["labels"].tolist()) == {255}, "an unconditional model's digits are nobody's"
    assert main(["join", "--format=keras", "--test-share=0.25", f"--out={uninterrupted}"]) == 0
    with np.load(uninterrupted / "mnist.npz") as archive:
        assert sorted(archive) == ["x_test", "x_train", "y_test", "y_train"]
        assert np.array_equal(archive["x_train"], train.data.numpy())
        assert np.array_equal(archive["x_test"], test.data.numpy())
        assert (archive["y_train"].tolist(), archive["y_test"].tolist()) == (train.targets.tolist(), test.targets.tolist())


@pytest.mark.parametrize("count", [1, 6, 20])
def test_training_takes_what_was_joined_whatever_its_size(count: int, tmp_path: Path) -> None:
    """By the digests that lie beside the files."""
    flags = ["--model=cdcgan", "--provider=cpu", f"--count={count}", "--labels", "3", "9"]
    assert main(["write", *flags, f"--out={tmp_path}"]) == 0
    assert main(["join", f"--out={tmp_path}"]) == 0
    data = load_mnist(tmp_path / "MNIST" / "raw")
    assert (data.train_labels.tolist(), len(data.test_images)) == ([3, 9] * (count // 2) or [3], 0)
    assert len(MNIST(tmp_path, train=True)) == count
    assert main(["join", "--format=keras", f"--out={tmp_path}"]) == 0
    with np.load(tmp_path / "mnist.npz") as archive:
        assert (archive["x_train"].shape, archive["x_test"].shape) == ((count, 28, 28), (0, 28, 28))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--test-share=0.01"], "--test-share 0.01 makes 0 test digits of 20"),
        (["--test-share=1"], "--test-share 1 makes 20 test digits of 20"),
        (["--test-share=1.5"], "--test-share: must be from 0.0 to 1.0, got 1.5"),
        (["--test-share=0.5", "--format=npz"], "--test-share is not for npz"),
    ],
)
def test_a_test_share_that_leaves_a_part_empty_is_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["write", "--model=mlp", "--provider=cpu", "--count=20", f"--out={tmp_path}"]) == 0
    before, _ = set(tmp_path.rglob("*")), capsys.readouterr()
    done = in_process(main, "join", f"--out={tmp_path}", *flags)
    assert (done.returncode, done.stderr.count("\n"), message in done.stderr) == (2, 1, True), done.stderr
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("labels", [(), (3, 1, 4)])
def test_a_conditional_models_labels_are_the_tapes_or_those_in_turn(
    labels: tuple[int, ...], tmp_path: Path, shared_server: ServerProcess
) -> None:
    given = ["--labels", *map(str, labels)] if labels else []
    for shard in (0, 1):
        flags = ["--model=cdcgan", "--provider=cpu", "--seed=7", "--start=100", "--count=140", "--shards=2", f"--shard={shard}"]
        assert main(["write", *flags, f"--out={tmp_path}", *given]) == 0
    assert main(["join", f"--out={tmp_path}", "--test-share=0.15"]) == 0
    train, test = MNIST(tmp_path, train=True), MNIST(tmp_path, train=False)
    assert (len(train), len(test)) == (119, 21)
    with DigitClient(shared_server.target) as client:
        parts = list(client.stream(140, seed=7, start=100, labels=labels, model="cdcgan"))
    pixels, expected = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pixels", "labels"))
    assert np.array_equal(np.concatenate([train.targets.numpy(), test.targets.numpy()]), expected)
    assert np.abs(np.concatenate([train.data.numpy(), test.data.numpy()]).astype(int) - pixels).max() <= 1
    assert main(["join", "--format=npz", f"--out={tmp_path}"]) == 0
    with np.load(tmp_path / "digits.npz") as archive:
        assert np.array_equal(archive["labels"], expected)


def test_a_finished_shard_is_kept_and_the_index_comes_from_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    flags = [*BASE, f"--out={tmp_path}", "--shards=4"]
    assert main(flags) == 0
    part = tmp_path / "part-00002-of-00004.pixels"
    before = part.stat().st_mtime_ns
    assert main(flags) == 0
    assert part.stat().st_mtime_ns == before
    assert "digits by mlp/1" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--count=0", "--seed=-1", "--shards=0", "--shard=-1", "--threads=257", f"--start={1 << 63}"])
def test_a_number_out_of_bounds_is_refused_by_its_flag(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*BASE, f"--out={tmp_path / 'set'}", flag])
    said = capsys.readouterr().err
    assert said.startswith(f"error: argument {flag.partition('=')[0]}: must be from")
    assert said.count("\n") == 1
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed=8"], "seed 7, not 8; name another --out"),
        (["--shards=3"], "shards 2, not 3"),
        (["--shard=2"], "--shard must be from 0 to 1, got 2"),
        (["--model=vae"], "has no model 'vae'"),
        (["--version=9"], "cannot be read"),
        (["--labels", "3"], "--labels 3: model mlp/1 is unconditional"),
        (["--labels", "3", "10", "--model=cdcgan"], "--labels 10: model cdcgan/1 has 0 to 9"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 2, 0)
    assert "255" in capsys.readouterr().err
    assert main([*BASE, f"--out={tmp_path}", "--shards=2", "--shard=1", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_joining_names_the_shard_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join", f"--out={tmp_path}"]) == 2
    assert "dataset.json" in capsys.readouterr().err
    write(tmp_path, 2, 1)
    assert main(["join", f"--out={tmp_path}"]) == 2
    assert re.search(r"part-00000-of-00002\.pixels .*--shard 0\b", capsys.readouterr().err)


@pytest.mark.parametrize(("file_format", "left"), [("idx", 3_000), ("idx", 60_000), ("npz", 60_000)])
def test_joining_on_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    file_format: str, left: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["write", "--model=mlp", "--provider=cpu", "--count=100", f"--out={tmp_path}"]) == 0
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    with files_of_at_most(left):
        assert main(["join", f"--format={file_format}", f"--out={tmp_path}"]) == 2
    assert re.fullmatch(rf"error: {tmp_path}.*: File too large; .*--out\n", capsys.readouterr().err)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_shard_on_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with files_of_at_most(3_000):
        assert main(["write", "--model=mlp", "--provider=cpu", "--count=100", f"--out={tmp_path}"]) == 2
    assert re.fullmatch(rf"error: {tmp_path}: File too large; .*--out\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_processes_of_the_same_number_do_not_write_into_each_others_files(tmp_path: Path) -> None:
    """Containers that share a volume have the number 1 each; here one process stands for both."""
    path = tmp_path / "part"
    with replacing([path]) as (one,), replacing([path]) as (other,):
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() == b"one", "the last to end"
    assert list(tmp_path.iterdir()) == [path]


def test_of_shards_that_begin_at_once_the_first_says_what_the_data_set_is(tmp_path: Path) -> None:
    about = {"model": "mlp", "version": 1, "digest": "ab", "start": 0, "height": 28, "width": 28, "latent_size": 64, "classes": 0}
    first, second = (Dataset(**about, count=10, shards=2, seed=seed) for seed in (1, 2))
    with ThreadPoolExecutor() as pool:
        with locked(tmp_path):
            agreeing = pool.submit(agree, tmp_path, second)
            time.sleep(0.2)
            write_header(tmp_path, first)
        with pytest.raises(SettingsError, match=r"seed 1\b.* 2\b"):
            agreeing.result()
    assert read_header(tmp_path).seed == 1


def test_shards_cover_the_tape_without_gap_or_overlap() -> None:
    values = {"model": "m", "version": 1, "digest": "", "seed": 0, "height": 28, "width": 28, "latent_size": 64, "classes": 0}
    for count, shards in ((10, 3), (7, 8), (1_000_003, 16)):
        dataset = Dataset(start=5, count=count, shards=shards, **values)  # type: ignore[arg-type]
        at = 5
        for shard in range(shards):
            first, size = dataset.shard_range(shard)
            assert first == at
            at += size
        assert at == 5 + count


def test_the_header_says_what_the_digits_are(uninterrupted: Path) -> None:
    header = read_header(uninterrupted)
    assert (header.model, header.version, header.seed, header.start, header.count) == ("mlp", 1, 7, 100, COUNT)


def test_the_golden_check_is_made_where_the_digits_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue: it was made on the CPU though CUDA wrote."""
    checked: list[str] = []

    def make_engine(model: bytes, manifest: Manifest, options: EngineOptions, largest: int) -> CudaEngine:
        return Recorded(model, manifest, options, largest, HostDevice())

    class Recorded(CudaEngine):
        def __init__(self, *arguments: Any) -> None:
            self.asked = arguments[2].provider
            super().__init__(*arguments[:2], EngineOptions(pad_to_powers=True), *arguments[3:])

        def check_golden(self) -> None:
            checked.append(self.asked)
            raise GoldenError("planted")

    monkeypatch.setattr("serve.engine.cuda_engine.make_engine", make_engine)
    monkeypatch.setattr("serve.dataset.command.choose_provider", lambda wanted: "cuda")
    assert main(["write", "--out", str(tmp_path / "digits"), "--count=10"]) == 2
    assert capsys.readouterr().err == "error: planted\n"
    assert checked == ["cuda"]
    assert not list((tmp_path / "digits").glob("*.pixels")), "nothing is written by a model that is off"


def test_on_cuda_two_engines_make_a_thousand_digits_a_run_and_give_back_what_they_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest: list[int] = []
    devices: list[HostDevice] = []
    runs: list[tuple[int, int]] = []

    class Recorded(CudaEngine):
        checked = False

        def check_golden(self) -> None:
            super().check_golden()
            self.checked = True

        def run(self, feeds: Any, outputs: Any = ("pixels",)) -> Any:
            if self.checked:
                runs.append((id(self), len(feeds["latents"])))
            return super().run(feeds, outputs)

    def make_engine(model: bytes, manifest: Manifest, options: EngineOptions, rows: int) -> CudaEngine:
        largest.append(rows)
        devices.append(HostDevice())
        return Recorded(model, manifest, EngineOptions(pad_to_powers=True), rows, devices[-1])

    assert main(["write", "--out", str(tmp_path / "cpu"), "--model=mlp", "--provider=cpu", "--count=5000"]) == 0
    monkeypatch.setattr("serve.engine.cuda_engine.make_engine", make_engine)
    monkeypatch.setattr("serve.dataset.command.choose_provider", lambda wanted: "cuda")
    assert main(["write", "--out", str(tmp_path / "cuda"), "--model=mlp", "--count=5000"]) == 0
    assert set(largest) == {1024}
    assert len(largest) <= 3, "the one of the golden check, and one for each thread"
    assert sorted(rows for _, rows in runs) == [1024] * 5
    assert not any(device.locked or device.streams for device in devices)
    pixels = [np.frombuffer(next((tmp_path / name).glob("*.pixels")).read_bytes(), np.uint8) for name in ("cpu", "cuda")]
    assert np.abs(pixels[0].astype(int) - pixels[1]).max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"shards": 0},
        {"shards": 10**12},
        {"count": -1},
        {"height": 0},
        {"latent_size": 1 << 40},
        {"seed": 1 << 64},
        {"labels": [11]},
    ],
)
def test_a_header_of_numbers_that_are_no_data_set_is_one_line(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["write", f"--out={tmp_path}", "--count=4", "--model=cdcgan"]) == 0
    header = tmp_path / "dataset.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | change))
    capsys.readouterr()
    assert main(["join", f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {header} ")


FILTERED = ["write", "--model=cdcgan", "--provider=cpu", "--seed=7", "--start=100", "--count=1500", "--filter=0.99"]


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filtered")
    assert main([*FILTERED, f"--out={folder}"]) == 0
    return folder


def indices_of(folder: Path) -> np.ndarray:
    return np.concatenate([np.fromfile(part, "<i8") for part in sorted(folder.glob("part-*.indices"))])


def test_a_filter_keeps_what_the_judge_reads_as_its_label(filtered: Path, shared_server: ServerProcess) -> None:
    """Each digit is the server's at the index that stands beside it, and those that gave way were not read so surely."""
    assert main(["join", "--format=npz", f"--out={filtered}"]) == 0
    with np.load(filtered / "digits.npz") as archive:
        pixels, labels, indices = archive["images"], archive["labels"].astype(np.int64), archive["indices"]
    assert (len(pixels), len(labels)) == (1500, 1500)
    judge = Judge()
    assert judge.confidence(pixels, labels).min() >= 0.99
    moved = np.flatnonzero(indices != 100 + np.arange(1500))
    assert 0 < len(moved) < 150
    assert set((indices - 100 - np.arange(1500)) % 1500) == {0}, "one data set further in the stream, or several"
    with DigitClient(shared_server.target) as client:
        parts = list(client.stream(1500, seed=7, start=100, model="cdcgan"))
        own, own_labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pixels", "labels"))
        others = [client.generate(1, seed=7, start=int(indices[place]), model="cdcgan") for place in moved]
    unmoved = np.setdiff1d(np.arange(1500), moved)
    assert np.abs(own[unmoved].astype(int) - pixels[unmoved]).max() <= 1
    assert np.array_equal(own_labels[unmoved], labels[unmoved])
    assert judge.confidence(own[moved], own_labels[moved]).max() < 0.991, "within a grey level of what was refused"
    assert np.abs(np.concatenate([each.pixels for each in others]).astype(int) - pixels[moved]).max() <= 1
    assert np.concatenate([each.labels for each in others]).tolist() == labels[moved].tolist()


@pytest.mark.parametrize("shards", [2, pytest.param(7, marks=pytest.mark.long)])
def test_shards_of_a_filtered_data_set_are_its_bytes(
    shards: int, filtered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def recorded(*arguments: Any) -> Any:
        asked.append(arguments[3].start)
        return filtered_digits(*arguments)

    monkeypatch.setattr(shard_writing, "filtered_digits", recorded)
    for shard in reversed(range(shards)):
        assert main([*FILTERED, f"--out={tmp_path}", f"--shards={shards}", f"--shard={shard}"]) == 0
    assert (
        b"".join(part.read_bytes() for part in sorted(tmp_path.glob("*.pixels")))
        == (filtered / "part-00000-of-00001.pixels").read_bytes()
    )
    assert np.array_equal(indices_of(tmp_path), indices_of(filtered))
    # Most processors give the same bytes whatever is run together: so that all do, blocks begin where any shard's begin.
    assert {start % shard_writing.TASK for start in asked} == {0}
    assert main(["join", f"--out={tmp_path}"]) == 0
    shown = ((indices_of(tmp_path) - 100 - np.arange(1500)) // 1500 + 1).sum()
    assert read_header(tmp_path).refused_share == pytest.approx(1 - 1500 / shown)
    assert main([*FILTERED, f"--out={tmp_path}", f"--shards={shards}", "--shard=0"]) == 0, "the header has grown, and fits"


def test_labels_in_turn_stay_in_turn_behind_a_filter(tmp_path: Path) -> None:
    turn = (5, 8, 2, 0, 1, 9, 5)  # seven: a digit from 1,500 indices further on would have another label by its own index
    assert main([*FILTERED, f"--out={tmp_path}", "--labels", *map(str, turn)]) == 0
    assert main(["join", f"--out={tmp_path}", "--format=npz"]) == 0
    with np.load(tmp_path / "digits.npz") as archive:
        assert archive["labels"].tolist() == [turn[index % len(turn)] for index in range(100, 1600)]
        assert (archive["indices"] != 100 + np.arange(1500)).any()
        assert Judge().confidence(archive["images"], archive["labels"].astype(np.int64)).min() >= 0.99


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--filter=1"], "--filter must be from 0 to below 1, got 1"),
        (["--filter=-0.5"], "--filter must be from 0 to below 1, got -0.5"),
        (["--filter=0.5", "--model=mlp"], "--filter .*mlp/1"),
        (["--filter=0.5", f"--start={(1 << 63) - 1000}"], "--filter .*100 × --count .*--start"),
        (["--filter=0.5", "--judge=nowhere.onnx"], "--judge nowhere.onnx: No such file or directory"),
        (["--filter=0.5", f"--judge={__file__}"], f"{__file__} .*python -m export judge --out"),
        (["--filter=0.5", f"--judge={BUNDLED_DIR / 'mlp' / '1' / 'model.onnx'}"], "is no judge"),
    ],
)
def test_a_filter_that_cannot_be_had_is_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["write", "--model=cdcgan", "--provider=cpu", "--count=20", f"--out={tmp_path / 'set'}", *flags]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("set/*.pixels"))


def test_a_place_that_finds_no_digit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("serve.dataset.filter.ATTEMPTS", 1)
    assert main([*FILTERED, f"--out={tmp_path / 'set'}"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: --filter 0\.99: .*\b1 digits.* \d+ \+ n × 1500\b.*\n", said)
    assert not list(tmp_path.glob("set/*.pixels"))


def test_a_filtered_set_takes_no_shard_of_another_filter(filtered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FILTERED, "--filter=0.5", f"--out={filtered}"]) == 2
    assert "filter 0.99, not 0.5; name another --out" in capsys.readouterr().err
