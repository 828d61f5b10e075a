"""Fixtures that several folders of tests share: the small real data set, the bundled models, a server process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from serve.access.tokens import main as tokens_command
from serve.manifest import BUNDLED_DIR
from tests.server_process import ServerProcess

# These tests call make themselves, and may have been started by it: what it was told is not meant for the makes of the tests.
for variable in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL", "ARGS"):
    os.environ.pop(variable, None)

# Test processes run beside each other. Threads of one process that wait for each other after every operation of PyTorch take
# many times as long where others use the cores too, and no test's result depends on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine makes any input slow, now and then.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

SUBSET = Path(__file__).parent / "data" / "mnist-subset"


@pytest.fixture
def subset(tmp_path: Path) -> Path:
    """A copy of the small real data set, free to be damaged."""
    copy = tmp_path / "mnist"
    shutil.copytree(SUBSET, copy)
    return copy


@pytest.fixture
def bundles(tmp_path: Path) -> Path:
    """A copy of the bundled models, free to be damaged."""
    copy = tmp_path / "models"
    shutil.copytree(BUNDLED_DIR, copy)
    return copy


@pytest.fixture
def add_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Adds a token to the test's file and returns it."""

    def add(name: str, *flags: str) -> str:
        assert tokens_command(["add", str(tmp_path / "tokens.json"), f"--name={name}", *flags]) == 0
        return capsys.readouterr().out.strip()

    return add


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the long tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests to ``make test-all``."""
    if config.getoption("--all"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Starts server processes with the given flags on free ports, and ends them when the test is over."""
    running: list[ServerProcess] = []

    def start(*flags: str, environment: Mapping[str, str] | None = None) -> ServerProcess:
        running.append(ServerProcess(*flags, environment=environment))
        return running[-1]

    yield start
    for server in running:
        server.kill()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[ServerProcess]:
    """One server with the defaults, for tests that leave it as it was."""
    server = ServerProcess()
    yield server
    server.kill()
