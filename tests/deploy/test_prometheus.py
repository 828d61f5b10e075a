"""A real Prometheus with our rules on a running server: the recordings give numbers, alerts fire by their causes and clear.

The rules are the deployed ones with their times shortened, minutes to seconds, so that what takes half an hour takes half
a minute. Causes that a whole server cannot be brought to (a wrong pixel, a GPU's memory) go through ``promtool test rules``.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from serve.client.channel import CHANNEL_OPTIONS
from serve.manifest import BUNDLED_DIR
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from tests.bundle_copies import add_version, break_golden
from tests.deploy.tools import run, tool
from tests.server_process import ServerProcess

RULES = Path("deploy/monitoring/prometheusrule.yaml")
SHORTER = {"15s": "1s", "1m": "6s", "2m": "2s", "5m": "10s", "10m": "15s", "1h": "20s"}
WAIT_S = 90


def groups() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["spec"]["groups"]
    return found


def shortened() -> str:
    """The rules with every duration shortened."""
    text = yaml.safe_dump({"groups": groups()})
    text = re.sub(r"\[(\w+)\]", lambda match: f"[{SHORTER[match[1]]}]", text)
    text = re.sub(r"for: (\w+)", lambda match: f"for: {'1s' if match[1] == '1m' else '2s'}", text)
    return re.sub(r"interval: (\w+)", lambda match: f"interval: {SHORTER[match[1]]}", text)


class Prometheus:
    """A Prometheus process that scrapes one server every second."""

    def __init__(self, folder: Path, target: str) -> None:
        (folder / "rules.yml").write_text(shortened())
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(folder / "rules.yml")],
            "scrape_configs": [{"job_name": "digits-serve", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [
            tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.address}", "--log.level=error", "--query.lookback-delta=5s",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.until(lambda: self.value("up") is not None)

    def get(self, path: str) -> Any:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=5) as answer:
                return json.load(answer)["data"]
        except OSError:
            if self.process.poll() is not None:
                raise AssertionError(f"prometheus ended: {self.process.communicate()[1]}") from None
            return {"result": [], "alerts": []}

    def value(self, query: str) -> float | None:
        """The largest value of a query's result; None when it is empty."""
        found = self.get(f"/api/v1/query?query={urllib.parse.quote(query)}")["result"]
        return max((float(each["value"][1]) for each in found), default=None)

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.get("/api/v1/alerts")["alerts"] if alert["state"] == "firing"}

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, "it does not happen"
            time.sleep(0.2)

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=30)


class LoadedServer:
    """A server that polls a models folder, with a steady load that can be made a flood."""

    def __init__(self, models: Path) -> None:
        self.flags = [
            f"--models-dir={models}", "--poll-interval-s=0.2", "--instances=1",
        ]  # fmt: skip
        self.server = ServerProcess(*self.flags)
        self.flooding = threading.Event()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(40)]
        for thread in self._threads:
            thread.start()

    def _call(self, number: int) -> None:
        with grpc.insecure_channel(self.server.target, CHANNEL_OPTIONS[1:]) as channel:
            stub = pb_grpc.DigitGeneratorStub(channel)
            while not self._stop.is_set():
                if number and not self.flooding.is_set():
                    time.sleep(0.05)
                    continue
                count = 512 if self.flooding.is_set() else 16
                try:
                    stub.Generate(pb.GenerateRequest(model="dcgan", count=count, seed=number), timeout=30)
                except grpc.RpcError:
                    time.sleep(0.1)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        self.server.kill()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, LoadedServer, Path]]:
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(BUNDLED_DIR, models, dirs_exist_ok=True)
    loaded = LoadedServer(models)
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), loaded.server.http)
    yield prometheus, loaded, models
    prometheus.stop()
    loaded.stop()


def test_the_server_is_up_and_every_recording_gives_a_number(watched: tuple[Prometheus, LoadedServer, Path]) -> None:
    prometheus, _, _ = watched
    prometheus.until(lambda: prometheus.value("up") == 1)
    names = [rule["record"] for group in groups() for rule in group["rules"] if "record" in rule]
    assert len(names) >= 8
    # No error is no number where the numerator has no series: the ratio appears with the first failure.
    for name in names:
        if "errors" not in name:
            prometheus.until(lambda: prometheus.value(name) is not None)  # noqa: B023  # called before the next turn
    assert prometheus.value("digits:images:rate1m") or prometheus.value("sum(digits_images_total)")
    assert prometheus.firing() == set()


def test_a_version_that_cannot_be_loaded_fires_and_clears(watched: tuple[Prometheus, LoadedServer, Path]) -> None:
    prometheus, _, models = watched
    beside = models / ".bad"
    shutil.copytree(models / "mlp" / "1", beside)
    break_golden(beside)
    beside.rename(models / "mlp" / "7")
    renumbered = json.loads((models / "mlp" / "7" / "manifest.json").read_text()) | {"version": 7}
    (models / "mlp" / "7" / "manifest.json").write_text(json.dumps(renumbered))
    prometheus.until(lambda: "DigitsModelFailed" in prometheus.firing())
    shutil.rmtree(models / "mlp" / "7")
    prometheus.until(lambda: "DigitsModelFailed" not in prometheus.firing())
    add_version(models, "mlp", 2)
    prometheus.until(lambda: prometheus.value('digits_model_ready{model="mlp",version="2"}') == 1)


def test_a_flood_fires_the_queue_and_the_latency_and_both_clear(watched: tuple[Prometheus, LoadedServer, Path]) -> None:
    prometheus, loaded, _ = watched
    loaded.flooding.set()
    prometheus.until(lambda: {"DigitsQueueNearItsBound", "DigitsSlow"} <= prometheus.firing())
    loaded.flooding.clear()
    prometheus.until(lambda: not {"DigitsQueueNearItsBound", "DigitsSlow"} & prometheus.firing())


def test_a_server_that_is_gone_fires_and_clears_when_it_is_back(watched: tuple[Prometheus, LoadedServer, Path]) -> None:
    prometheus, loaded, _ = watched
    loaded.server.kill()
    prometheus.until(lambda: "DigitsDown" in prometheus.firing())
    grpc_port, http_port = (address.rpartition(":")[2] for address in (loaded.server.target, loaded.server.http))
    loaded.server = ServerProcess(*loaded.flags, f"--grpc-port={grpc_port}", f"--http-port={http_port}")
    prometheus.until(lambda: "DigitsDown" not in prometheus.firing())


def test_the_metrics_are_as_prometheus_wants_them(shared_server: ServerProcess) -> None:
    exposition = shared_server.get("/metrics")[1]
    ours = [line for line in exposition.splitlines(keepends=True) if re.match(r"(# \w+ )?(digits_|grpc_)", line)]
    done = run("promtool", "check", "metrics", stdin="".join(ours))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_rules_are_valid(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups()}))
    done = run("promtool", "check", "rules", str(tmp_path / "rules.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


LABELS = {"instance": "pod", "model": "dcgan", "version": "1"}

# Alert → series that bring it about, with the minute by which it fires; and the same when all is well.
CAUSES: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "DigitsModelNotReady": ({"digits_model_ready": "0x20"}, {"digits_model_ready": "1x20"}, "5m"),
    "DigitsErrorBudgetBurn": (
        {'grpc_server_handled_total{grpc_code="INTERNAL"}': "0+5x120", 'grpc_server_handled_total{grpc_code="OK"}': "0+100x120"},
        {
            'grpc_server_handled_total{grpc_code="INVALID_ARGUMENT"}': "0+90x120",
            'grpc_server_handled_total{grpc_code="OK"}': "0+100x120",
        },
        "70m",
    ),
    "DigitsSelfCheckBreach": (
        {'digits_self_checks_total{result="breach"}': "0 0 0 1 1 1"},
        {'digits_self_checks_total{result="passed"}': "0+1x20"},
        "5m",
    ),
    "DigitsParityBreach": ({"digits_watch_breaches_total": "0 0 0 1 1 1"}, {"digits_watch_breaches_total": "0x20"}, "5m"),
    "DigitsOnTheWrongProvider": (
        {'digits_provider{provider="cpu"}': "1x20", 'digits_expected_provider{provider="cuda"}': "1x20"},
        {'digits_provider{provider="cpu"}': "1x20", 'digits_expected_provider{provider="cpu"}': "1x20"},
        "5m",
    ),
    "DigitsGpuMemoryHigh": (
        {"digits_gpu_memory_used_bytes": "97x20", "digits_gpu_memory_total_bytes": "100x20"},
        {"digits_gpu_memory_used_bytes": "50x20", "digits_gpu_memory_total_bytes": "100x20"},
        "10m",
    ),
}


@pytest.mark.parametrize("alert", CAUSES)
@pytest.mark.parametrize("well", [False, True])
def test_an_alert_fires_by_its_cause_and_not_when_all_is_well(alert: str, well: bool, tmp_path: Path) -> None:
    bad, good, at = CAUSES[alert]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups()}))

    def series(name: str) -> str:
        own = ",".join(f'{key}="{value}"' for key, value in LABELS.items())
        bare, _, labels = name.rstrip("}").partition("{")
        return f"{bare}{{{own}{',' + labels if labels else ''}}}"

    inputs = [{"series": series(name), "values": values} for name, values in (good if well else bad).items()]
    query = f'ALERTS{{alertname="{alert}",alertstate="firing"}} > 0'
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": inputs,
                "promql_expr_test": [{"expr": f"count({query}) > 0 or vector(0)", "eval_time": at,
                                      "exp_samples": [{"labels": "{}", "value": 0 if well else 1}]}],
            }
        ],
    }  # fmt: skip
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = run("promtool", "test", "rules", str(tmp_path / "test.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_brought_about_here() -> None:
    real = {"DigitsDown", "DigitsModelFailed", "DigitsSlow", "DigitsQueueNearItsBound"}
    assert {rule["alert"] for group in groups() for rule in group["rules"] if "alert" in rule} == real | CAUSES.keys()
