"""The README's and the guides' commands that no other test calls: they run, and say what they promise."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from export import batch_size
from export.cli import main as export_main
from serve.client import DigitClient
from serve.client.command import main as client_main
from serve.latents import draw
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle
from tests.command_lines import in_process
from tests.conftest import SUBSET
from tests.server_process import ServerProcess
from train.checkpoint import LOSSES_FILE, create_run, save_checkpoint
from train.cli import main as train_main
from train.presets import preset
from train.reports.reference import NOTEBOOK_MLP_LOSSES

ROOT = Path(__file__).parents[2]


def python(*arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT
    )


@pytest.fixture
def nobody_reads() -> Iterator[int]:
    """A pipe whose reader has left, to write to."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    "command",
    [
        "serve.access.tokens add {folder}/tokens.json --name jobs",
        "serve.admin status --target {target}",
        "serve.client --target {target} --out {folder}/digits.png",
        "serve.client --target {target} --out -",
        "serve.dataset write --count 1 --provider cpu --out {folder}/digits",
        pytest.param(f"export verify {BUNDLED_DIR}/mlp/1", marks=pytest.mark.long),  # they take their time to load torch
        pytest.param("train list --runs-dir {folder}", marks=pytest.mark.long),
    ],
)
def test_a_reader_who_has_left_ends_a_command_without_complaint(
    command: str, buffered: bool, nobody_reads: int, shared_server: ServerProcess, tmp_path: Path
) -> None:
    create_run(tmp_path, preset("mlp"), {})
    arguments = command.format(target=shared_server.target, folder=tmp_path).split()
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], stdout=nobody_reads, stderr=subprocess.PIPE,
        timeout=60, check=False, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_server_whose_output_nobody_reads_serves_all_the_same(nobody_reads: int, tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/grpc"
    command = [sys.executable, "-m", "serve", f"--host={target}", "--http-port=0", "--provider=cpu"]
    with subprocess.Popen(command, stdout=nobody_reads, stderr=subprocess.PIPE, cwd=ROOT, text=True) as server:
        with DigitClient(target) as client:
            assert len(client.generate(2, seed=1).pixels) == 2
        server.terminate()
        assert "Error" not in server.communicate(timeout=60)[1]
    assert server.returncode == 0


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--seed=-1", "--seed: .* 0 to 18446744073709551615, got -1"),
        ("--seed=18446744073709551616", "--seed: .* 0 to 18446744073709551615, got 18446744073709551616"),
        ("--count=many", "--count: .*whole number.*'many'"),
        ("--timeout=0", "--timeout: .* 0.001 to 86400.0, got 0"),
        ("--timeout=nan", "--timeout: .* 0.001 to 86400.0, got nan"),
        ("--timeout=soon", "--timeout: .*number.*'soon'"),
        ("--digit=-7", "--digit: .* 0 to 4294967295, got -7"),
    ],
)
def test_a_number_out_of_bounds_is_named_by_its_flag(flag: str, complaint: str) -> None:
    done = in_process(client_main, flag)
    assert done.returncode == 2
    assert re.fullmatch(f"error: argument {complaint} .*--help.*\n", done.stderr)


def test_a_name_that_is_no_text_is_one_line() -> None:
    done = in_process(client_main, "--model=\udcff")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_digits_come_to_a_terminal_without_braille_as_a_picture(shared_server: ServerProcess, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve.client", "--target", shared_server.target, "--out", str(tmp_path / "digits.png")]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/digits.png: 25 digits by rpgan/1, seed ")
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size == (140, 140)


def test_standard_output_takes_the_picture_and_nothing_else(shared_server: ServerProcess) -> None:
    command = [sys.executable, "-m", "serve.client", "--target", shared_server.target, "--out", "-", "--count", "4"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 0
    with Image.open(io.BytesIO(done.stdout)) as picture:
        assert (picture.format, picture.size) == ("PNG", (56, 56))
    assert done.stderr.startswith(b"-: 4 digits by rpgan/1, seed ")


@pytest.mark.parametrize("name", ["x.jpg", "x.PDF", "folder.d/x.gif"])
def test_a_name_that_promises_another_format_is_refused(name: str) -> None:
    done = in_process(client_main, "--out", name)
    assert done.returncode == 2
    assert re.fullmatch(r"error: argument --out: .*PNG; name it x\.png .*--help.*\n", done.stderr)


def test_a_request_that_is_refused_is_to_be_made_otherwise(shared_server: ServerProcess) -> None:
    done = in_process(client_main, "--target", shared_server.target, "--count=0")
    assert (done.returncode, done.stderr.count("count must be from 1 to"), done.stderr.count("\n")) == (2, 1, 1)


def test_one_look_of_the_watch_says_at_once_that_nobody_answers() -> None:
    done = in_process(export_main, "watch", "--once", "--target=localhost:1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: localhost:1: UNAVAILABLE: ")


def test_compare_holds_a_runs_losses_against_the_notebooks(tmp_path: Path) -> None:
    run = create_run(tmp_path, preset("mlp"), {})
    marks = np.array([(step, *losses) for step, losses in NOTEBOOK_MLP_LOSSES.items()])

    def compare(changed: np.ndarray) -> tuple[int, str]:
        np.save(run.folder / LOSSES_FILE, changed)
        done = in_process(train_main, "compare", f"--run={run.folder}")
        return done.returncode, done.stdout + done.stderr

    assert compare(marks)[0] == 0
    off = marks.copy()
    off[3, 2] *= 1.5
    status, said = compare(off)
    assert status == 1
    assert [line.split()[0] for line in said.splitlines() if line.endswith("outside")] == [str(int(marks[3, 0]))]
    status, said = compare(marks[:-1])
    assert status == 2
    assert f"has no log point at step {int(marks[-1, 0])};" in said


@pytest.mark.long
def test_bench_train_times_every_preset() -> None:
    done = in_process(train_main, "bench", "--seconds=0.1", "--device=cpu", "--threads=1")
    assert done.returncode == 0, done.stderr
    for name in ("mlp", "dcgan", "cdcgan", "rpgan"):
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
        assert float(re.findall(r"[\d.]+", line)[0]) > 0


@pytest.mark.long
def test_export_plain_writes_each_presets_graph_as_the_exporter_leaves_it(tmp_path: Path) -> None:
    done = in_process(export_main, "plain", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for model, transposed in (("mlp", 0), ("dcgan", 4)):
        path = tmp_path / f"{model}.onnx"
        operators = [node.op_type for node in onnx.load(path).graph.node]
        assert "Round" not in operators, "the generator alone, as it was trained"
        assert operators.count("ConvTranspose") == transposed
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        for count in (1, 3):
            latents = draw(7, 0, count, read_bundle(BUNDLED_DIR / model / "1").manifest.latent_size)
            [images] = session.run(None, {"latents": latents})
            assert images.reshape(count, -1).shape == (count, 784)


@pytest.mark.long
def test_the_benchmark_measures_every_case_and_writes_every_target(tmp_path: Path) -> None:
    plain, out = tmp_path / "plain", tmp_path / "bench.json"
    assert python("export", "plain", str(plain)).returncode == 0
    flags = [f"--plain={plain}", f"--out={out}", "--rounds=1", "--seconds=1", "--no-soak"]
    done = python("tests.bench", *flags, timeout_s=500)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    for case in ("mlp, 1 digit, alone", "dcgan, 64 digits, 16 in flight"):
        assert "serve" in written["figures"][case]
    for target in written["targets"]:
        assert target["name"] in done.stdout


def test_the_comparison_with_another_checkout_takes_whole_seconds_as_h2load_does() -> None:
    done = python("tests.bench.versus", str(ROOT), "--seconds=1.5")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*--seconds.*'1\.5'.*\n", done.stderr)


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "deploy" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module


def test_lock_writes_versions_and_hashes_and_each_package_once(
    lock: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def resolver(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "--no-emit-index-url" in command
        names = ["numpy", "grpcio"]
        names += ["torch"] if "--extra=train" in command else []
        names += ["nvidia-cudnn-cu13"] if "--extra=cuda" in command else []
        names += ["onnxruntime"] if "onnxruntime==" in options["input"] else ["onnxruntime-gpu"]
        text = "".join(f"{name}==1.0 \\\n    --hash=sha256:{name}\n" for name in names)
        return subprocess.CompletedProcess(command, 0, text, "")

    monkeypatch.setattr(lock.subprocess, "run", resolver)
    assert lock.main() == 0
    locked = {path.stem: re.findall(r"^([\w-]+)==", path.read_text(), re.MULTILINE) for path in tmp_path.iterdir()}
    assert locked == {
        "serve": ["numpy", "grpcio"],
        "cpu": ["onnxruntime"],
        "gpu": ["onnxruntime-gpu"],
        "cuda": ["nvidia-cudnn-cu13"],
        "train": ["numpy", "grpcio", "torch", "onnxruntime-gpu"],
    }


def test_the_lock_files_name_no_host() -> None:
    for path in (ROOT / "deploy" / "requirements").glob("*.txt"):
        text = path.read_text()
        assert "://" not in text
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", text)


CHOSEN = r"^(\d+): the largest within 5 ms that makes 90% of the most images a second$"


def test_batch_size_times_a_bundle_and_writes_what_it_finds_where_asked(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "ROUNDS", 1)
    bundle = bundles / "mlp" / "1"
    before = (bundle / "manifest.json").read_text()
    told = in_process(export_main, "batch-size", str(bundle))
    assert told.returncode == 0, told.stderr
    [size] = re.findall(CHOSEN, told.stdout, re.MULTILINE)
    assert int(size) in {1 << power for power in range(7)}
    assert (bundle / "manifest.json").read_text() == before
    written = in_process(export_main, "batch-size", str(bundle), "--write")
    assert written.returncode == 0, written.stderr
    [size] = re.findall(CHOSEN, written.stdout, re.MULTILINE)
    assert read_bundle(bundle).manifest.batch_sizes["cpu"] == int(size)


@pytest.mark.parametrize(
    ("milliseconds", "size"),
    [
        ({1: 0.061, 512: 0.148, 1024: 0.206, 4096: 0.552}, 4096),
        ({1: 0.105, 512: 0.769, 1024: 1.586, 2048: 4.736, 4096: 10.345}, 1024),  # 2048 take three times as long
        ({1: 0.5, 8: 4.2, 16: 8.1}, 8),
        ({1: 7.0}, 1),
    ],
)
def test_the_batch_size_that_is_chosen_is_short_and_loses_no_images(milliseconds: dict[int, float], size: int) -> None:
    assert batch_size.choose([batch_size.Timing(count, run / 1e3) for count, run in milliseconds.items()]) == size


def test_export_refuses_a_name_for_nothing_and_says_when_nothing_is_left(tmp_path: Path) -> None:
    done = in_process(export_main, "--name=best", f"--runs-dir={tmp_path}")
    assert (done.returncode, bool(re.search("--name .*--run", done.stderr))) == (2, True)
    run = create_run(tmp_path, preset("mlp"), {"data": {}})
    save_checkpoint(run, 0, {"step": 0})
    (run.folder / "result.json").write_text('{"step": 0}')
    done = in_process(export_main, f"--runs-dir={tmp_path}", "--min-quality=label_accuracy=0.99")
    assert done.returncode == 2
    assert re.search(f"{tmp_path} .*--run", done.stderr)


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = in_process(export_main, "speedrun", f"--data-dir={SUBSET}", f"--out={tmp_path / 'file'}")
    assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / 'file'}: File exists\n")


@pytest.mark.long
def test_the_speedrun_goes_from_nothing_to_a_served_model(tmp_path: Path) -> None:
    small = ["--generator-widths=8,8,8", "--discriminator-widths=4,4,4", "--device=cpu", "--threads=1"]
    flags = ["--epochs=2", "--scored=256", f"--data-dir={SUBSET}", f"--out={tmp_path}"]
    done = in_process(export_main, "speedrun", *flags, "--", *small)
    assert done.returncode == 0, done.stderr
    begun = re.findall(r"^(\d) of 4: (\w+); about .* left$", done.stderr, re.MULTILINE)
    assert begun == [("1", "training"), ("2", "scoring"), ("3", "exporting"), ("4", "serving")]
    assert done.stdout.splitlines()[-1] == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for figure in ("classification accuracy score", "digits read as their labels", "a call for one digit, median", "time in all"):
        assert figure in page
    assert "rpgan in 2 epochs" in page
    assert re.search(r"served on cpu, [^,]*, 1 thread\.", page), "as it was trained, not as this process is"
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.size == (280, 280), "ten of each digit"
    manifest = read_bundle(tmp_path / "models" / "rpgan" / "1").manifest
    assert (manifest.name, manifest.training["step"]) == ("rpgan", 8), "four batches an epoch"
    assert f"data:image/png;base64,{base64.b64encode((tmp_path / 'digits.png').read_bytes()).decode()}" in page
    assert re.search(r"^for docs/speedrun.md: \| 20\d\d-\d\d-\d\d \| .* \|$", done.stdout, re.MULTILINE)


@pytest.mark.long
def test_a_speedrun_that_fails_says_which_command_did(tmp_path: Path) -> None:
    done = in_process(export_main, "speedrun", "--scored=256", f"--data-dir={SUBSET}", f"--out={tmp_path}", "--", "--beta1=2")
    assert done.returncode == 2
    assert re.search(r"error: python -m train rpgan .* --beta1=2 .*status 2\b.*\n$", done.stderr)
