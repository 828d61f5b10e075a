"""Callers in other languages: the lines of docs/serving.md as they stand there, but for the addresses."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.client import DigitClient
from serve.pictures import to_grid
from tests.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "build" / "languages"
GO_PACKAGES = "/usr/share/gocode"  # Debian's, since a module proxy may be out of reach


def lines(language: str, containing: str, server: ServerProcess) -> str:
    """The block of the docs in this language that contains a text, with the server's addresses."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if containing in block]
    text: str = block
    return text.replace("localhost:50051", server.target).replace("localhost:8080", server.http)


def run(folder: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a checkout as these callers need."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    return tmp_path


def assert_sevens(picture: Path, server: ServerProcess) -> None:
    with DigitClient(server.target) as client:
        expected = to_grid(client.generate(25, seed=7, labels=7).pixels)
    assert np.abs(np.array(Image.open(io.BytesIO(picture.read_bytes()))).astype(int) - expected).max() <= 1


def test_curl(shared_server: ServerProcess, checkout: Path) -> None:
    said = run(checkout, "sh", "-ec", lines("sh", "/v1/interpolation", shared_server))
    assert_sevens(checkout / "sevens.png", shared_server)
    assert said.count('"version"') + said.count('"model_version"') >= 2
    assert '"error"' not in said


@pytest.mark.long
def test_node(shared_server: ServerProcess, checkout: Path) -> None:
    assert (TOOLS / ".ready").exists(), "run the long tests with make test-all, which sets up build/languages"
    (checkout / "caller.js").write_text(lines("js", "DigitGenerator", shared_server))
    run(checkout, "node", "caller.js", NODE_PATH=str(TOOLS / "node_modules"))
    assert_sevens(checkout / "sevens.png", shared_server)


@pytest.mark.long
def test_go(shared_server: ServerProcess, checkout: Path) -> None:
    caller = checkout / "src" / "caller"
    shutil.copytree(checkout / "protos", caller / "protos")
    run(caller, "sh", "-ec", lines("sh", "--go_out", shared_server))
    (caller / "main.go").write_text(lines("go", "package main", shared_server))
    path = f"{checkout}:{GO_PACKAGES}"
    run(caller, "go", "run", "caller", GO111MODULE="off", GOPATH=path, GOCACHE=str(TOOLS / "go-cache"), GOFLAGS="")
    assert_sevens(caller / "sevens.png", shared_server)
    run(caller, "protoc", "-I", "protos", "--go_out=.", "--go-grpc_out=.", "inference/open_inference.proto")


@pytest.mark.long
def test_java_gets_a_file_for_each_message(checkout: Path) -> None:
    run(checkout, "protoc", "-I", "protos", "--java_out=.", "digits/v1/digits.proto", "inference/open_inference.proto")
    assert (checkout / "digits" / "v1" / "GenerateRequest.java").exists()
    assert (checkout / "inference" / "ModelInferRequest.java").exists()
