"""The dataset job's own command at its own size: a million digits in eight shards, two of them killed half-way."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from serve.dataset.command import main

JOB = yaml.safe_load(Path("deploy/jobs/dataset/job.yaml").read_text())
CONTAINER = JOB["spec"]["template"]["spec"]["containers"][0]


def arguments(out: Path, **changes: str) -> list[str]:
    """The job's, with the model that is quick on a CPU and another folder."""
    given = list(CONTAINER["args"])
    for flag, value in {"--out": str(out), "--model": "mlp", **changes}.items():
        given[given.index(flag) + 1] = value
    return [*given, "--provider", "cpu"]


def start(out: Path, index: int) -> subprocess.Popen[str]:
    command = [sys.executable, *CONTAINER["command"][1:], *arguments(out)]
    environment = os.environ | {"JOB_COMPLETION_INDEX": str(index)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.timeout(600)
def test_shards_killed_and_run_again_make_the_bytes_of_one_uninterrupted_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = JOB["spec"]["completions"]
    assert CONTAINER["command"] == ["python", "-m", "serve.dataset"]
    out, whole = tmp_path / "shards", tmp_path / "whole"
    for index in (2, 5):  # a pod that is lost half-way
        with start(out, index) as process:
            while not any(path.stat().st_size > 20 << 20 for path in out.glob(".part-*")):
                assert process.poll() is None, "it was too quick to be killed"
                time.sleep(0.005)
            process.kill()
    assert not list(out.glob("part-*"))
    for path in out.glob(".part-*"):
        path.unlink()
    for index in range(shards):
        with start(out, index) as process:
            said = process.communicate(timeout=300)[0]
        assert process.returncode == 0
    assert main([*arguments(whole, **{"--shards": "1"}), "--shard", "0"]) == 0
    print(f"a shard: {said}the whole: {capsys.readouterr().out}")
    digest, expected = hashlib.sha256(), hashlib.sha256()
    for path in sorted(out.glob("part-*")):
        digest.update(path.read_bytes())
    [single] = whole.glob("part-*")
    expected.update(single.read_bytes())
    assert single.stat().st_size == 1_000_000 * 784
    assert digest.hexdigest() == expected.hexdigest()
    assert main(["join", "--out", str(out)]) == 0
    images = np.memmap(out / "MNIST" / "raw" / "train-images-idx3-ubyte", np.uint8, offset=16)
    assert np.array_equal(images[: 784 * 1000], np.memmap(single, np.uint8)[: 784 * 1000])
