"""The judge of ``python -m train evaluate`` as an ONNX graph, for data sets that are filtered (``serve/dataset/filter.py``)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from export.errors import ExportError
from export.graphs.to_onnx import exported
from serve.dataset.filter import PIXELS, PROBABILITIES, TRAINED_ON
from serve.dataset.filter import Judge as ExportedJudge
from serve.errors import SettingsError
from serve.files import replace_file
from train.data.mnist import Mnist
from train.evaluation.judge import Judge

LARGEST_DIFFERENCE = 1e-4  # of a probability


class ServedJudge(nn.Module):
    """Pixels uint8 (batch, 28, 28) → probabilities float32 (batch, classes)."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, pixels: Tensor) -> Tensor:
        probabilities: Tensor = self.judge(pixels.unsqueeze(1).float() / 255).softmax(1)
        return probabilities


def export_judge(judge: Judge, data: Mnist, path: Path) -> float:
    """Write the judge and ask it about all test images; returns the largest difference of a probability. Raises ExportError."""
    example = {PIXELS: torch.zeros(3, 28, 28, dtype=torch.uint8)}
    model = exported(ServedJudge(judge).eval(), example, (PROBABILITIES,))
    onnx.helper.set_model_props(model, {TRAINED_ON: data.digests[TRAINED_ON]})
    content = model.SerializeToString()
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        got = ExportedJudge(beside).read(data.test_images.numpy())
        expected = judge.read(data.test_images)[1].numpy()
        difference = float(np.abs(got - expected).max())
        if not difference <= LARGEST_DIFFERENCE:
            raise ExportError(f"ONNX Runtime's probabilities differ by {difference:.2g}; allowed is {LARGEST_DIFFERENCE:g}")
        replace_file(path, content, 0o644)
    except OSError as error:
        raise ExportError(f"cannot write {path} ({error.strerror}); name another file with --out") from None
    except SettingsError as error:
        raise ExportError(str(error)) from None
    finally:
        with suppress(OSError):  # where no folder could be made either
            beside.unlink()
    return difference
