"""``make mutate`` finds a fault's place by function and piece of code, and says when it is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutate import __main__ as command
from tests.mutate.faults import FAULTS, Fault
from tests.mutate.planting import StaleError, plant

CODE = """LIMIT = 3


class Queue:
    size = 1

    def take(self, count: int) -> int:
        if count > 2:
            return 1
        return count

    def put(self, count: int) -> int:
        def inner() -> int:
            return 7

        if count > 2:
            return inner(
            )
        return 5
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "queue.py").write_text(CODE)
    return tmp_path


def fault(place: str, before: str, after: str = "X", tests: str = "") -> Fault:
    return Fault("a fault", place, before, after, tests)


@pytest.mark.parametrize(
    ("place", "before", "changed"),
    [
        ("queue.py:Queue.take", "count > 2", CODE.replace("count > 2", "X", 1)),
        ("queue.py:Queue.put", "return inner( )", CODE.replace("return inner(\n            )", "X")),
        ("queue.py:Queue.put.inner", "7", CODE.replace("7", "X")),
        ("queue.py:Queue", "size = 1", CODE.replace("size = 1", "X")),
        ("queue.py:", "LIMIT = 3", CODE.replace("LIMIT = 3", "X")),
    ],
)
def test_a_fault_is_put_into_its_function_alone(root: Path, place: str, before: str, changed: str) -> None:
    assert plant(root, fault(place, before)) == changed
    (root / "queue.py").write_text(f"# a line more\n{CODE}")
    assert plant(root, fault(place, before)) == f"# a line more\n{changed}"


@pytest.mark.parametrize(
    ("place", "before", "named"),
    [
        ("gone.py:Queue.take", "count > 2", "gone.py"),
        ("queue.py:Queue.give", "count > 2", "Queue.give"),
        ("queue.py:Queue.take", "count > 3", "count > 3"),
        ("queue.py:Queue.take", "LIMIT", "LIMIT"),
        ("queue.py:Queue", "count > 2", "2 times"),
    ],
)
def test_a_place_that_is_gone_or_not_the_only_one_is_stale(root: Path, place: str, before: str, named: str) -> None:
    with pytest.raises(StaleError, match=named):
        plant(root, fault(place, before))


def test_a_fault_whose_tests_are_gone_is_stale(root: Path) -> None:
    with pytest.raises(StaleError, match=r"tests/unit/test_gone\.py"):
        plant(root, fault("queue.py:Queue.take", "count > 2", tests="tests/unit/test_gone.py -k take"))


def test_stale_faults_are_listed_without_a_test_and_fail_the_command(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "ROOT", root)
    monkeypatch.setattr(command, "FAULTS", [fault("queue.py:Queue.take", "count > 2"), fault("queue.py:Queue.give", "count > 2")])
    monkeypatch.setattr("sys.argv", ["mutate", "--stale"])
    assert command.main() == 1
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["stale"]


def test_faults_have_different_names() -> None:
    assert len({each.what for each in FAULTS}) == len(FAULTS)
