"""What several of these tests call the shared server by."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from serve.client import DigitClient
from serve.client.channel import CHANNEL_OPTIONS
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from tests.certificates import Certificates
from tests.collector import Collector
from tests.server_process import ServerProcess

TRITON_PYTHON = Path("build/triton-client/bin/python")


@pytest.fixture(scope="module")
def client(shared_server: ServerProcess) -> Iterator[DigitClient]:
    """The project's own client."""
    with DigitClient(shared_server.target) as connected:
        yield connected


@pytest.fixture(scope="module")
def stub(shared_server: ServerProcess) -> Iterator[Any]:
    """The generated stub, without retries."""
    with grpc.insecure_channel(shared_server.target, options=CHANNEL_OPTIONS[1:]) as channel:
        yield pb_grpc.DigitGeneratorStub(channel)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.fixture(scope="session")
def by_triton() -> Callable[..., dict[str, Any]]:
    """Runs a script of this folder by tritonclient's own interpreter, against an address; returns what it saw."""

    def seen(script: str, address: str, *more: str) -> dict[str, Any]:
        assert TRITON_PYTHON.exists(), "tritonclient is not set up: run the tests with make test, which does that"
        command = [str(TRITON_PYTHON), str(Path(__file__).parent / script), address, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        answers: dict[str, Any] = json.loads(done.stdout)
        return answers

    return seen


@pytest.fixture
def collecting() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.stop().wait(10)
