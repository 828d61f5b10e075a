"""From a finished run to a bundle that serves, and what is refused on the way."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from export import bundle as bundle_module
from export import parity
from export.bundle import CONVOLUTION_BUCKETS, export_run, verify
from export.cli import main
from export.errors import (
    AxesDifferError,
    ExportError,
    GraphError,
    NamesDifferError,
    ShapesDifferError,
    ValuesDifferError,
)
from export.generator import ServedGenerator, fold, served_generator, torch_form
from export.graphs.to_onnx import check_graph
from export.graphs.to_torchscript import load_torchscript
from serve.client import DigitClient
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle
from tests.command_lines import in_process
from tests.server_process import ServerProcess
from tests.waiting import wait_until
from train.checkpoint import Run, create_run, save_checkpoint, write_json
from train.config import TrainConfig
from train.errors import TrainError
from train.models import LabelledNorm, build_generator
from train.presets import preset

SMALL = {
    "mlp": {"generator_widths": (16, 32), "discriminator_widths": (16,)},
    "dcgan": {"generator_widths": (8, 8, 8), "discriminator_widths": (4, 4, 4)},
    "cdcgan": {"generator_widths": (8, 8, 8), "discriminator_widths": (4, 4, 4)},
    "rpgan": {"generator_widths": (8, 8, 8), "discriminator_widths": (4, 4, 4)},
}
CONDITIONAL = ("cdcgan", "rpgan")
# What the other two are made of is in these two as well.
EVERY_PRESET = ["mlp", "rpgan", *(pytest.param(name, marks=pytest.mark.long) for name in ("dcgan", "cdcgan"))]


def inputs(config: TrainConfig, count: int) -> tuple[torch.Tensor, ...]:
    """Random latents, and the labels in turn for a conditional preset."""
    latents = torch.randn(count, config.latent_size)
    return (latents, torch.arange(count) % config.labels) if config.conditional else (latents,)


def with_norms_that_matter(generator: torch.nn.Module) -> None:
    """Give labels gains and biases of their own: initially all labels are one."""
    for module in generator.modules():
        if isinstance(module, LabelledNorm):
            module.gain.weight.normal_(1.0, 0.3)
            module.bias.weight.normal_(0.0, 0.3)


def stored_forms(path: Path) -> dict[str, parity.Form]:
    """A bundle's TorchScript and its ONNX graph."""
    bundle = read_bundle(path)
    script = load_torchscript((path / "model.ts").read_bytes())
    return {"torchscript": torch_form(script)} | parity.serving_forms(bundle.model, bundle.manifest)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[str], Run]:
    """A finished run with random weights and BatchNorm statistics that are not the initial ones."""

    def make(name: str) -> Run:
        config = preset(name).replace(SMALL[name])
        torch.manual_seed(1)
        generator = build_generator(config)
        with torch.no_grad():
            for _ in range(5):
                latents, *labels = inputs(config, 32)
                generator(latents * 2, *labels)
            if config.architecture != "mlp":  # untrained it paints one grey, and hides what rounding does
                last = generator.last if config.architecture == "rpgan" else generator.layers
                last[-2].weight.mul_(300)
            with_norms_that_matter(generator)
        run = create_run(tmp_path / "runs", config, {"data": {}})
        state = {"step": 7, "generator": generator.state_dict()}
        if config.average_decay:  # the average is what is served; the generator itself would not do
            state = {"step": 7, "generator": {}, "average": generator.state_dict()}
        save_checkpoint(run, 7, state)
        write_json(run.folder / "result.json", {"step": 7})
        return run

    return make


@pytest.mark.long
@pytest.mark.parametrize("name", ["rpgan", "mlp", "dcgan", "cdcgan"])
def test_half_precision_is_a_bundle_of_its_own_with_its_own_tolerance_and_report(
    name: str, make_run: Callable[[str], Run], tmp_path: Path
) -> None:
    run = make_run(name)
    full, half = export_run(run, tmp_path / "models"), export_run(run, tmp_path / "models", precision="fp16")
    assert half.path == tmp_path / "models" / f"{name}-fp16" / "1"
    bundles = {path: read_bundle(path) for path in (full.path, half.path)}
    manifest = bundles[half.path].manifest
    assert (manifest.precision, manifest.tolerance) == ("fp16", parity.FP16_TOLERANCE)
    assert len(bundles[half.path].model) < 0.7 * len(bundles[full.path].model)
    assert onnx.load_from_string(bundles[half.path].model).ir_version == 8
    graph = onnx.load_from_string(bundles[half.path].model).graph
    assert {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {
        "latents": onnx.TensorProto.FLOAT, "images": onnx.TensorProto.FLOAT, "pixels": onnx.TensorProto.UINT8,
        **({"labels": onnx.TensorProto.INT64} if name in CONDITIONAL else {}),
    }  # fmt: skip
    weights = {weight.data_type for weight in graph.initializer if len(weight.dims) > 1}
    assert weights == {onnx.TensorProto.FLOAT16}
    report = json.loads(bundles[half.path].parity_json)
    assert report["tolerance"]["images"] == parity.FP16_TOLERANCE.images
    assert report["worst_images"] < parity.FP16_TOLERANCE.images
    assert verify(half.path)["worst_pixel_levels"] <= parity.FP16_TOLERANCE.pixel_levels
    with pytest.raises(ExportError):  # by the measure of fp32 it would not have been published
        parity.compare(
            "torchscript", stored_forms(half.path), msgspec.structs.replace(manifest, tolerance=parity.FP32_TOLERANCE), 1
        )


@pytest.mark.long
@pytest.mark.parametrize("name", ["rpgan", "dcgan"])
def test_three_products_in_tf32_are_a_bundle_of_their_own_with_a_report_of_matrix_units(
    name: str, make_run: Callable[[str], Run], tmp_path: Path
) -> None:
    done = export_run(make_run(name), tmp_path / "models", precision="tf32x3")
    assert done.path == tmp_path / "models" / f"{name}-tf32x3" / "1"
    bundle = read_bundle(done.path)
    assert (bundle.manifest.precision, bundle.manifest.tolerance) == ("tf32x3", parity.TF32X3_TOLERANCE)
    report = json.loads(bundle.parity_json)
    emulated = report["emulated"]
    assert emulated["tf32x3"]["images_max_abs"] <= parity.TF32X3_TOLERANCE.images
    assert max(emulated[each]["images_max_abs"] for each in ("fp32", "tf32x3")) < emulated["tf32"]["images_max_abs"] / 20
    assert verify(done.path)["worst_images"] <= parity.TF32X3_TOLERANCE.images


def test_a_checkpoint_older_than_its_run_is_not_exported(make_run: Callable[[str], Run], tmp_path: Path) -> None:
    """Issue: export published an older state in silence."""
    run = make_run("mlp")
    write_json(run.folder / "result.json", {"step": 9})
    with pytest.raises(TrainError, match=r"step 9\b.*step 7\b"):
        export_run(run, tmp_path / "models")
    assert not (tmp_path / "models").exists()
    (run.folder / "result.json").write_text("{")
    with pytest.raises(TrainError, match=r"result\.json"):
        export_run(run, tmp_path / "models")


def test_what_was_not_named_and_cannot_be_had_is_skipped_and_said(
    make_run: Callable[[str], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue: --min-quality label_accuracy=... failed as soon as there was an mlp run."""
    runs = {name: make_run(name) for name in ("mlp", "cdcgan")}
    for name, run in runs.items():
        accuracy = None if name == "mlp" else 0.995
        (run.folder / "quality.json").write_text(json.dumps({"step": 7, "model": {"label_accuracy": accuracy}}))
    where = [f"--runs-dir={tmp_path / 'runs'}", f"--models-dir={tmp_path / 'models'}"]
    assert main([*where, "--min-quality=label_accuracy=0.99"]) == 0
    said = capsys.readouterr()
    assert f"skipped: {runs['mlp'].folder}: label_accuracy " in said.err
    assert f'next: make serve ARGS="--models-dir {tmp_path / "models"}"' in said.out
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["cdcgan"]
    assert main([*where, f"--run={runs['mlp'].folder}", "--min-quality=label_accuracy=0.99"]) == 2
    assert re.search(r"label_accuracy of .*\b0\.99\b", capsys.readouterr().err)


@pytest.mark.parametrize("name", EVERY_PRESET)
def test_a_run_becomes_a_bundle_that_reads_verifies_and_counts_up(
    name: str, make_run: Callable[[str], Run], tmp_path: Path
) -> None:
    run = make_run(name)
    first = export_run(run, tmp_path / "models")
    second = export_run(run, tmp_path / "models")
    assert (first.path, second.path) == (tmp_path / "models" / name / "1", tmp_path / "models" / name / "2")
    bundle = read_bundle(first.path)
    assert bundle.manifest.training["step"] == 7
    assert bundle.manifest.latent_size == run.config.latent_size
    assert bundle.manifest.cuda_buckets == (() if name == "mlp" else CONVOLUTION_BUCKETS)
    graph = onnx.load_from_string(bundle.model)
    assert (graph.ir_version, graph.opset_import[0].version) == (8, 18), "which ONNX Runtime 1.15 reads"
    assert bundle.manifest.opset == 18
    if name == "rpgan":  # its blocks' biases are in the labels' tables, and parity holds
        inputs = [len(node.input) for node in graph.graph.node if node.op_type.startswith("Conv")]
        assert inputs == [2, 2, 3]
    report = json.loads(bundle.parity_json)
    assert report["batch_sizes"] == [1, 2, 3, 7, 64, 257]
    assert {"eager", "torchscript", "onnxruntime-cpu"} <= set(report["forms"])
    assert len(report["rows"]) == 6 * (len(report["forms"]) - 1)
    assert report["worst_images"] <= 1e-5
    with Image.open(first.path / "preview.png") as preview:
        assert preview.size == (224, 280 if name in CONDITIONAL else 224), "a row for each label"
    assert verify(first.path)["reference"] == "torchscript"
    assert sorted(entry.name for entry in (tmp_path / "models" / name).iterdir()) == ["1", "2"]


@pytest.mark.parametrize("name", SMALL)
def test_folding_changes_the_graph_and_not_the_function(name: str) -> None:
    config = preset(name).replace(SMALL[name])
    generator = build_generator(config)
    with torch.no_grad():
        with_norms_that_matter(generator)
    for _ in range(3):
        generator(*inputs(config, 16))
    served = served_generator(config, generator)
    folded = fold(served)
    assert not [module for module in folded.modules() if "BatchNorm" in type(module).__name__]
    given = inputs(config, 20)
    with torch.no_grad():
        ours, theirs = folded(*given), served(*given)
    assert float((ours[0] - theirs[0]).abs().max()) < 1e-6
    assert 0 <= float(ours[0].min()) < float(ours[0].max()) <= 1


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(2)), "BatchNorm after ReLU"),
        (torch.nn.Sequential(torch.nn.BatchNorm1d(2)), "BatchNorm after NoneType"),
        (torch.nn.ReLU(), "sequence of layers"),
    ],
)
def test_what_cannot_be_folded_is_refused(generator: torch.nn.Module, message: str) -> None:
    holder = torch.nn.Module()
    holder.layers = generator
    with pytest.raises(ExportError, match=message):
        fold(ServedGenerator(holder, -1.0, 1.0))


def wrong_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = parity.engine_form

    def off(engine: Any) -> parity.Form:
        form = honest(engine)

        def run(latents: Any, labels: Any) -> parity.Arrays:
            arrays = dict(form(latents, labels))
            if len(latents) == 7:
                arrays["images"] = arrays["images"].copy()
                arrays["images"][4, 0, 13, 20] += 0.25
            return arrays

        return run

    monkeypatch.setattr(parity, "engine_form", off)


def test_a_parity_failure_publishes_nothing_and_names_pair_batch_and_element(
    make_run: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_parity(monkeypatch)
    with pytest.raises(
        ValuesDifferError, match=r"eager and onnxruntime-cpu, batch size 7: images differ by 0.25 at \(4, 0, 13, 20\)"
    ):
        export_run(make_run("mlp"), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_crash_while_publishing_leaves_nothing_behind(
    make_run: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = bundle_module._write_durably

    def crash(path: Path, content: bytes) -> None:
        if path.name == "parity.json":
            raise KeyboardInterrupt
        honest(path, content)

    monkeypatch.setattr(bundle_module, "_write_durably", crash)
    with pytest.raises(KeyboardInterrupt):
        export_run(make_run("mlp"), tmp_path / "models")
    assert list((tmp_path / "models" / "mlp").iterdir()) == []


def test_what_a_killed_export_left_is_removed_by_a_later_one(tmp_path: Path) -> None:
    manifest = read_bundle(BUNDLED_DIR / "mlp" / "1").manifest
    old, new = (tmp_path / "mlp" / name for name in (".new-old", ".new-other"))
    for each in (old, new):
        each.mkdir(parents=True)
        (each / "model.onnx").touch()
    os.utime(old, (time.time() - 4000,) * 2)
    assert bundle_module._publish(tmp_path, manifest, {"model.onnx": b"x"}) == tmp_path / "mlp" / "1"
    assert sorted(path.name for path in (tmp_path / "mlp").iterdir()) == [".new-other", "1"], "one may still be written"


def test_two_exports_at_once_take_numbers_of_their_own(
    make_run: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = bundle_module._write_durably
    taken = tmp_path / "models" / "mlp" / "1"

    def overtaken(path: Path, content: bytes) -> None:
        honest(path, content)
        if path.name == "manifest.json" and not taken.exists():
            taken.mkdir()
            (taken / "manifest.json").write_bytes(b"another export's")

    monkeypatch.setattr(bundle_module, "_write_durably", overtaken)
    assert export_run(make_run("mlp"), tmp_path / "models").path.name == "2"
    assert read_bundle(taken.with_name("2")).manifest.version == 2
    assert (taken / "manifest.json").read_bytes() == b"another export's"


def test_a_folder_that_cannot_take_the_bundle_is_named(
    make_run: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(target))

    run = make_run("mlp")
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(ExportError, match=r"mlp \(No space left on device\)"):
        export_run(run, tmp_path / "models")
    assert list((tmp_path / "models" / "mlp").iterdir()) == []


GOOD = {"images": np.zeros((2, 1, 28, 28), np.float32), "pixels": np.zeros((2, 28, 28), np.uint8)}
FAR = np.where(np.arange(2 * 784).reshape(2, 28, 28) == 900, 3, 0).astype(np.uint8)


@pytest.mark.parametrize(
    ("got", "error", "message"),
    [
        ({"images": GOOD["images"]}, NamesDifferError, r"outputs are called \['images'\]"),
        (GOOD | {"pixels": GOOD["pixels"][:, None]}, AxesDifferError, "pixels has 4 axes, not 3"),
        (GOOD | {"images": GOOD["images"][:1]}, ShapesDifferError, r"images has shape \(1, 1, 28, 28\)"),
        (GOOD | {"images": GOOD["images"] + 2e-5}, ValuesDifferError, "images differ by 2e-05"),
        (GOOD | {"images": GOOD["images"] * np.nan}, ValuesDifferError, "images differ by nan"),
        (GOOD | {"pixels": FAR}, ValuesDifferError, r"pixels differ by 3 levels at \(1, 4, 4\)"),
    ],
)
def test_differences_are_found_in_order_and_named(got: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parity.difference(GOOD, got, parity.FP32_TOLERANCE, "here")


@pytest.mark.parametrize(("images_off", "levels_off", "good"), [(0.99e-5, 1, True), (1.01e-5, 0, False), (0, 2, False)])
def test_the_tolerances_hold_at_their_edges(images_off: float, levels_off: int, good: bool) -> None:
    got = {name: array.astype(np.float64) if name == "images" else array.copy() for name, array in GOOD.items()}
    got["images"][1, 0, 3, 4] += images_off
    got["pixels"][1, 3, 4] += levels_off
    if good:
        assert parity.difference(GOOD, got, parity.FP32_TOLERANCE, "here")["pixel_levels_max"] == levels_off
    else:
        with pytest.raises(ValuesDifferError):
            parity.difference(GOOD, got, parity.FP32_TOLERANCE, "here")


@pytest.mark.parametrize("name", SMALL)
def test_pixels_are_the_raw_generators_values_rounded(name: str) -> None:
    """Against what was trained, apart from the exporter's own code: (x - low) / (high - low), times 255, to the nearest."""
    config = preset(name).replace(SMALL[name])
    generator = build_generator(config).eval()
    given = inputs(config, 50)
    with torch.no_grad():
        raw = generator(*given).double().numpy()[:, 0]
        images, pixels = served_generator(config, generator)(*given)
    low, high = config.pixel_range
    exact = (raw - low) / (high - low) * 255
    decided = np.abs(exact - np.floor(exact) - 0.5) > 1e-3  # not on the border between two levels
    assert decided.mean() > 0.8  # untrained, the values of a tanh lie close to 127.5
    assert np.array_equal(pixels.numpy()[decided], np.rint(exact)[decided].astype(np.uint8))
    assert np.abs(images.numpy()[:, 0] * 255 - exact).max() < 1e-3


def test_identical_pixels_are_counted_over_all_batch_sizes_of_a_pair() -> None:
    def form(off_in: int, pixels_off: int) -> parity.Form:
        def run(latents: Any, labels: Any) -> parity.Arrays:
            count = len(latents)
            pixels = np.zeros((count, 28, 28), np.uint8)
            if count == off_in:
                pixels.reshape(-1)[:pixels_off] = 1
            return {"images": np.zeros((count, 1, 28, 28), np.float32), "pixels": pixels}

        return run

    def compare(other: parity.Form) -> Any:
        manifest = read_bundle(BUNDLED_DIR / "mlp" / "1").manifest
        return parity.compare("eager", {"eager": form(0, 0), "other": other}, manifest, seed=1)

    assert compare(form(1, 1))["worst_pixel_levels"] == 1  # one pixel of one digit may round the other way
    assert compare(form(257, 200))["worst_pixel_levels"] == 1
    with pytest.raises(ValuesDifferError, match=r"eager and other: 99\.\d+% of all pixels .* worst at batch size 257"):
        compare(form(257, 300))


def test_a_frozen_batch_axis_or_a_batchnorm_left_over_is_no_export() -> None:
    model = onnx.load_from_string((BUNDLED_DIR / "mlp" / "1" / "model.onnx").read_bytes())
    check_graph(model)
    frozen = onnx.ModelProto.FromString(model.SerializeToString())
    frozen.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    frozen.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 3
    with pytest.raises(GraphError, match=r"latents.* 3\b"):
        check_graph(frozen)
    rows = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 2, 1, 1])
    given = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 2, 1, 1])
    ones = [onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [2], [1.0, 1.0]) for name in "sbmv"]
    left = onnx.helper.make_node("BatchNormalization", ["x", *"sbmv"], ["y"])
    with pytest.raises(GraphError, match="BatchNormalization"):
        check_graph(onnx.helper.make_model(onnx.helper.make_graph([left], "left", [rows], [given], ones)))


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return in_process(main, *arguments)


def test_exporting_keeps_to_the_containers_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("train.device.usable_cores", lambda: 1)
    torch.set_num_threads(2)
    try:
        assert main(["verify", str(BUNDLED_DIR / "mlp" / "1")]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_verify_repeats_the_check_and_sees_a_tampered_bundle(bundles: Path) -> None:
    done = cli("verify", str(bundles / "mlp" / "1"))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= 1 + 6
    path = bundles / "mlp" / "1" / "model.ts"
    path.write_bytes(path.read_bytes() + b"x")
    done = cli("verify", str(bundles / "mlp" / "1"))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*model\.ts .*\n", done.stderr)


def test_a_script_that_is_none_though_its_digest_fits_is_one_line(bundles: Path) -> None:
    bundle = bundles / "mlp" / "1"
    (bundle / "model.ts").write_bytes((bundle / "model.ts").read_bytes()[:5000])
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["model.ts"] = hashlib.sha256((bundle / "model.ts").read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    done = cli("verify", str(bundle))
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.ts ")
    assert done.stderr.count("\n") == 1


def test_what_cannot_be_exported_is_one_line(make_run: Callable[[str], Run], tmp_path: Path) -> None:
    run = make_run("mlp")
    with pytest.raises(ExportError, match="--name 'Über'"):
        export_run(run, tmp_path / "models", "Über")
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ExportError, match="--models-dir"):
        export_run(run, blocker)
    (run.folder / "result.json").unlink()
    with pytest.raises(ExportError, match=r"finished.*--resume"):
        export_run(run, tmp_path / "models")
    done = cli(f"--runs-dir={tmp_path / 'none'}")
    assert done.returncode == 2
    assert re.match(rf"error: .*{tmp_path / 'none'}", done.stderr.strip().splitlines()[-1])


QUALITY = {"step": 7, "model": {"label_accuracy": 0.98, "frechet_distance": 9.0, "classification_accuracy_score": None}}


def test_a_run_that_was_judged_carries_its_quality_into_the_bundle(make_run: Callable[[str], Run], tmp_path: Path) -> None:
    run = make_run("cdcgan")
    assert read_bundle(export_run(run, tmp_path / "models").path).quality_json == ""
    write_json(run.folder / "quality.json", QUALITY)
    floors = {"label_accuracy": 0.98, "frechet_distance": 9.0}
    bundle = read_bundle(export_run(run, tmp_path / "models", floors=floors).path)
    assert json.loads(bundle.quality_json) == QUALITY
    assert "quality.json" in bundle.manifest.files
    assert bundle.manifest.training["data"] == "not known"


@pytest.mark.parametrize(
    ("floors", "message"),
    [
        ("label_accuracy=0.99", r"label_accuracy of .* is 0\.98.* at least 0\.99"),
        ("label_accuracy=0.9,frechet_distance=8.5", r"frechet_distance of .* is 9\b.* at most 8\.5"),
        ("classification_accuracy_score=0.1", "classification_accuracy_score of .* not known"),
        ("beauty=1", "--min-quality: 'beauty'"),
        ("recall=nan", "--min-quality: recall needs a finite number, got 'nan'"),
    ],
)
def test_a_run_below_a_floor_is_not_exported(floors: str, message: str, make_run: Callable[[str], Run], tmp_path: Path) -> None:
    run = make_run("cdcgan")
    write_json(run.folder / "quality.json", QUALITY)
    done = cli("run", f"--run={run.folder}", f"--models-dir={tmp_path / 'models'}", "--min-quality", floors)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert re.search(message, done.stderr)
    assert not (tmp_path / "models").exists()


def test_a_quality_that_is_missing_of_another_step_or_damaged_is_refused(make_run: Callable[[str], Run], tmp_path: Path) -> None:
    run = make_run("mlp")
    with pytest.raises(ExportError, match=r"--min-quality: .*judge it with: make evaluate RUN="):
        export_run(run, tmp_path / "models", floors={"recall": 0.1})
    write_json(run.folder / "quality.json", QUALITY | {"step": 6})
    with pytest.raises(ExportError, match=r"step 6\b.*step 7\b.*evaluate"):
        export_run(run, tmp_path / "models")
    write_json(run.folder / "quality.json", QUALITY | {"weights": "0" * 64})
    with pytest.raises(ExportError, match=r"quality\.json is of other weights than those of .*evaluate"):
        export_run(run, tmp_path / "models")
    (run.folder / "quality.json").write_text("[]")
    with pytest.raises(ExportError, match=r"quality\.json.*evaluate"):
        export_run(run, tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["cdcgan", "mlp", "rpgan"])
def test_the_gallery_draws_a_run(name: str, make_run: Callable[[str], Run], tmp_path: Path, subset: Path) -> None:
    run = make_run(name)
    if name == "cdcgan":  # judged
        (run.folder / "worst.png").write_bytes((BUNDLED_DIR.parent.parent / "export" / "pictures" / "worst.png").read_bytes())
    done = cli("gallery", f"--run={run.folder}", f"--data-dir={subset}", f"--out={tmp_path / 'gallery'}")
    assert done.returncode == 0, done.stderr
    sizes = {}
    for path in sorted((tmp_path / "gallery").glob("*.png")):
        with Image.open(path) as picture:
            sizes[path.name] = picture.size
    cell, rim = 4 * 30, 4 * 2  # a digit and its border, four times as large; two pixels more close the grid
    expected = {
        "digits.png": (12 * cell + rim, 10 * cell + rim),
        "interpolation.png": (11 * cell + rim, 10 * cell + rim),
        "neighbours.png": (12 * cell + rim, 4 * cell + rim),
        "truncation.png": (12 * cell + rim, 5 * cell + rim),
    }
    assert ("worst.png" in sizes) == (name == "cdcgan"), "what judging drew is shown too"
    if name in CONDITIONAL:
        expected["styles.png"] = (10 * cell + rim, 10 * cell + rim)
        assert {f"layer{number}.png" for number in (1, 2, 3)} <= set(sizes)
    assert {key: sizes[key] for key in expected} == expected
    assert sorted(done.stdout.split()) == sorted(str(path) for path in (tmp_path / "gallery").iterdir())


def test_a_damaged_checkpoint_is_named(make_run: Callable[[str], Run], tmp_path: Path) -> None:
    run = make_run("mlp")
    run.checkpoints()[-1].write_bytes(b"torn")
    done = cli("run", f"--run={run.folder}", f"--models-dir={tmp_path / 'models'}")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*step-00000007\.pt .*\n", done.stderr)


def test_watch_finds_a_true_server_true(shared_server: ServerProcess) -> None:
    done = cli("watch", "--once", f"--target={shared_server.target}")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1 + 8
    assert "BREACH" not in done.stdout


def test_watch_finds_a_false_server_out(shared_server: ServerProcess, bundles: Path) -> None:
    """The server serves the bundled dcgan; the watch is told that another one's TorchScript is its truth."""
    manifest = read_bundle(bundles / "dcgan" / "1").manifest
    generator = build_generator(preset("dcgan"))
    other = ServedGenerator(generator, -1.0, 1.0).eval()
    script = bundle_module.to_torchscript(other)
    (bundles / "dcgan" / "1" / "model.ts").write_bytes(script)
    files = dict(manifest.files) | {"model.ts": bundle_module.sha256(script)}
    (bundles / "dcgan" / "1" / "manifest.json").write_text(msgspec.structs.replace(manifest, files=files).to_json())
    done = cli("watch", "--once", f"--target={shared_server.target}", f"--models-dir={bundles}")
    assert done.returncode == 1
    assert len(re.findall("^dcgan/1 .*BREACH$", done.stdout, re.MULTILINE)) == 2
    assert len(re.findall("^mlp/1 .*BREACH$", done.stdout, re.MULTILINE)) == 0


def test_watch_compares_the_others_when_one_version_is_unknown(shared_server: ServerProcess, bundles: Path) -> None:
    """Issue: a version that the watch had no bundle of left out all later ones."""
    shutil.rmtree(bundles / "cdcgan")
    done = cli("watch", "--once", f"--target={shared_server.target}", f"--models-dir={bundles}")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["dcgan/1"] * 2 + ["mlp/1"] * 2 + ["rpgan/1"] * 2
    assert re.fullmatch(r"error: .*cdcgan/1/manifest\.json .*\n", done.stderr)


@pytest.mark.long
def test_watch_exports_metrics_until_it_is_stopped(shared_server: ServerProcess) -> None:
    command = [
        sys.executable,
        "-m",
        "export",
        "watch",
        "--interval-s=0.1",
        "--metrics-port=0",
        f"--target={shared_server.target}",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = re.search(r"http://(\S+)/metrics", process.stdout.readline())
        assert address
        seen = ServerProcess.__new__(ServerProcess)  # only its reading of metrics is wanted
        seen.http = address[1]
        wait_until(lambda: process.poll() is not None or seen.metric("digits_watch_difference_count") >= 8)
        assert process.poll() is None
        assert seen.metric("digits_watch_breaches_total") == 0
        assert seen.metric("digits_watch_last_check_timestamp_seconds") > 1.7e9
        process.terminate()
        assert process.wait(timeout=30) == 0


def test_an_exported_run_serves(
    make_run: Callable[[str], Run], tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> None:
    export_run(make_run("dcgan"), tmp_path / "models", "tiny")
    server = start_server(f"--models-dir={tmp_path / 'models'}", "--default-model=tiny")
    with DigitClient(server.target) as client:
        digits = client.generate(3, seed=1)
    assert (digits.model, digits.version, digits.pixels.shape) == ("tiny", 1, (3, 28, 28))
