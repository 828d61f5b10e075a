"""A short run of every fuzz target, the same inputs every time; and proof that a defect would be found."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.api import open_inference
from tests.fuzz import targets
from tests.fuzz.targets import NAMES, DefectError, make_target, seeds

RUNS = 1500


@pytest.mark.long  # a target takes seconds to instrument
@pytest.mark.parametrize("name", NAMES)
def test_no_input_of_a_short_run_finds_a_defect(name: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--runs", str(RUNS), "--seed", "1", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(rf"^{name} +([0-9,]+)", done.stdout, re.MULTILINE)
    assert told, done.stdout
    assert int(told[1].replace(",", "")) >= RUNS, "libFuzzer looks at their number now and then"
    assert "no defect" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_seeds_are_taken_without_a_defect(name: str) -> None:
    target = make_target(name)
    for content in seeds(name):
        target(content)


def fail(*_: object) -> None:
    raise KeyError("planted")


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("inference", lambda patch: patch.setattr(open_inference, "infer", fail)),
        ("digits", lambda patch: patch.setattr(targets, "MOST_ANSWER_BYTES", 10)),
        ("manifest", lambda patch: patch.setattr(targets, "parse_manifest", fail)),
        ("idx", lambda patch: patch.setattr(targets, "read_idx", fail)),
    ],
)
def test_a_planted_defect_is_found(
    name: str, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    target = make_target(name)
    with pytest.raises((DefectError, KeyError)):
        target(next(iter(seeds(name))))


@pytest.mark.long
def test_an_input_that_costs_a_gigabyte_is_found(tmp_path: Path) -> None:
    code = (
        "import sys, numpy, tests.fuzz.targets as t, tests.fuzz.__main__ as m\n"
        "t.read_idx = lambda content, name: numpy.ones(1 << 31, numpy.uint8)\n"
        "sys.argv = ['fuzz']\n"
        f"m.fuzz('idx', ['-runs=10', '-artifact_prefix={tmp_path}/'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "MemoryError" in done.stdout + done.stderr
