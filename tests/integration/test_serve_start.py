"""What keeps a server from starting is one line, before any port is bound."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.client import DigitClient
from serve.client.command import main
from serve.manifest import BUNDLED_DIR, MANIFEST_FILE
from serve.ports.http_connections import usable_host
from tests.bundle_copies import add_version
from tests.server_process import ServerProcess


def start_and_fail(*flags: str) -> str:
    ports = [] if any("port" in flag for flag in flags) else ["--grpc-port=0", "--http-port=0"]
    done = subprocess.run(
        [sys.executable, "-m", "serve", *ports, *flags], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.strip().splitlines() if " WARNING " not in line and " INFO " not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_flag_of_the_wrong_type() -> None:
    assert "--instances must be a whole number, got 'all'" in start_and_fail("--instances=all")


def test_an_unknown_flag_and_an_abbreviated_one() -> None:
    assert "unrecognized arguments: --gpu" in start_and_fail("--gpu")
    assert "unrecognized arguments: --instance=2" in start_and_fail("--instance=2")


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [((), "--gpu"), (("--log-format=json",), "--instances=all"), (("--log-format", "json"), "--models-dir=/none")],
)
def test_where_the_log_is_json_the_reason_is_too(asked: tuple[str, ...], wrong: str) -> None:
    environment = os.environ | ({} if asked else {"DIGITS_LOG_FORMAT": "json"})
    command = [sys.executable, "-m", "serve", "--grpc-port=0", "--http-port=0", *asked, wrong]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = [json.loads(each) for each in done.stderr.splitlines()]
    assert line["level"] == "critical"
    assert wrong.partition("=")[0] in line["message"]


def test_without_the_usual_default_model_what_is_there_answers(
    tmp_path: Path, start_server: Callable[..., ServerProcess]
) -> None:
    """Issue: after exporting only an mlp the server did not start."""
    shutil.copytree(BUNDLED_DIR / "mlp", tmp_path / "mlp")
    server = start_server(f"--models-dir={tmp_path}")
    assert "model mlp/1 (default)" in server.announced
    with DigitClient(server.target) as client:
        assert client.generate(1).model == client.list_models().default_model == "mlp"


def test_an_unknown_default_model() -> None:
    assert "--default-model 'vae' is not served; there are cdcgan, dcgan, mlp, rpgan" in start_and_fail("--default-model=vae")


def test_a_models_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "is not a folder" in start_and_fail(f"--models-dir={tmp_path / 'none'}")


def test_a_tampered_bundle(bundles: Path) -> None:
    path = bundles / "mlp" / "1" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.onnx is not the file that was exported" in start_and_fail(f"--models-dir={bundles}")


def test_a_damaged_manifest(bundles: Path) -> None:
    (bundles / "mlp" / "1" / MANIFEST_FILE).write_text("{")
    assert "manifest.json is not valid JSON" in start_and_fail(f"--models-dir={bundles}")


def test_cuda_asked_for_and_missing() -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    assert "--provider cuda: no NVIDIA driver is installed here" in start_and_fail("--provider=cuda")


@pytest.mark.parametrize("flag", ["--grpc-port", "--http-port"])
def test_a_port_in_use_is_refused_and_not_shared(flag: str, start_server: Callable[..., ServerProcess]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = "--http-port=0" if flag == "--grpc-port" else "--grpc-port=0"
        assert f"{flag} {port} on 127.0.0.1 cannot be had" in start_and_fail(f"{flag}={port}", other)


def test_a_second_server_cannot_take_the_firsts_port(start_server: Callable[..., ServerProcess]) -> None:
    first = start_server()
    port = first.target.rpartition(":")[2]
    assert "cannot be had" in start_and_fail(f"--grpc-port={port}", "--http-port=0")
    assert "cannot be had" in start_and_fail(f"--grpc-port={port}", "--http-port=0")


def test_the_start_tells_where_it_listens_what_it_serves_and_what_is_next(shared_server: ServerProcess) -> None:
    said = shared_server.announced
    assert re.search(r"^gRPC +127\.0\.0\.1:\d+$", said, re.MULTILINE)
    assert re.search(r"^HTTP +http://127\.0\.0\.1:\d+/metrics /healthz /readyz$", said, re.MULTILINE)
    assert re.search(r"^model rpgan/1 \(default\) on (cpu|cuda): \d+ instances, batches of up to \d+$", said, re.MULTILINE)
    assert re.search(r"^next +make generate", said, re.MULTILINE)


def test_auto_says_that_it_took_the_cpu_and_warns_of_nothing(start_server: Callable[..., ServerProcess]) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    server = start_server()
    assert server.metric("digits_provider_info", provider="cpu") == 4
    _, log = server.terminate()
    assert "INFO serve.engine.provider: provider auto: on the CPU, because no NVIDIA driver" in log
    assert "WARNING" not in log


def test_serving_imports_no_torch() -> None:
    code = "import sys, serve.cli, serve.client; print(sorted({'torch', 'onnx', 'torchvision'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("module", ["serve.cli", "serve.dataset.command", pytest.param("export.cli", marks=pytest.mark.long)])
def test_onnx_runtime_reports_to_nobody(module: str) -> None:
    """Its telemetry says so on stderr when it cannot keep an identity, and runs a thread of its own."""
    program = (
        f"import {module}, os, pathlib, onnxruntime\n"
        f"onnxruntime.InferenceSession({str(BUNDLED_DIR / 'mlp' / '1' / 'model.onnx')!r}, providers=['CPUExecutionProvider'])\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
    )
    homeless = {"PATH": os.environ["PATH"], "HOME": "/proc/nowhere", "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
    done = subprocess.run([sys.executable, "-c", program], env=homeless, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "telemetry" not in done.stderr.lower()


def test_a_port_in_use_is_said_before_models_are_loaded(bundles: Path) -> None:
    (bundles / "mlp" / "1" / MANIFEST_FILE).write_text("{")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags in ((f"--grpc-port={port}", "--http-port=0"), ("--grpc-port=0", f"--http-port={port}")):
            assert "cannot be had" in start_and_fail(f"--models-dir={bundles}", *flags)


def test_an_unknown_model_among_the_versions() -> None:
    assert "--versions: there is no model 'mpl'; there are cdcgan, dcgan, mlp, rpgan" in start_and_fail("--versions=mpl=latest:2")


def test_one_address_for_both_families(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--host=::", "--http-host=::", "--insecure", "--max-connection-age-s=0")
    grpc_port, http_port = (where.rpartition(":")[2] for where in (server.target, server.http))
    for host in ("127.0.0.1", "[::1]"):
        with DigitClient(f"{host}:{grpc_port}") as client:
            assert len(client.generate(2, model="mlp").pixels) == 2
        with urllib.request.urlopen(f"http://{host}:{http_port}/readyz", timeout=10) as answer:
            assert answer.read() == b"ready\n"


def test_a_kernel_without_ipv6_is_listened_to_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [usable_host(host) for host in ("::", "[::]", "::1", "0.0.0.0")] == ["::", "::", "::1", "0.0.0.0"]
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    assert [usable_host(host) for host in ("::", "[::]", "::1")] == ["0.0.0.0", "0.0.0.0", "::1"]


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6_is_printed_as_it_can_be_used(host: str, start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server = start_server(f"--host={host}", f"--http-host={host}")
    assert server.target.startswith("[::1]:")
    assert server.http.startswith("[::1]:")
    assert server.get("/readyz") == (200, "ready\n")
    assert server.get("/v1/digits")[0] == 200
    [said] = re.findall(r"^next +make generate TARGET=(\S+) ", server.announced, re.MULTILINE)
    assert main(["--target", said, "--count=1", f"--out={tmp_path / 'digits.png'}"]) == 0


def test_a_unix_socket_counts_as_loopback(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server = start_server(f"--host=unix:{tmp_path}/grpc", "--grpc-port=0")
    assert server.target == f"unix:{tmp_path}/grpc"
    with DigitClient(server.target) as client:
        assert client.generate(1).model == "rpgan"


def test_with_json_logs_all_that_is_said_is_json(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--log-format=json")
    assert re.search(r"^gRPC  127\.0\.0\.1:\d+$", server.announced, re.MULTILINE)
    server.process.send_signal(signal.SIGTERM)
    out, log = server.process.communicate(timeout=60)
    assert out == ""
    assert all(json.loads(line) for line in log.splitlines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_models_are_loaded_stops_it_in_order(number: signal.Signals, tmp_path: Path) -> None:
    shutil.copytree(BUNDLED_DIR / "mlp", tmp_path / "mlp")
    for version in range(2, 13):
        add_version(tmp_path, "mlp", version)
    flags = [f"--models-dir={tmp_path}", "--versions=latest:12", "--grpc-port=0", "--http-port=0", "--provider=cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "serve", *flags], **pipes) as process:
        while "is loaded" not in process.stderr.readline():
            pass
        process.send_signal(number)
        log = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "stopped; 0 requests were cancelled" in log
    assert "Traceback" not in log


def test_a_second_signal_ends_it_at_once_and_without_a_trace(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--drain-grace-s=60")
    server.process.send_signal(signal.SIGINT)
    assert server.process.stderr is not None
    for line in server.process.stderr:
        if "stopping" in line:
            break
    server.process.send_signal(signal.SIGINT)
    _, log = server.process.communicate(timeout=20)
    assert server.process.returncode == 130
    assert "Traceback" not in log


def test_a_unix_socket_is_taken_from_no_server_that_answers(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Issue: a second server took the first one's socket and deleted it in the end, while the first said ready."""
    host = f"--host=unix:{tmp_path}/grpc"
    first = start_server(host)
    assert "another server's" in start_and_fail(host)
    with DigitClient(first.target) as client:
        assert client.generate(1).model == "rpgan"
    (tmp_path / "grpc").unlink()
    assert "another server's" in start_and_fail(host), "also where nobody can reach it any more"
    first.process.kill()
    first.process.communicate()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(f"{tmp_path}/other")
        other.listen()
        assert "another process answers there" in start_and_fail(f"--host=unix:{tmp_path}/other")
    (tmp_path / "file").write_text("kept")
    assert "it is no socket" in start_and_fail(f"--host=unix:{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "kept"


def test_the_socket_of_a_server_that_was_killed_is_replaced(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    host = f"--host=unix:{tmp_path}/grpc"
    killed = start_server(host)
    killed.process.kill()
    killed.process.communicate()
    assert (tmp_path / "grpc").is_socket()
    with DigitClient(start_server(host).target) as client:
        assert client.generate(1).model == "rpgan"


def test_a_start_that_hangs_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    """As a load from a network volume that is stuck."""
    code = (
        "import sys, threading, serve.models.loader as loader, serve.__main__\n"
        "from serve.command_line import run_command\n"
        "from serve.cli import main\n"
        "loader.open_model = lambda *_: (print('loading', flush=True), threading.Event().wait())\n"
        "run_command(main)\n"
    )
    command = [sys.executable, "-c", code, "--grpc-port=0", "--http-port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "stopped while models were loaded" in log
