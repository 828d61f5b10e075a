"""Standard streams that are closed, full or read by nobody: commands end in order, and the server serves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.client import DigitClient
from tests.server_process import ServerProcess
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
CLOSED = ("<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-")
SERVE = f"exec {sys.executable} -m serve --http-port=0 --provider=cpu"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


def tokens_in(path: Path) -> list[str]:
    return [each["name"] for each in json.loads(path.read_text())["tokens"]] if path.exists() else []


COMMANDS = {
    "tokens": "serve.access.tokens add {folder}/tokens.json --name jobs",
    "client": "serve.client --target {target} --out {folder}/digits.png",
    "dataset": "serve.dataset write --count 1 --provider cpu --out {folder}/digits",
    "help": "serve --help",
    "train": "train --help",
}


@pytest.mark.parametrize("streams", [">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("name", [*[name for name in COMMANDS if name != "train"], pytest.param("train", marks=pytest.mark.long)])
def test_a_command_does_its_work_without_streams(name: str, streams: str, shared_server: ServerProcess, tmp_path: Path) -> None:
    """Issue: with closed streams they ended with an AttributeError though their work was done."""
    command = COMMANDS[name].format(folder=tmp_path, target=shared_server.target)
    done = shell(f"exec {sys.executable} -m {command} {streams}")
    assert (done.returncode, done.stderr) == (0, "")
    made = {"client": "digits.png", "dataset": "digits/part-00000-of-00001.pixels", "tokens": "tokens.json"}.get(name)
    assert made is None or (tmp_path / made).exists()


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_a_full_standard_output_is_one_line(name: str, buffered: bool, shared_server: ServerProcess, tmp_path: Path) -> None:
    command = COMMANDS[name].format(folder=tmp_path, target=shared_server.target)
    done = shell(f"{'' if buffered else 'PYTHONUNBUFFERED=1'} {sys.executable} -m {command} > /dev/full")
    assert (done.returncode, done.stderr) == (2, "error: standard output cannot be written to (No space left on device)\n")


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", b"\\u2013 \xdf"), ("utf-8", b"\xe2\x80\x93 \xdf"), ("ascii:replace", b"? ?")]
)
def test_what_a_terminal_lacks_is_printed_some_other_way(encoding: str, printed: bytes) -> None:
    """Issue: a run that was finished ended with a UnicodeEncodeError, of a dash in a table or a path in Latin-1."""
    code = "from serve.command_line import open_standard_streams; open_standard_streams(); print('\\u2013 \\udcdf', end='')"
    variables = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, check=True, cwd=ROOT)
    assert done.stdout == printed


def test_a_token_that_nobody_has_seen_is_not_in_force(tmp_path: Path) -> None:
    """Issue: it was stored, and then could not be shown."""
    path = tmp_path / "tokens.json"
    assert shell(f"{sys.executable} -m serve.access.tokens add {path} --name jobs > /dev/full").returncode == 2
    assert tokens_in(path) == []
    done = shell(f"{sys.executable} -m serve.access.tokens add {path} --name jobs")
    assert done.stdout.startswith("jobs.")
    assert tokens_in(path) == ["jobs"]


@pytest.mark.long
@pytest.mark.parametrize("streams", [*CLOSED, "> /dev/full", "2> /dev/full", "> /dev/full 2>&1"])
def test_a_server_without_streams_serves_and_stops_in_order(streams: str, tmp_path: Path) -> None:
    """Issue: with closed streams it aborted at SIGTERM (134); a full standard output ended it at start."""
    target = f"unix:{tmp_path}/grpc"
    with subprocess.Popen(["bash", "-c", f"{SERVE} --host={target} {streams}"], cwd=ROOT, stderr=subprocess.PIPE) as server:
        with DigitClient(target) as client:
            assert len(client.generate(2, seed=1).pixels) == 2
        server.send_signal(signal.SIGTERM)
        log = server.communicate(timeout=60)[1]
    assert server.returncode == 0
    assert b"Traceback" not in log


@pytest.mark.long
def test_a_log_that_nobody_reads_stops_no_thread_that_serves(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Issue: 64 KiB of unread log stopped the gRPC port, while /healthz said alive."""
    (tmp_path / "tokens.json").write_text('{"tokens": []}')
    server = start_server(f"--tokens-file={tmp_path}/tokens.json", "--log-level=debug", "--http-names=x")
    reading = server.process.stderr
    assert reading is not None
    os.set_blocking(reading.fileno(), True)
    (tmp_path / "tokens.json").write_text("{" + " " * 10)
    # A line for each look at a broken file would take long: fill the pipe itself, as a chatty library would.
    with open(f"/proc/{server.process.pid}/fd/2", "wb", buffering=0) as pipe:  # noqa: PTH123
        os.set_blocking(pipe.fileno(), False)
        try:
            while pipe.write(b"x" * 4096):
                pass
        except BlockingIOError:
            pass
        os.set_blocking(pipe.fileno(), True)
    for _ in range(3):
        with urllib.request.urlopen(f"http://{server.http}/healthz", timeout=5) as answer:
            assert answer.status == 200
        time.sleep(1.1)  # a denied call is a line, once a second
        with DigitClient(server.target, 5) as client, pytest.raises(Exception, match="UNAUTHENTICATED"):
            client.generate(1)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.process.poll() is not None)
    assert server.process.returncode == 0
