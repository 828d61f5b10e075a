"""The bundled graphs elsewhere: the same pixels on the oldest ONNX Runtime that reads them, on OpenVINO, after optimizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

from serve.dataset.filter import BUNDLED_JUDGE, TRAINED_ON, Judge
from serve.engine.cuda_engine import make_engine
from serve.engine.provider import EngineOptions
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle

PYTHON = Path("build/other-runtimes/bin/python")
SCRIPT = Path(__file__).parent / "other_runtimes.py"
MODELS = sorted(path.name for path in BUNDLED_DIR.iterdir())
ROWS = 257
LEVELS, SHARE = 1, 1e-3  # as far as an export may be from PyTorch


@pytest.mark.parametrize("path", [*(BUNDLED_DIR / name / "1" / "model.onnx" for name in MODELS), BUNDLED_JUDGE], ids=str)
def test_the_bundled_graphs_need_no_new_runtime(path: Path) -> None:
    """IR 8 and opset 18: ONNX Runtime 1.15 reads them. With IR 10, which the exporter writes, 1.17 does not."""
    graph = onnx.load(path)
    assert (graph.ir_version, [(each.domain, each.version) for each in graph.opset_import]) == (8, [("", 18)])
    if path != BUNDLED_JUDGE:
        assert read_bundle(path.parent).manifest.opset == 18


@pytest.mark.parametrize("model", MODELS)
def test_the_bundled_judge_knows_the_images_that_the_bundled_models_were_trained_on(model: str) -> None:
    assert Judge().trained_on == read_bundle(BUNDLED_DIR / model / "1").manifest.training["provenance"]["data"][TRAINED_ON]


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_other_runtimes_and_optimizers_make_the_same_pixels(model: str, tmp_path: Path) -> None:
    assert PYTHON.exists(), "the other runtimes are not set up: run the tests with make test-all, which does that"
    bundle, chance = read_bundle(BUNDLED_DIR / model / "1"), np.random.default_rng(7)
    latents = chance.standard_normal((ROWS, bundle.manifest.latent_size), dtype=np.float32)
    labels = chance.integers(bundle.manifest.labels, size=ROWS) if bundle.manifest.labels else None
    np.savez(tmp_path / "inputs.npz", latents=latents, **({} if labels is None else {"labels": labels}))
    files = [str(bundle.path / "model.onnx"), str(tmp_path / "inputs.npz"), str(tmp_path / "outputs.npz")]
    done = subprocess.run([PYTHON, SCRIPT, *files], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ours = make_engine(bundle.model, bundle.manifest, EngineOptions(), ROWS).compute(latents, labels)["pixels"].astype(int)
    with np.load(tmp_path / "outputs.npz") as archive:
        pixels = {name: archive[name].astype(int) for name in archive}
    for name in ("onnxslim", "onnxsim"):  # run by the old runtime too
        assert np.array_equal(pixels[name], pixels["old"])
    for name in ("old", "openvino"):
        assert np.abs(pixels[name] - ours).max() <= LEVELS
        assert (pixels[name] != ours).mean() <= SHARE
