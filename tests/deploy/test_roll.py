"""A rolling update rehearsed on one machine: two replicas behind HAProxy, callers at a steady load, one replica at a time."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from serve.client import DigitClient
from serve.manifest import BUNDLED_DIR
from tests.bundle_copies import add_version
from tests.deploy.tools import tool
from tests.server_process import ServerProcess
from tests.waiting import wait_until

CALLERS = 6
CHECK = "inter 100ms fall 1 rise 1"
SETTINGS = ("--default-model=mlp", "--instances=1", "--drain-grace-s=1", "--drain-deadline-s=10")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


class Proxy:
    """HAProxy speaking HTTP/2 on both sides; takes a replica out when its /readyz says so. Counts the tries it forwards."""

    def __init__(self, folder: Path, replicas: list[tuple[int, int]]) -> None:
        self.port = free_port()
        self._log = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._log.bind(("127.0.0.1", 0))
        self._log.settimeout(0.2)
        servers = "\n".join(
            f"  server replica{number} 127.0.0.1:{grpc_port} proto h2 check check-proto h1 port {http_port} {CHECK}"
            for number, (grpc_port, http_port) in enumerate(replicas)
        )
        (folder / "haproxy.cfg").write_text(f"""
global
  log 127.0.0.1:{self._log.getsockname()[1]} local0
defaults
  mode http
  timeout connect 1s
  timeout client 60s
  timeout server 60s
  log global
frontend grpc
  bind 127.0.0.1:{self.port} proto h2
  http-request capture req.hdr(grpc-previous-rpc-attempts) len 4
  log-format "%HP tries=%[capture.req.hdr(0)] status=%ST"
  default_backend replicas
backend replicas
  balance roundrobin
  option httpchk GET /readyz
{servers}
""")
        self.retries = 0
        self._stop = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        command = [tool("haproxy"), "-db", "-q", "-f", str(folder / "haproxy.cfg")]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def _read(self) -> None:
        while not self._stop.is_set():
            try:
                line = self._log.recv(2048).decode()
            except TimeoutError:
                continue
            self.retries += "/Generate " in line and "tries=- " not in line

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=30)
        self._stop.set()
        self._reader.join(10)
        self._log.close()


class Rehearsal:
    """Two replicas on fixed ports behind a proxy, and callers who count."""

    def __init__(self, folder: Path) -> None:
        self.models = {version: folder / f"release-{version}" for version in (1, 2)}
        for version, models in self.models.items():
            models.mkdir()
            shutil.copytree(BUNDLED_DIR / "mlp", models / "mlp")
            if version == 2:
                add_version(models, "mlp", 2)
        self.ports = [(free_port(), free_port()) for _ in range(2)]
        self.replicas = [self.start(number, 1) for number in range(2)]
        self.proxy = Proxy(folder, self.ports)
        self.versions: list[int] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(CALLERS)]
        for thread in self._threads:
            thread.start()
        self.more_calls(200)

    def start(self, number: int, release: int) -> ServerProcess:
        grpc_port, http_port = self.ports[number]
        return ServerProcess(
            *SETTINGS, f"--models-dir={self.models[release]}", f"--grpc-port={grpc_port}", f"--http-port={http_port}"
        )

    def _call(self, seed: int) -> None:
        with DigitClient(f"127.0.0.1:{self.proxy.port}", timeout_s=30) as client:
            expected = client.generate(8, seed=seed).pixels.astype(int)
            while not self._stop.is_set():
                try:
                    digits = client.generate(8, seed=seed)
                except grpc.RpcError as error:
                    self.failures.append(f"{error.code().name}: {error.details()}")
                    continue
                self.versions.append(digits.version)
                if int(np.abs(digits.pixels - expected).max()) > 1:
                    self.failures.append("wrong digits")

    def more_calls(self, count: int) -> None:
        wanted = len(self.versions) + count
        wait_until(lambda: len(self.versions) >= wanted)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        self.proxy.stop()
        for replica in self.replicas:
            replica.kill()


@pytest.fixture
def rehearsal(tmp_path: Path) -> Iterator[Rehearsal]:
    made = Rehearsal(tmp_path)
    yield made
    made.stop()


def test_a_roll_to_a_new_release_fails_no_call(rehearsal: Rehearsal) -> None:
    for number in range(2):
        status, log = rehearsal.replicas[number].terminate()
        assert status == 0
        assert "0 requests were cancelled" in log
        rehearsal.replicas[number] = rehearsal.start(number, 2)
        wait_until(lambda: rehearsal.replicas[number].metric("grpc_server_handled_total", grpc_method="Generate") > 50)  # noqa: B023
    rehearsal.more_calls(100)
    assert rehearsal.failures == []
    assert rehearsal.versions[:100] == [1] * 100
    assert rehearsal.versions[-50:] == [2] * 50


def test_a_replica_killed_outright_costs_a_second_try_of_what_it_was_at_and_no_more(rehearsal: Rehearsal) -> None:
    before = rehearsal.proxy.retries
    rehearsal.replicas[0].kill()
    rehearsal.more_calls(300)
    rehearsal.replicas[0] = rehearsal.start(0, 1)
    wait_until(lambda: rehearsal.replicas[0].metric("grpc_server_handled_total", grpc_method="Generate") > 50)
    assert rehearsal.failures == []
    # Each caller has one call in flight; until the proxy has noticed, a tenth of a second, more may be sent there.
    assert rehearsal.proxy.retries - before <= 10 * CALLERS
