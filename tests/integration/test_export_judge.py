"""The judge as a graph: what PyTorch's judge says, written whole or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from export.cli import main
from export.errors import ExportError
from export.graphs import judge as graph
from serve.dataset.filter import Judge as ExportedJudge
from tests.command_lines import in_process
from train.checkpoint import write_atomically
from train.data.mnist import load_mnist
from train.evaluation.judge import Judge, judge_file


@pytest.fixture(scope="module")
def judge() -> Judge:
    """An untrained one."""
    torch.manual_seed(5)
    return Judge().eval()


def test_a_kept_judge_is_exported_and_reads_as_it_did(judge: Judge, subset: Path, tmp_path: Path) -> None:
    data = load_mnist(subset)
    kept = judge_file(data, tmp_path / "judge")
    kept.parent.mkdir()
    write_atomically(kept, lambda stream: torch.save(judge.state_dict(), stream))
    out = tmp_path / "new" / "judge.onnx"
    done = in_process(main, "judge", f"--out={out}", f"--runs-dir={tmp_path}", f"--data-dir={subset}")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        rf"{re.escape(str(out))}: \d+\.\d\d% of the test images known, worst difference .* of a probability\n", done.stdout
    )
    read = ExportedJudge(out).read(data.train_images.numpy())
    assert np.abs(read - judge.read(data.train_images)[1].numpy()).max() < 1e-5
    assert read.std() > 0.001, "no constant"
    assert list(out.parent.iterdir()) == [out]


def test_a_graph_that_reads_otherwise_is_not_written(
    judge: Judge, subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(ExportedJudge):
        def read(self, pixels: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
            return super().read(pixels) + np.float32(2e-4)

    monkeypatch.setattr(graph, "ExportedJudge", Other)
    before = tmp_path / "judge.onnx"
    before.write_bytes(b"the one before")
    with pytest.raises(ExportError, match=r"0\.0002.* 0\.0001"):
        graph.export_judge(judge, load_mnist(subset), before)
    assert [(path, path.read_bytes()) for path in tmp_path.iterdir() if path.is_file()] == [(before, b"the one before")]


def test_where_nothing_can_be_written_is_one_line(judge: Judge, subset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"judge\.onnx \((Not a directory|File exists)\).*--out"):
        graph.export_judge(judge, load_mnist(subset), tmp_path / "file" / "judge.onnx")


def test_a_graph_that_onnx_runtime_does_not_take_is_one_line(
    judge: Judge, subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "PROBABILITIES", "logits")  # not the name that filtering asks for
    with pytest.raises(ExportError, match="is no judge"):
        graph.export_judge(judge, load_mnist(subset), tmp_path / "judge.onnx")
    assert not (tmp_path / "judge.onnx").exists()
