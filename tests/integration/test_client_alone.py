"""The client by itself, installed from the clone beside old and new libraries and nothing of the server's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve.client import DigitClient
from tests.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
VENVS = ROOT / "build" / "clients"
CALLER = Path(__file__).parent / "client_caller.py"
ALLOWED = ("serve.client", "serve.pb", "serve.latents", "serve.pictures", "serve.command_line")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_importing_the_client_imports_nothing_of_the_server(tmp_path: Path) -> None:
    code = "import serve.client, serve.client.command, sys; print(*sys.modules)"
    names = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}", cwd=tmp_path).stdout.split()
    assert not {"msgspec", "onnxruntime", "aiohttp", "PIL", "prometheus_client", "uvloop", "torch"} & set(names)
    assert [name for name in names if name.startswith("serve.") and not name.startswith(ALLOWED)] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert (VENVS / ".ready").exists(), "run the long tests with make test-all, which sets up build/clients"
    folder = tmp_path_factory.mktemp("wheel")
    python = VENVS / "protobuf7" / "bin" / "python"
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.mark.long
@pytest.mark.parametrize("venv", ["protobuf5", "protobuf6", "protobuf7"])
def test_it_works_beside_each_version_of_protobuf(venv: str, wheel: Path, shared_server: ServerProcess, tmp_path: Path) -> None:
    python = VENVS / venv / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel, cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    done = run(python, "-W", "error", CALLER, shared_server.target, cwd=tmp_path)
    seen: dict[str, Any] = json.loads(done.stdout)
    with DigitClient(shared_server.target) as client:
        assert seen["pixels"] == client.generate(3, seed=7, labels=[1, 2, 3]).pixels.tolist()
    assert "count must be from 1 to" in done.stderr
    assert [name for name in seen["modules"] if name != "serve" and not name.startswith(ALLOWED)] == []
    command = run(python, "-m", "serve.client", "--target", shared_server.target, "--out", "it.png", cwd=tmp_path)
    assert "25 digits by" in command.stdout
    if venv == "protobuf7":
        run(python, "-m", "mypy", "--strict", CALLER, cwd=tmp_path)


@pytest.mark.long
def test_the_server_says_how_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    python = VENVS / "protobuf7" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel, cwd=tmp_path)
    done = subprocess.run([str(python), "-m", "serve"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install '.[serve]'" in done.stderr
