"""A real Prometheus with our rules on a running server: the recordings give numbers, alerts fire by their causes and clear.

The rules are the deployed ones with their times shortened, minutes to seconds, so that what takes half an hour takes half
a minute. Causes that a whole server cannot be brought to (a wrong pixel, a GPU's memory) go through ``promtool test rules``.
"""

from __future__ import annotations

import json
import math
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
SHORTER = {
    "15s": "1s", "1m": "6s", "2m": "2s", "5m": "10s", "10m": "15s", "15m": "15s", "30m": "20s", "1h": "20s",
    "6h": "60s", "3d": "60s",
}  # fmt: skip
WAIT_S = 90


def groups() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["spec"]["groups"]
    return found


def shortened() -> str:
    """The rules with every duration shortened."""
    text = yaml.safe_dump({"groups": groups()})
    text = re.sub(
        r"\[(\w+)\]|offset (\w+)", lambda match: match[0].replace(match[1] or match[2], SHORTER[match[1] or match[2]]), text
    )
    text = re.sub(r"for: (\w+)", lambda match: f"for: {'1s' if match[1] == '1m' else '2s'}", text)
    return re.sub(r"interval: (\w+)", lambda match: f"interval: {SHORTER[match[1]]}", text)


class Prometheus:
    """A Prometheus process that scrapes one server every second."""

    def __init__(self, folder: Path, target: str) -> None:
        (folder / "rules.yml").write_text(shortened())
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(folder / "rules.yml")],
            "scrape_configs": [
                {
                    "job_name": "digits-serve",
                    "static_configs": [{"targets": [target], "labels": {"namespace": "digits", "overlay": "cpu"}}],
                }
            ],
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
        """The largest value of a query's result, 0 divided by 0 left out; None when it is empty."""
        found = self.get(f"/api/v1/query?query={urllib.parse.quote(query)}")["result"]
        values = (float(each["value"][1]) for each in found)
        return max((value for value in values if math.isfinite(value)), default=None)

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.get("/api/v1/alerts")["alerts"] if alert["state"] == "firing"}

    def until(self, condition: Callable[[], object], what: str = "it") -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"{what} does not happen"
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
    prometheus, loaded, _ = watched
    prometheus.until(lambda: prometheus.value("up") == 1)
    assert loaded.server.get("/v1/digits")[0] == 200
    names = [rule["record"] for group in groups() for rule in group["rules"] if "record" in rule]
    assert len(names) >= 8
    for name in names:
        prometheus.until(lambda: prometheus.value(name) is not None)  # noqa: B023  # called before the next turn
    assert prometheus.value("deployment_model_version:digits_images:rate1m") or prometheus.value("sum(digits_images_total)")
    prometheus.until(lambda: prometheus.firing() == set())


def test_every_panel_shows_a_number_while_all_is_well(watched: tuple[Prometheus, LoadedServer, Path]) -> None:
    prometheus, loaded, _ = watched
    variables = {"$namespace": ".*", "$pod": ".*", "$__rate_interval": "6s"}
    for panel in json.loads(Path("deploy/monitoring/dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            for name, value in variables.items():
                query = query.replace(name, value)
            assert loaded.server.get("/v1/digits")[0] == 200  # gRPC is called all the time
            prometheus.until(lambda: prometheus.value(query) is not None, f"{panel['title']}: {query}")  # noqa: B023


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
    prometheus.until(lambda: "DigitsRestarted" in prometheus.firing())
    prometheus.until(lambda: "DigitsRestarted" not in prometheus.firing())


def test_the_metrics_are_as_prometheus_wants_them(shared_server: ServerProcess) -> None:
    exposition = shared_server.get("/metrics")[1]
    ours = [line for line in exposition.splitlines(keepends=True) if re.match(r"(# \w+ )?(digits_|grpc_|http_)", line)]
    done = run("promtool", "check", "metrics", stdin="".join(ours))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_rules_are_valid(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups()}))
    done = run("promtool", "check", "rules", str(tmp_path / "rules.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


OURS = {"namespace": "digits", "overlay": "cpu", "instance": "pod", "model": "dcgan", "version": "1", "job": "digits-serve"}
WATCH = 'job="digits-parity-watch"'
HPA = 'horizontalpodautoscaler="digits-serve"'
OK, BAD = 'grpc_server_handled_total{grpc_code="OK"}', 'grpc_server_handled_total{grpc_code="INTERNAL"}'
HTTP = "http_server_request_duration_seconds"
HTTP_OK, HTTP_BAD = (f'{HTTP}_count{{route="/v1/digits",status="{status}"}}' for status in (200, 500))
REFUSED = "digits_drain_refusals_total"
FULL, LIMITED = 'grpc_server_handled_total{grpc_code="RESOURCE_EXHAUSTED"}', 'digits_access_denied_total{reason="images"}'
GONE = 'grpc_server_handled_total{grpc_code="UNAVAILABLE"}'

Series = dict[str, str]

# Alert, whether it fires, why → the series that bring it about or not, and the time by which. Written apart from the rules.
CASES: dict[tuple[str, bool, str], tuple[Series, str]] = {
    ("DigitsDown", True, "every pod is gone"): (
        {"digits_build_info": "1x10 _x60", "up": "1x10 _x60", f"up{{{WATCH}}}": "1x70"},
        "20m",
    ),
    ("DigitsDown", True, "every pod answers no scrape"): ({"digits_build_info": "1x10 _x60", "up": "1x10 0x60"}, "20m"),
    ("DigitsDown", True, "there never was one"): ({f"up{{{WATCH}}}": "1x20"}, "10m"),
    ("DigitsDown", False, "one of two is gone"): (
        {
            'digits_build_info{instance="a"}': "1x60",
            'up{instance="a"}': "1x60",
            'digits_build_info{instance="b"}': "1x10 _x50",
            'up{instance="b"}': "1x10 0x50",
        },
        "30m",
    ),
    ("DigitsDown", True, "of two namespaces one is gone"): (
        {
            'digits_build_info{namespace="a"}': "1x60",
            'up{namespace="a"}': "1x60",
            'digits_build_info{namespace="b"}': "1x10 _x50",
            'up{namespace="b"}': "1x10 _x50",
        },
        "30m",
    ),
    ("DigitsDown", True, "production is gone beside a dev pod"): (
        {
            'digits_build_info{overlay="dev"}': "1x60",
            'up{overlay="dev"}': "1x60",
            "digits_build_info": "1x10 _x50",
            "up": "1x10 _x50",
        },
        "30m",
    ),
    ("DigitsPodDown", True, "a pod answers no scrape"): ({"up": "1x5 0x20"}, "15m"),
    ("DigitsPodDown", False, "a pod is restarted"): ({"up": "1x5 0x3 1x20"}, "15m"),
    ("DigitsPodDown", False, "another's pod"): ({'up{job="else/where"}': "0x30"}, "15m"),
    ("DigitsNoModel", True, "a pod waits for its first model"): ({"digits_models_loaded": "0x20"}, "5m"),
    ("DigitsNoModel", True, "its volume was emptied, beside a pod that serves"): (
        {"digits_models_loaded": "4x5 0x20", 'digits_models_loaded{instance="other"}': "4x30"},
        "10m",
    ),
    ("DigitsNoModel", False, "it serves one"): ({"digits_models_loaded": "0 1x20"}, "10m"),
    ("DigitsModelNotReady", True, "a model answers nothing"): ({"digits_model_ready": "0x20"}, "5m"),
    ("DigitsModelNotReady", False, "for a moment"): ({"digits_model_ready": "1x3 0 1x20"}, "5m"),
    ("DigitsModelFailed", True, "a version cannot be loaded"): ({"digits_model_failed": "1x20"}, "5m"),
    ("DigitsModelFailed", False, "it has been taken away"): ({"digits_model_failed": "1 _x20"}, "8m"),
    ("DigitsErrorBudgetBurn", True, "a twentieth fails"): ({BAD: "0+5x120", OK: "0+100x120", REFUSED: "0x120"}, "70m"),
    ("DigitsErrorBudgetBurn", True, "a twentieth fails over HTTP, and nobody calls over gRPC"): (
        {HTTP_BAD: "0+5x120", HTTP_OK: "0+100x120", REFUSED: "0x120"},
        "70m",
    ),
    ("DigitsErrorBudgetBurn", True, "what fails over HTTP is much of all calls"): (
        {BAD: "0x120", OK: "0+100x120", HTTP_BAD: "0+5x120", HTTP_OK: "0+100x120", REFUSED: "0x120"},
        "70m",
    ),
    ("DigitsErrorBudgetBurn", False, "what fails over HTTP is little of all calls"): (
        {BAD: "0x120", OK: "0+2000x120", HTTP_BAD: "0+5x120", HTTP_OK: "0+100x120", REFUSED: "0x120"},
        "70m",
    ),
    ("DigitsErrorBudgetBurn", False, "callers' own mistakes over HTTP, and who asks whether it is ready"): (
        {
            f'{HTTP}_count{{route="/v2/models/{{model}}/infer",status="400"}}': "0+90x120",
            f'{HTTP}_count{{route="/v2/health/ready",status="503"}}': "0+90x120",
            HTTP_BAD: "0x120",
            HTTP_OK: "0+100x120",
            REFUSED: "0x120",
        },
        "70m",
    ),
    ("DigitsErrorBudgetBurn", False, "another program in the namespace fails over HTTP"): (
        {
            f'{HTTP}_count{{job="else/where",route="/x",status="500"}}': "0+90x120",
            HTTP_BAD: "0x120",
            HTTP_OK: "0+100x120",
            REFUSED: "0x120",
        },
        "70m",
    ),
    ("DigitsErrorBudgetBurn", False, "callers' own mistakes"): (
        {'grpc_server_handled_total{grpc_code="INVALID_ARGUMENT"}': "0+90x120", OK: "0+100x120", BAD: "0x120", REFUSED: "0x120"},
        "70m",
    ),
    ("DigitsErrorBudgetBurn", False, "a roll: refusals while draining"): (
        {GONE: "0x60 0+20x10 200x50", OK: "0+100x120", REFUSED: "0x60 0+20x10 200x50"},
        "70m",
    ),
    ("DigitsErrorBudgetBurn", False, "a single error at night"): ({BAD: "0x60 1x60", OK: "0+0.2x120", REFUSED: "0x120"}, "62m"),
    ("DigitsErrorBudgetBurn", False, "it is over"): ({BAD: "0+5x60 300x60", OK: "0+100x120", REFUSED: "0x120"}, "75m"),
    ("DigitsErrorBudgetBurnSlow", True, "a hundredth fails, for hours"): (
        {BAD: "0+1x500", OK: "0+100x500", REFUSED: "0x500"},
        "7h",
    ),
    ("DigitsErrorBudgetBurnSlow", False, "a single error a night"): (
        {BAD: "0x300 1x200", OK: "0+0.2x500", REFUSED: "0x500"},
        "5h10m",
    ),
    ("DigitsErrorBudgetBurnSlow", False, "a thousandth fails"): ({BAD: "0+1x500", OK: "0+1000x500", REFUSED: "0x500"}, "7h"),
    ("DigitsErrorBudgetBurnSteady", True, "two thousandths, for days"): (
        {BAD: "0+2x600", OK: "0+1000x600", REFUSED: "0x600"},
        "9h",
    ),
    ("DigitsErrorBudgetBurnSteady", False, "half of what is allowed"): (
        {BAD: "0+1x600", OK: "0+2000x600", REFUSED: "0x600"},
        "9h",
    ),
    ("DigitsShedding", True, "a tenth is refused"): ({FULL: "0+10x30", OK: "0+90x30", REFUSED: "0x30"}, "20m"),
    ("DigitsShedding", True, "a tenth is refused over HTTP"): (
        {f'{HTTP}_count{{route="/v1/digits",status="429"}}': "0+10x30", HTTP_OK: "0+90x30", REFUSED: "0x30"},
        "20m",
    ),
    ("DigitsShedding", True, "a tenth is refused, and another caller is over its limit"): (
        {FULL: "0+20x30", OK: "0+80x30", LIMITED: "0+10x30", REFUSED: "0x30"},
        "20m",
    ),
    ("DigitsShedding", False, "a hundredth is refused"): ({FULL: "0+1x30", OK: "0+99x30", REFUSED: "0x30"}, "20m"),
    ("DigitsShedding", False, "a caller is over its own limit"): (
        {FULL: "0+30x30", OK: "0+70x30", LIMITED: "0+30x30", REFUSED: "0x30"},
        "20m",
    ),
    ("DigitsDeadlinesMissed", True, "a twentieth is too late"): (
        {'grpc_server_handled_total{grpc_code="DEADLINE_EXCEEDED"}': "0+5x40", OK: "0+95x40"},
        "30m",
    ),
    ("DigitsDeadlinesMissed", True, "a twentieth is too late over HTTP"): (
        {f'{HTTP}_count{{route="/v1/digits",status="504"}}': "0+5x40", HTTP_OK: "0+95x40"},
        "30m",
    ),
    ("DigitsDeadlinesMissed", False, "one in a thousand"): (
        {'grpc_server_handled_total{grpc_code="DEADLINE_EXCEEDED"}': "0+1x40", OK: "0+999x40"},
        "30m",
    ),
    ("DigitsSlow", True, "a hundredth takes over a second"): (
        {
            'grpc_server_handling_seconds_bucket{grpc_method="Generate",le="1.0"}': "0+90x30",
            'grpc_server_handling_seconds_bucket{grpc_method="Generate",le="2.5"}': "0+100x30",
            'grpc_server_handling_seconds_bucket{grpc_method="Generate",le="+Inf"}': "0+100x30",
        },
        "15m",
    ),
    ("DigitsSlow", True, "a hundredth takes over a second over HTTP"): (
        {
            f'{HTTP}_bucket{{route="/v2/models/{{model}}/infer",le="1.0"}}': "0+90x30",
            f'{HTTP}_bucket{{route="/v2/models/{{model}}/infer",le="2.5"}}': "0+100x30",
            f'{HTTP}_bucket{{route="/v2/models/{{model}}/infer",le="+Inf"}}': "0+100x30",
        },
        "15m",
    ),
    ("DigitsSlow", False, "a stream takes long"): (
        {
            'grpc_server_handling_seconds_bucket{grpc_method="GenerateStream",le="1.0"}': "0x30",
            'grpc_server_handling_seconds_bucket{grpc_method="GenerateStream",le="+Inf"}': "0+100x30",
        },
        "15m",
    ),
    ("DigitsQueueNearItsBound", True, "nine tenths"): ({"digits_queue_images": "9x9", "digits_queue_limit_images": "10x9"}, "5m"),
    ("DigitsQueueNearItsBound", False, "half"): ({"digits_queue_images": "5x9", "digits_queue_limit_images": "10x9"}, "5m"),
    ("DigitsAutoscalerAtItsMaximum", True, "eight of eight"): (
        {
            f"kube_horizontalpodautoscaler_status_current_replicas{{{HPA}}}": "8x30",
            f"kube_horizontalpodautoscaler_spec_max_replicas{{{HPA}}}": "8x30",
        },
        "25m",
    ),
    ("DigitsAutoscalerAtItsMaximum", False, "seven of eight"): (
        {
            f"kube_horizontalpodautoscaler_status_current_replicas{{{HPA}}}": "7x30",
            f"kube_horizontalpodautoscaler_spec_max_replicas{{{HPA}}}": "8x30",
        },
        "25m",
    ),
    ("DigitsAutoscalerBlind", True, "the adapter serves no metric"): (
        {f'kube_horizontalpodautoscaler_status_condition{{{HPA},condition="ScalingActive",status="false"}}': "1x40"},
        "30m",
    ),
    ("DigitsAutoscalerBlind", True, "KEDA's query finds nothing"): (
        {'keda_scaled_object_errors_total{scaledObject="digits-serve"}': "0+4x40"},
        "35m",
    ),
    ("DigitsAutoscalerBlind", False, "it has one"): (
        {
            f'kube_horizontalpodautoscaler_status_condition{{{HPA},condition="ScalingActive",status="false"}}': "0x40",
            f'kube_horizontalpodautoscaler_status_condition{{{HPA},condition="ScalingActive",status="true"}}': "1x40",
            'keda_scaled_object_errors_total{scaledObject="digits-serve"}': "5x40",
        },
        "35m",
    ),
    ("DigitsSelfCheckFails", True, "each of them"): ({'digits_self_checks_total{result="failed"}': "0+1x20"}, "15m"),
    ("DigitsSelfCheckFails", False, "the queue is full"): ({'digits_self_checks_total{result="skipped"}': "0+1x20"}, "15m"),
    ("DigitsRestarted", True, "a container ended by itself"): ({"process_start_time_seconds": "60x5 _x2 480x10"}, "10m"),
    ("DigitsRestarted", False, "it was long ago"): ({"process_start_time_seconds": "60x5 _x2 480x40"}, "40m"),
    ("DigitsRestarted", False, "a roll: another pod in its place"): (
        {'process_start_time_seconds{instance="a"}': "60x5 _x20", 'process_start_time_seconds{instance="b"}': "_x5 300x20"},
        "10m",
    ),
    ("DigitsRestarted", False, "another's container"): ({'process_start_time_seconds{job="else/where"}': "60x5 480x10"}, "10m"),
    ("DigitsRunsHang", True, "one hung"): ({'digits_run_failures_total{reason="hung"}': "0x3 1x9"}, "6m"),
    ("DigitsRunsHang", True, "a thread has ended"): ({'digits_run_failures_total{reason="died"}': "0x3 1x9"}, "6m"),
    ("DigitsRunsHang", True, "one scrape has seen it, and the process is another"): (
        {'digits_run_failures_total{reason="hung"}': "0 0 0 1 _ 0x9"},
        "8m",
    ),
    ("DigitsRunsHang", True, "all of some runs raised"): ({'digits_run_failures_total{reason="repeated"}': "0x3 1x9"}, "6m"),
    ("DigitsRunsHang", False, "one raised"): ({'digits_run_failures_total{reason="raised"}': "0x3 1x9"}, "6m"),
    ("DigitsRunsFail", True, "one raised"): ({'digits_run_failures_total{reason="raised"}': "0x3 1x9"}, "6m"),
    ("DigitsRunsFail", False, "long ago"): ({'digits_run_failures_total{reason="raised"}': "0x3 1x30"}, "25m"),
    ("DigitsRunsFail", False, "checks pass or are left out"): (
        {'digits_self_checks_total{result="passed"}': "0+1x20", 'digits_self_checks_total{result="skipped"}': "0+1x20"},
        "15m",
    ),
    ("DigitsSelfCheckBreach", True, "the first check"): ({'digits_self_checks_total{result="breach"}': "0 0 0 1 1 1"}, "5m"),
    ("DigitsSelfCheckBreach", False, "all pass"): ({'digits_self_checks_total{result="passed"}': "0+1x20"}, "5m"),
    ("DigitsParityBreach", True, "a later comparison"): ({"digits_watch_breaches_total": "0 0 0 1 1 1"}, "5m"),
    ("DigitsParityBreach", True, "the very first comparison"): ({"digits_watch_breaches_total": "_ _ _ 1 1 1"}, "5m"),
    ("DigitsParityBreach", False, "one of yesterday"): ({"digits_watch_breaches_total": "1x60"}, "50m"),
    ("DigitsParityWatchBlind", True, "it compares nothing"): ({"digits_watch_last_check_timestamp_seconds": "0x40"}, "35m"),
    ("DigitsParityWatchBlind", True, "it is down"): ({f"up{{{WATCH}}}": "0x40"}, "35m"),
    ("DigitsParityWatchBlind", True, "its pod is gone"): (
        {"digits_watch_last_check_timestamp_seconds": "0+60x10 _x50", f"up{{{WATCH}}}": "1x10 _x50"},
        "40m",
    ),
    ("DigitsParityWatchBlind", False, "it is rolled"): (
        {"digits_watch_last_check_timestamp_seconds": "0+60x10 _x3 0x2 960+60x40", f"up{{{WATCH}}}": "1x10 _x3 1x45"},
        "40m",
    ),
    ("DigitsParityWatchBlind", False, "it compares"): (
        {"digits_watch_last_check_timestamp_seconds": "0+60x40", f"up{{{WATCH}}}": "1x40"},
        "35m",
    ),
    ("DigitsReloadFailed", True, "a certificate"): (
        {'digits_access_reloads_total{what="certificate",result="failed"}': "0x3 1x9"},
        "8m",
    ),
    ("DigitsReloadFailed", True, "the desired state"): ({'digits_serving_file_reads_total{result="failed"}': "0x3 1x9"}, "8m"),
    ("DigitsReloadFailed", False, "taken up"): ({'digits_access_reloads_total{what="tokens",result="ok"}': "0x3 1x9"}, "8m"),
    ("DigitsBackgroundTaskFails", True, "every round"): ({'digits_background_failures_total{task="watchdog"}': "0+1x20"}, "15m"),
    ("DigitsBackgroundTaskFails", False, "once"): ({'digits_background_failures_total{task="watchdog"}': "0x5 1x20"}, "15m"),
    ("DigitsOnTheWrongProvider", True, "asked for CUDA"): (
        {'digits_provider_info{provider="cpu"}': "1x20", 'digits_expected_provider_info{provider="cuda"}': "1x20"},
        "5m",
    ),
    ("DigitsOnTheWrongProvider", False, "asked for the CPU"): (
        {'digits_provider_info{provider="cpu"}': "1x20", 'digits_expected_provider_info{provider="cpu"}': "1x20"},
        "5m",
    ),
    ("DigitsGpuMemoryHigh", True, "97 of 100"): (
        {"digits_gpu_memory_used_bytes": "97x20", "digits_gpu_memory_total_bytes": "100x20"},
        "10m",
    ),
    ("DigitsGpuMemoryHigh", False, "half"): (
        {"digits_gpu_memory_used_bytes": "50x20", "digits_gpu_memory_total_bytes": "100x20"},
        "10m",
    ),
}


def series(name: str) -> str:
    """A series with our labels, but for those that it names."""
    bare, _, given = name.removesuffix("}").partition("{")
    labels = OURS | dict(re.findall(r'(\w+)="([^"]*)"', given))
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{bare}{{{inside}}}"


def needed(alert: str) -> list[dict[str, Any]]:
    """An alert, after the recordings that it goes by: all rules for each case would take minutes."""
    rules = [rule for group in groups() for rule in group["rules"]]
    [own] = [rule for rule in rules if rule.get("alert") == alert]
    recorded = [{"name": "r", "rules": [rule for rule in rules if "record" in rule and rule["record"] in own["expr"]]}]
    return [*recorded * bool(recorded[0]["rules"]), {"name": "a", "rules": [own]}]


def test_an_alert_fires_by_its_causes_and_not_when_all_is_well(tmp_path: Path) -> None:
    tests: dict[str, list[dict[str, Any]]] = {}
    for (alert, fires, why), (causes, at) in CASES.items():
        query = f'ALERTS{{alertname="{alert}",alertstate="firing"}}'
        tests.setdefault(alert, []).append(
            {
                "name": f"{alert}: {why}",
                "interval": "1m",
                "input_series": [{"series": series(name), "values": values} for name, values in causes.items()],
                "promql_expr_test": [
                    {
                        "expr": f"count({query}) or vector(0)",
                        "eval_time": at,
                        "exp_samples": [{"labels": "{}", "value": int(fires)}],
                    }
                ],
            }
        )
    for alert, own in tests.items():
        (tmp_path / f"{alert}.rules.yml").write_text(yaml.safe_dump({"groups": needed(alert)}))
        content = {"rule_files": [f"{alert}.rules.yml"], "evaluation_interval": "1m", "tests": own}
        (tmp_path / f"{alert}.yml").write_text(yaml.safe_dump(content))
    done = run("promtool", "test", "rules", *(str(tmp_path / f"{alert}.yml") for alert in tests))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_cases_of_both_kinds() -> None:
    alerts = {rule["alert"] for group in groups() for rule in group["rules"] if "alert" in rule}
    for fires in (True, False):
        assert {alert for alert, wanted, _ in CASES if wanted is fires} == alerts


def test_alerts_and_recordings_keep_the_namespace_and_the_overlay() -> None:
    for group in groups():
        for rule in group["rules"]:
            of_others = re.search("kube_|keda_", rule["expr"])
            for labels in re.findall(r"\bby \(([^)]*)\)|\bon \(([^)]*)\)", rule["expr"]):
                kept = set(re.findall(r"\w+", "".join(labels)))
                assert {"namespace"} <= kept if of_others else {"namespace", "overlay"} <= kept, rule["expr"]


def test_recordings_are_named_level_metric_operations_and_alerts_tell_what_to_do() -> None:
    for group in groups():
        for rule in group["rules"]:
            if "record" in rule:
                assert re.fullmatch(r"deployment(_\w+)?:(digits|grpc|http)_\w+:[a-z0-9_]+", rule["record"])
            else:
                assert {"summary", "description", "runbook_url"} == set(rule["annotations"])
                assert rule["labels"]["severity"] in ("critical", "warning")
