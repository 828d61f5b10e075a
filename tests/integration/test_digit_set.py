"""A DigitSet in PyTorch's DataLoader: the same bytes whoever reads them, by a server and by an engine in the process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.client import DigitClient, DigitSet
from serve.manifest import BUNDLED_DIR
from tests.server_process import ServerProcess

RPGAN = BUNDLED_DIR / "rpgan" / "1"


def read(source: str | Path, started: str) -> dict[str, Any]:
    command = [sys.executable, "tests/integration/digit_set_reader.py", str(source), started]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@pytest.mark.parametrize("started", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
@pytest.mark.parametrize("by", ["server", pytest.param("engine", marks=pytest.mark.long)])
def test_workers_read_the_same_bytes(by: str, started: str, shared_server: ServerProcess) -> None:
    seen = read(shared_server.target if by == "server" else RPGAN, started)
    first, second = seen["0 workers"], seen["0 workers, epoch 1"]
    assert first != second, "an epoch has digits of its own"
    for workers in (1, 2):
        assert (seen[f"{workers} workers"], seen[f"{workers} workers, epoch 1"]) == (first, second)
    assert (seen["staying, epoch 0"], seen["staying, epoch 1"]) == (first, second), "workers that stay hear of the epoch"
    assert all(seen[name] for name in ("any order", "rank 0", "rank 1", "ranks"))


def test_a_server_and_an_engine_give_the_digits_of_the_address(shared_server: ServerProcess) -> None:
    of_server, of_engine = (
        DigitSet(each, seed=7, count=50, start=1000, model="rpgan") for each in (shared_server.target, str(RPGAN))
    )
    for digits in (of_server, of_engine):
        digits.set_epoch(2)
    with DigitClient(shared_server.target) as client:
        same = client.generate(50, seed=7, start=1100, model="rpgan")
    for (image, label), (other, other_label), pixels, wanted in zip(of_server, of_engine, same.pixels, same.labels, strict=True):
        assert (label, other_label) == (wanted, wanted)
        assert np.array_equal(image[0], pixels)
        assert np.abs(other[0].astype(int) - pixels).max() <= 1


SCORED = """
from pathlib import Path
from train.data.mnist import load_mnist
real = load_mnist(Path("tests/data/mnist-subset"))
read = model(real.test_images[:, None] / 255).argmax(dim=1)
print(float((read == real.test_labels).float().mean()))
"""


@pytest.mark.long
def test_the_lines_in_the_docs_train_a_classifier(shared_server: ServerProcess) -> None:
    """It sees nothing but digits that nobody wrote, and reads those of MNIST's test set."""
    blocks = re.findall(r"```python\n(.*?)```", Path("docs/serving.md").read_text(), re.DOTALL)
    [lines] = [block for block in blocks if "DigitSet" in block]
    program = lines.replace("localhost:50051", shared_server.target) + SCORED
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.9
