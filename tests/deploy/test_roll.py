"""A rolling update rehearsed on one machine: two replicas behind HAProxy, callers at a steady load, one replica at a time.

And as Kubernetes does it: the kubelet's probes decide who is an endpoint, endpoints learn of a pod's end later than the pod.
"""

from __future__ import annotations

import random
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.client import DigitClient
from serve.manifest import BUNDLED_DIR
from tests.bundle_copies import add_version
from tests.deploy.manifests import containers, of_kind, rendered, settings_of
from tests.deploy.tools import tool
from tests.server_process import ServerProcess, free_port
from tests.waiting import wait_until

CALLERS = 6
CHECK = "inter 100ms fall 1 rise 1"
SETTINGS = ("--default-model=mlp", "--instances=1", "--drain-grace-s=1", "--drain-deadline-s=10", "--watchdog-s=1")
# A server whose runs hang once there is this file.
HANGING = """
import pathlib, runpy, threading
from serve.engine.session import Engine
launch = Engine.launch
def hang(*arguments):
    if pathlib.Path({flag!r}).exists():
        threading.Event().wait()
    return launch(*arguments)
Engine.launch = hang
runpy.run_module("serve", run_name="__main__", alter_sys=True)
"""


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
  timeout check 2s
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
        self.hangs = [folder / f"hang-{number}" for number in range(2)]
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
        ports = (f"--grpc-port={grpc_port}", f"--http-port={http_port}")
        module = ("-c", HANGING.format(flag=str(self.hangs[number])))
        return ServerProcess(*SETTINGS, f"--models-dir={self.models[release]}", *ports, module=module)

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


def test_a_replica_whose_run_hangs_ends_by_itself_and_costs_the_callers_of_that_run_and_no_more(rehearsal: Rehearsal) -> None:
    hung = rehearsal.replicas[0]
    rehearsal.hangs[0].touch()
    _, log = hung.process.communicate(timeout=60)  # as its supervisor waits for it
    assert hung.process.returncode == 2
    assert "start the server again" in log
    rehearsal.hangs[0].unlink()
    rehearsal.replicas[0] = rehearsal.start(0, 1)
    wait_until(lambda: rehearsal.replicas[0].metric("grpc_server_handled_total", grpc_method="Generate") > 50)
    assert {failure.partition(":")[0] for failure in rehearsal.failures} <= {"INTERNAL"}
    assert 1 <= len(rehearsal.failures) <= CALLERS


FASTER = 5  # than the manifests' own times
COPY_BYTES = 1 << 16


class Node:
    """As much of kubelet and kube-proxy as a roll meets, with the cpu overlay's times shortened.

    A new connection goes to any endpoint; one that stands stays. A pod is an endpoint from its first good readiness probe until
    so many bad ones, or until the news of its end has arrived, ``lag_s`` after the pod itself has it.
    """

    def __init__(self, lag_s: float) -> None:
        [container] = containers(of_kind("overlays/cpu", "Deployment"))
        probe = container["readinessProbe"]
        self.service, self.period_s = probe["grpc"]["service"], probe["periodSeconds"] / FASTER
        self.failures_allowed = probe["failureThreshold"]
        self.sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"] / FASTER
        self.settings = settings_of(rendered("overlays/cpu"), container)
        self.lag_s = lag_s
        # By pod, not by address: the port of one that has ended may be given to the next.
        self.endpoints: set[ServerProcess] = set()
        self.ending: set[ServerProcess] = set()
        self.last_probes: dict[ServerProcess, str] = {}
        self._stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def start_pod(self) -> ServerProcess:
        """A pod, and its probing; returns once it is an endpoint."""
        grace = self.settings.drain_grace_s / FASTER
        pod = ServerProcess("--instances=1", f"--drain-grace-s={grace}", f"--drain-deadline-s={self.settings.drain_deadline_s}")
        threading.Thread(target=self._probe, args=(pod,), daemon=True).start()
        wait_until(lambda: pod in self.endpoints, lambda: f"({self.last_probes.get(pod)}; exit status {pod.process.poll()})")
        return pod

    def end_pod(self, pod: ServerProcess) -> tuple[int, str]:
        """As at a roll: preStop, SIGTERM, and meanwhile the news on its way."""
        self.ending.add(pod)
        threading.Timer(self.lag_s, self.endpoints.discard, [pod]).start()
        time.sleep(self.sleep_s)
        return pod.terminate()

    def _probe(self, pod: ServerProcess) -> None:
        bad = 0
        with grpc.insecure_channel(pod.target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while not self._stop.is_set() and pod not in self.ending:  # what is ending leaves by the news of it
                try:
                    asked = health_pb2.HealthCheckRequest(service=self.service)
                    status = health.Check(asked, timeout=1).status
                    said = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
                except grpc.RpcError as error:
                    said = f"{error.code().name}: {error.details()}"
                self.last_probes[pod] = said
                good = said == "SERVING"
                bad = 0 if good else bad + 1
                if good:
                    self.endpoints.add(pod)
                elif bad >= self.failures_allowed:
                    self.endpoints.discard(pod)
                self._stop.wait(self.period_s)

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = random.choice(list(self.endpoints)).target.rpartition(":")
            try:
                pod = socket.create_connection((host, int(port)), 1)
            except OSError:
                connection.close()
                continue
            threading.Thread(target=forward, args=(connection, pod), daemon=True).start()

    def stop(self) -> None:
        self._stop.set()
        self._listener.close()


def forward(one: socket.socket, other: socket.socket) -> None:
    """Until either side ends."""
    with one, other:
        while True:
            for ready in select.select([one, other], [], [])[0]:
                try:
                    content = ready.recv(COPY_BYTES)
                    (other if ready is one else one).sendall(content)
                except OSError:
                    return
                if not content:
                    return


@pytest.mark.parametrize("late", [0.5, 1.5])
def test_a_roll_by_the_kubelets_probes_fails_no_call_though_endpoints_lag(late: float) -> None:
    """By clients that connect anew every few calls; the news of a pod's end late by so much of the preStop's sleep."""
    node = Node(0.0)
    node.lag_s = late * node.sleep_s
    pods = [node.start_pod() for _ in range(2)]
    failures, done, stop = [], [0], threading.Event()

    def call() -> None:
        while not stop.is_set():
            with DigitClient(f"127.0.0.1:{node.port}", timeout_s=20) as client:
                for _ in range(5):
                    try:
                        client.generate(1, model="mlp", seed=1)
                        done[0] += 1
                    except grpc.RpcError as error:
                        failures.append(f"{error.code().name}: {error.details()}")

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        for number in range(2):
            successor = node.start_pod()  # maxSurge 1, maxUnavailable 0
            status, _ = node.end_pod(pods[number])
            assert status == 0
            pods[number] = successor
        wanted = done[0] + 100
        wait_until(lambda: done[0] >= wanted)
    finally:
        stop.set()
        for caller in callers:
            caller.join(30)
        node.stop()
        for pod in pods:
            pod.kill()
    assert done[0] > 200
    assert failures == []
