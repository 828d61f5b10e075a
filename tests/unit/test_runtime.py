"""What goes on beside the requests: background tasks that survive, health that does not lag, liveness that tells."""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any, cast

import pytest
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry

from serve.api.digits_v1 import SERVICE
from serve.background import for_each, repeat
from serve.engine.onnx_runtime import ort
from serve.models.catalog import Catalog
from serve.observability.metrics import Metrics
from serve.ports.health import LIVENESS, Health
from serve.ports.http_port import make_app
from tests.bench import report

Status = health_pb2.HealthCheckResponse


class FakeModel:
    """A model version as health looks at it."""

    def __init__(self, name: str, ready: bool = True, broken: str | None = None) -> None:
        self.manifest = SimpleNamespace(name=name, version=1)
        self.ready = ready
        self.batcher = SimpleNamespace(broken=broken)


def health_of(*models: FakeModel) -> Health:
    catalog = Catalog("mlp")
    for model in models:
        catalog.put(cast(Any, model))
    return Health(catalog)


def test_a_background_task_that_raises_is_logged_counted_and_run_again(caplog: pytest.LogCaptureFixture) -> None:
    """Issue: health, watchdog and self-checks died unnoticed on an exception."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    rounds: list[int] = []

    async def run() -> None:
        enough = asyncio.Event()

        async def action() -> None:
            rounds.append(len(rounds))
            if len(rounds) < 3:
                raise RuntimeError("planted")
            if len(rounds) == 5:
                enough.set()

        task = asyncio.create_task(repeat("watchdog", 0.0, action, metrics.background_failures))
        await enough.wait()
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert registry.get_sample_value("digits_background_failures_total", {"task": "watchdog"}) == 2
    assert caplog.text.count("the background task 'watchdog' failed; it goes on") == 2


def test_one_items_failure_leaves_out_no_other() -> None:
    seen: list[int] = []

    async def action(item: int) -> None:
        seen.append(item)
        if item == 1:
            raise RuntimeError("planted")

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(for_each([1, 2, 3], action))
    assert seen == [1, 2, 3]
    assert [str(error) for error in caught.value.exceptions] == ["planted"]


def test_health_publishes_at_once_and_tells_a_draining_process_from_one_to_be_restarted() -> None:
    health = health_of(FakeModel("mlp"))
    health.publish()
    health.draining = True
    health.publish()
    assert {health._statuses[name] for name in ("", SERVICE, f"{SERVICE}/mlp")} == {Status.NOT_SERVING}
    assert health._statuses[LIVENESS] == Status.SERVING


def test_liveness_fails_when_a_model_or_the_port_is_broken() -> None:
    assert health_of(FakeModel("mlp", ready=False)).not_alive() is None
    lost = health_of(FakeModel("dcgan"), FakeModel("mlp", ready=False, broken="a run hung"))
    assert lost.not_alive() == "a run hung"
    lost.publish()
    assert lost._statuses[LIVENESS] == Status.NOT_SERVING
    deaf = health_of(FakeModel("mlp"))
    deaf.process_not_alive = lambda: "deaf"
    assert deaf.not_alive() == "deaf"


def test_ready_means_that_a_request_can_be_answered_whichever_port_is_asked() -> None:
    """Issue: «any model» over gRPC, «all and the default» over /readyz: with TLS one model's breach took every pod down."""

    def said(*models: FakeModel, draining: bool = False) -> tuple[str | None, dict[str, bool]]:
        health = health_of(*models)
        health.draining = draining
        health.publish()
        published = health._statuses
        return health.not_ready(), {name: published.get(name) == Status.SERVING for name in (SERVICE, "", f"{SERVICE}/mlp")}

    lame = FakeModel("mlp", ready=False)
    assert said(FakeModel("dcgan"), FakeModel("mlp")) == (None, {SERVICE: True, "": True, f"{SERVICE}/mlp": True})
    assert said(FakeModel("dcgan"), lame) == (None, {SERVICE: True, "": False, f"{SERVICE}/mlp": False})
    assert said(lame) == ("not ready: mlp", dict.fromkeys((SERVICE, "", f"{SERVICE}/mlp"), False))
    assert said()[0] == "no model is served yet"
    assert said(FakeModel("mlp"), draining=True) == ("draining", dict.fromkeys((SERVICE, "", f"{SERVICE}/mlp"), False))
    both = health_of(FakeModel("dcgan"), lame)
    assert (both.not_ready("dcgan"), both.not_ready("mlp"), both.not_ready("vae")) == (None, "not ready: mlp", "not ready: vae")


@pytest.mark.parametrize(("reason", "status"), [(None, 200), ("mlp/1 has had no working slot", 503)])
def test_the_http_probe_of_liveness_says_the_same(reason: str | None, status: int) -> None:
    app = make_app(None, lambda: reason, lambda model: None)
    [route] = [each for each in app.router.routes() if each.method == "GET" and each.resource.canonical == "/healthz"]
    answer = asyncio.run(route.handler(cast(Any, None)))
    assert (answer.status, answer.text) == (status, f"{reason or 'alive'}\n")


def test_the_report_of_a_benchmark_needs_no_distribution_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: ``version("onnxruntime-gpu")`` raised wherever the CPU build is installed."""
    honest = report.version

    def version(package: str) -> str:
        if package.startswith("onnxruntime"):
            raise PackageNotFoundError(package)
        return honest(package)

    monkeypatch.setattr(report, "version", version)
    assert report.machine()["versions"]["onnxruntime"] == ort.__version__
