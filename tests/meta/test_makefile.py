"""What ``make`` does by itself: setting up, also when it is asked for it twice at once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from train.runs import make_arguments, make_variable

ROOT = Path(__file__).parents[2]
# Stands for an interpreter: makes an environment with itself in it, and takes its time to install.
INTERPRETER = """#!/bin/sh
case "$*" in
"-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo venv >> log ;;
*--editable*) echo "begin" >> log; sleep 0.5; echo "end" >> log ;;
esac
"""


def fresh_clone(folder: Path, interpreter: str) -> Path:
    """As much of a clone as setting up looks at; returns the interpreter."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    os.utime(folder / "pyproject.toml", (0, 0))
    python = folder / "python"
    python.write_text(interpreter)
    python.chmod(0o755)
    return python


def test_several_at_once_set_up_once_and_wait_for_it(tmp_path: Path) -> None:
    python = fresh_clone(tmp_path, INTERPRETER)
    command = ["make", "setup-serve", f"PYTHON={python}"]
    makes = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [make.wait(60) for make in makes] == [0] * 4
    assert (tmp_path / "log").read_text().split() == ["venv", "begin", "end"]
    assert (tmp_path / ".venv" / ".serve").exists()
    subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "log").read_text().split() == ["venv", "begin", "end", "begin", "end"]


@pytest.mark.parametrize(
    "value", ["plain", "a b", "it's", 'a "quote"', "$HOME $(id)", "back\\slash", "`id`", "a!b", "Straße", "a;b", "-x"]
)
def test_what_is_said_to_be_typed_arrives_as_it_was_meant(value: str, tmp_path: Path) -> None:
    """Issue: advice held paths with spaces unquoted, and recipes took them apart."""
    quoted = next(line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if line.startswith("quoted ="))
    recipe = "\t@printf '%s\\n' $(call quoted,$(RUN)) $(ARGS)\n"
    (tmp_path / "Makefile").write_text(f"{quoted}\nshow:\n{recipe}", encoding="utf-8")
    typed = f"make show{make_variable('RUN', value)}{make_arguments('--data-dir', value)}"
    done = subprocess.run(["bash", "-c", typed], cwd=tmp_path, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines() == [value, "--data-dir", value]


def test_an_interpreter_may_lie_in_a_folder_with_a_space() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"""(?m)^\t.*[^"]\$\(PYTHON\).*""", makefile) == []


def test_cleaning_keeps_what_was_installed_trained_and_exported(tmp_path: Path) -> None:
    """Issue: it deleted 6 GB that take minutes to fetch."""
    fresh_clone(tmp_path, INTERPRETER)
    for name in (".venv", "build", "runs", "models", "data", ".mypy_cache"):
        (tmp_path / name).mkdir()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {".venv", "runs", "models", "data"}


def test_what_could_not_be_installed_is_tried_again(tmp_path: Path) -> None:
    python = fresh_clone(tmp_path, INTERPRETER.replace('echo "end" >> log', "exit 3"))
    command = ["make", "setup-serve", f"PYTHON={python}"]
    for _ in range(2):
        assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 2
    assert (tmp_path / "log").read_text().split() == ["venv", "begin", "begin"]
