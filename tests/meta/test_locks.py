"""What the images install (deploy/requirements) is within the bounds that pyproject.toml sets."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SHIPPED = (*PROJECT["dependencies"], *(text for extra in ("serve", "cuda", "tracing", "train") for text in EXTRAS[extra]))
WANTED = [wanted for wanted in map(Requirement, SHIPPED) if wanted.name != PROJECT["name"]]
LOCKS = sorted((ROOT / "deploy" / "requirements").glob("*.txt"))


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_every_locked_version_is_within_its_bounds(wanted: Requirement) -> None:
    locked = {
        lock.name: version
        for lock in LOCKS
        for version in re.findall(rf"^{re.escape(wanted.name)}==([^\s;]+)", lock.read_text(), re.MULTILINE)
    }
    assert locked, f"no file in deploy/requirements locks {wanted.name}: run make lock"
    outside = {name: version for name, version in locked.items() if not wanted.specifier.contains(version, prereleases=True)}
    assert not outside, f"pyproject.toml asks for {wanted.name}{wanted.specifier}: run make lock"


@pytest.mark.parametrize("name", ["grpcio", "grpcio-health-checking", "grpcio-reflection"])
def test_grpcio_has_an_upper_bound(name: str) -> None:
    """serve.ports uses classes of its core that are not public, and that have changed between minor versions."""
    [specifier] = [wanted.specifier for wanted in map(Requirement, EXTRAS["serve"]) if wanted.name == name]
    assert any(each.operator in ("<", "==") for each in specifier)


def test_the_client_may_be_installed_beside_any_later_version() -> None:
    assert {wanted.name for wanted in map(Requirement, PROJECT["dependencies"])} == {"grpcio", "protobuf", "numpy"}
    assert {each.operator for text in PROJECT["dependencies"] for each in Requirement(text).specifier} == {">="}
