"""What has to come through from the transport to the engine and back, seen from inside a server whose engine obeys."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from serve.api import http_call
from serve.batching.batcher import MOST_FAILED_RUNS
from serve.batching.ticket import Priority
from serve.errors import DeviceLostError, StartError
from serve.models.serving_file import Route
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.inference import open_inference_pb2 as oip
from serve.ports.load_report import LoadReports
from tests.bundle_copies import add_version
from tests.in_process import Running, record_runs, until, with_server

StatusCode = grpc.StatusCode
Test = Callable[[Running], Any]
Served = Callable[..., None]
GOAWAY = 7


@pytest.fixture
def models_dir(bundles: Path) -> Path:
    """The mlp alone."""
    for name in ("dcgan", "cdcgan", "rpgan"):
        (bundles / name).rename(bundles.parent / name)
    return bundles


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, models_dir: Path) -> Served:
    """Runs a coroutine function with a server of the mlp."""
    return lambda test, **settings: with_server(test, monkeypatch, models_dir, **settings)


def infer_request(count: int, seed: int = 1, version: str = "") -> oip.ModelInferRequest:
    tensor = oip.ModelInferRequest.InferInputTensor
    return oip.ModelInferRequest(
        model_name="mlp",
        model_version=version,
        inputs=[
            tensor(name="count", datatype="INT32", shape=[1]),
            tensor(name="seed", datatype="UINT64", shape=[1]),
        ],
        raw_input_contents=[np.int32(count).tobytes(), np.uint64(seed).tobytes()],
    )


async def chunks_of(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


CALLS: dict[str, Callable[[Running, float | None], Any]] = {
    "Generate": lambda server, timeout: server.digits.Generate(pb.GenerateRequest(count=2), timeout=timeout),
    "Interpolate": lambda server, timeout: server.digits.Interpolate(
        pb.InterpolateRequest(begin=pb.Address(seed=1), end=pb.Address(seed=2), steps=3), timeout=timeout
    ),
    "GenerateStream": lambda server, timeout: chunks_of(
        server.digits.GenerateStream(pb.GenerateStreamRequest(count=2), timeout=timeout)
    ),
    "ModelInfer": lambda server, timeout: server.inference.ModelInfer(infer_request(2), timeout=timeout),
}


@pytest.mark.parametrize("method", CALLS)
def test_a_deadline_goes_from_the_transport_to_the_queue(method: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = record_runs(monkeypatch)

    async def test(server: Running) -> None:
        before = time.monotonic()
        await CALLS[method](server, 20)
        await CALLS[method](server, None)
        (_, deadline), (_, none) = runs
        assert deadline is not None
        assert before + 15 < deadline <= time.monotonic() + 21  # gRPC rounds a timeout up on its way
        assert none is None

    served(test)


def test_an_http_request_has_the_servers_own_deadline(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = record_runs(monkeypatch)

    async def test(server: Running) -> None:
        before = time.monotonic()
        assert (await server.get("/v1/digits?seed=1"))[0] == 200
        [(_, deadline)] = runs
        assert deadline is not None
        assert before + http_call.TIMEOUT_S <= deadline <= time.monotonic() + http_call.TIMEOUT_S

    served(test)


def test_streams_and_self_checks_are_bulk_and_the_rest_is_interactive(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = record_runs(monkeypatch)

    async def test(server: Running) -> None:
        for method, priority in {"GenerateStream": 1, "Generate": 0, "Interpolate": 0, "ModelInfer": 0}.items():
            runs.clear()
            await CALLS[method](server, None)
            assert [each for each, _ in runs] == [Priority(priority)], method
        runs.clear()
        [model] = server.server.catalog.models()
        await model.self_check()
        assert [each for each, _ in runs] == [Priority.BULK]

    served(test)


def test_a_cancelled_calls_rows_never_run_and_it_is_counted_as_cancelled(served: Served) -> None:
    async def test(server: Running) -> None:
        server.orders.hold()
        first = server.digits.Generate(pb.GenerateRequest(count=1))
        await server.until_held()
        second = server.digits.Generate(pb.GenerateRequest(count=7))
        await server.until_metric(7, "digits_queue_images")
        second.cancel()
        await server.until_metric(7, "digits_dropped_images_total", reason="cancelled")
        server.orders.release()
        await first
        assert server.orders.rows == 1
        await server.until_metric(1, "grpc_server_handled_total", grpc_method="Generate", grpc_code="CANCELLED")
        await server.until_metric(1, "grpc_server_handled_total", grpc_method="Generate", grpc_code="OK")

    served(test)


def test_a_model_knows_the_calls_that_use_it_until_they_are_answered(served: Served) -> None:
    async def test(server: Running) -> None:
        [model] = server.server.catalog.models()
        server.orders.hold()
        calls = [asyncio.ensure_future(CALLS[method](server, None)) for method in ("Generate", "ModelInfer", "GenerateStream")]
        await server.until_held()

        async def in_use() -> int:
            return model.in_use.calls

        await until(in_use, lambda seen: seen == len(calls))
        server.orders.release()
        await asyncio.gather(*calls)
        assert model.in_use.calls == 0

    served(test)


def test_an_answered_call_holds_nothing_by_whichever_protocol_it_came(served: Served) -> None:
    async def test(server: Running) -> None:
        admission = server.server._admission

        async def held() -> tuple[int, int]:
            return admission.budget.held_bytes, len(admission.open)

        for method, call in CALLS.items():
            await call(server, None)
            await until(held, lambda seen: seen == (0, 0))
            server.orders.hold()
            calling = asyncio.ensure_future(call(server, None))
            await server.until_held()
            assert (await held())[0] > 2 * 784, method
            server.orders.release()
            await calling
        assert (await server.get("/v1/digits?count=3"))[0] == 200
        assert (await server.get("/v1/digits?count=0"))[0] == 400
        await until(held, lambda seen: seen == (0, 0))

    served(test)


def test_a_port_that_is_deaf_fails_liveness(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(server: Running) -> None:
        assert (await server.get("/healthz"))[0] == 200
        monkeypatch.setattr(server.server._grpc, "not_alive", lambda: "deaf")
        assert (await server.get("/healthz"))[:2] == (503, "deaf\n")

    served(test)


@pytest.mark.parametrize("asked", [False, True])
def test_load_reports_are_made_where_the_settings_ask_for_them(
    asked: bool, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bytes] = []
    monkeypatch.setattr(LoadReports, "answered", lambda reports, **how: made.append(b"") or b"")

    async def test(server: Running) -> None:
        await server.digits.Generate(pb.GenerateRequest(count=2))
        assert len(made) == asked

    served(test, load_reports=asked)


def test_a_hung_run_fails_its_batch_and_liveness_and_ends_the_process(served: Served) -> None:
    async def test(server: Running) -> None:
        server.orders.hang_once()
        [model] = server.server.catalog.models()
        error = await failure_of(server.digits.Generate(pb.GenerateRequest(count=2)))
        assert error.code() is StatusCode.INTERNAL
        assert "1.5 s" not in str(error.details()), "callers get a fixed text"
        assert not model.ready
        await asyncio.wait_for(server.server._stopping.wait(), 30)
        assert server.server._health.not_alive() is not None
        labels = {"model": "mlp", "version": "1", "reason": "hung"}
        assert server.server._registry.get_sample_value("digits_run_failures_total", labels) == 1

    with pytest.raises(StartError, match=r"1\.5 s; start the server again"):
        served(test, watchdog_s=1.5)


def test_a_signal_while_the_process_drains_by_itself_does_not_cut_it_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr("serve.server.os._exit", exits.append)

    async def test(server: Running) -> None:
        server.server.stop()
        server.server._signalled()
        assert exits == []
        server.server._signalled()
        assert exits == [130], "the second one does"

    served(test)


def test_a_run_that_raises_fails_its_caller_alone_and_tells_nothing_of_the_inside(served: Served) -> None:
    async def test(server: Running) -> None:
        server.orders.fails = RuntimeError("planted")
        error = await failure_of(server.digits.Generate(pb.GenerateRequest(count=2)))
        assert error.code() is StatusCode.INTERNAL
        assert "planted" not in str(error.details())
        status, body, _ = await server.get("/v1/digits")
        assert status == 500
        assert "planted" not in body
        server.orders.fails = None
        assert (await server.digits.Generate(pb.GenerateRequest(count=2))).count == 2

    served(test)


def test_a_model_whose_every_run_raises_becomes_unready_and_ends_the_process(served: Served) -> None:
    """Issue: 56 runs had failed, and the model was ready; half of all calls were INTERNAL for ever."""

    async def test(server: Running) -> None:
        [model] = server.server.catalog.models()
        for fails in (RuntimeError("planted"), None, RuntimeError("planted")):
            server.orders.fails = fails
            for _ in range(MOST_FAILED_RUNS - 1):
                call = server.digits.Generate(pb.GenerateRequest(count=2))
                if fails is None:
                    await call
                else:
                    assert (await failure_of(call)).code() is StatusCode.INTERNAL
            assert model.ready, "some that fail are not all that fail"
        assert (await failure_of(server.digits.Generate(pb.GenerateRequest(count=2)))).code() is StatusCode.INTERNAL
        assert not model.ready
        assert (await failure_of(server.digits.Generate(pb.GenerateRequest(count=2)))).code() is StatusCode.UNAVAILABLE
        assert (await server.get("/healthz"))[0] == 503
        assert await server.metric("digits_run_failures_total", reason="repeated") == 1
        assert await server.metric("digits_run_failures_total", reason="raised") == 2 * MOST_FAILED_RUNS - 1
        await asyncio.wait_for(server.server._stopping.wait(), 30)

    with pytest.raises(StartError, match="8 runs in a row have failed on instance 0; start the server again"):
        served(test)


def test_a_device_that_is_lost_ends_the_process_and_no_call_waits_for_it(served: Served) -> None:
    """Issue: CUDA's errors stay with the process, every run failed, and the model stayed ready."""

    async def test(server: Running) -> None:
        server.orders.fails = DeviceLostError("mlp/1: CUDA failure 700: an illegal memory access was encountered")
        error = await failure_of(server.digits.Generate(pb.GenerateRequest(count=2)))
        assert error.code() is StatusCode.INTERNAL
        assert "CUDA" not in str(error.details())
        [model] = server.server.catalog.models()
        assert not model.ready
        assert (await failure_of(server.digits.Generate(pb.GenerateRequest(count=2)))).code() is StatusCode.UNAVAILABLE
        assert (await server.get("/healthz"))[0] == 503
        await asyncio.wait_for(server.server._stopping.wait(), 30)  # the watchdog sees it

    with pytest.raises(StartError, match="CUDA failure 700: an illegal memory access was encountered; start the server again"):
        served(test)


def test_the_hint_when_to_return_grows_with_the_queue(served: Served) -> None:
    async def pushback_ms(server: Running) -> int:
        error = await failure_of(server.digits.Generate(pb.GenerateRequest(count=60)))
        assert error.code() is StatusCode.RESOURCE_EXHAUSTED
        return int(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"])  # type: ignore[arg-type]

    async def test(server: Running) -> None:
        server.orders.slow_s = 0.02
        for _ in range(10):
            await server.digits.Generate(pb.GenerateRequest(count=1))
        server.orders.hold()
        calls = [server.digits.Generate(pb.GenerateRequest(count=1))]
        await server.until_held()
        calls.append(server.digits.Generate(pb.GenerateRequest(count=10)))
        await server.until_metric(10, "digits_queue_images")
        short = await pushback_ms(server)
        calls.append(server.digits.Generate(pb.GenerateRequest(count=30)))
        await server.until_metric(40, "digits_queue_images")
        long = await pushback_ms(server)
        assert short >= 10 * 10, "ten images of at least 20 ms, as the average has it after ten runs"
        assert 3.5 <= long / short <= 4.5
        status, _, headers = await server.get("/v1/digits?count=60")
        assert (status, headers["Retry-After"]) == (429, str(-(-long // 1000)))
        server.orders.slow_s = 0.0
        server.orders.release()
        await asyncio.gather(*calls)

    served(test, max_batch_size=1, max_queue_images=64, max_count=64)


def test_a_draining_server_finishes_what_it_has_and_refuses_the_rest(served: Served) -> None:
    async def test(server: Running) -> None:
        server.orders.hold()
        first = server.digits.Generate(pb.GenerateRequest(count=1))
        await server.until_held()
        server.server.stop()
        await until(lambda: server.get("/v1/digits"), lambda answer: answer[0] == 503)
        status, body, _ = await server.get("/readyz")
        assert (status, body) == (503, "draining\n")
        for method, call in CALLS.items():
            error = await failure_of(call(server, None))
            assert error.code() is StatusCode.UNAVAILABLE, method
            assert "the server is stopping" in str(error.details())
        refused = (await server.get("/metrics"))[1].split("digits_drain_refusals_total ")[-1].split()[0]
        assert float(refused) >= len(CALLS), "counted apart: no fault of the server's"
        server.orders.release()
        assert (await first).count == 1

    served(test)


def test_an_answer_that_takes_too_long_is_504_over_http(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_call, "TIMEOUT_S", 0.2)

    async def test(server: Running) -> None:
        server.orders.hold()
        status, body, _ = await server.get("/v1/digits")
        assert status == 504
        assert "no answer within 0.2 s" in body

    served(test)


def test_a_connection_is_told_to_go_when_it_is_old(served: Served) -> None:
    def frames_until_goaway(port: int) -> float:
        """Seconds until the server says GOAWAY."""
        begun = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection, connection.makefile("rb") as answers:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            while True:
                length, kind = struct.unpack(">IB", b"\0" + answers.read(4))
                answers.read(5 + length)
                if kind == GOAWAY:
                    return time.monotonic() - begun

    async def test(server: Running) -> None:
        assert await asyncio.to_thread(frames_until_goaway, server.ports.grpc) >= 0.8  # gRPC varies it by a tenth

    served(test, max_connection_age_s=1.0)


def test_a_canary_that_is_wrong_makes_its_model_unready(served: Served, models_dir: Path) -> None:
    add_version(models_dir, "mlp", 2)

    async def test(server: Running) -> None:
        catalog = server.server.catalog
        catalog.keep("mlp", (1, 2), Route(1, canary=2, canary_share=0.5))
        assert (await server.get("/readyz"))[0] == 200
        server.orders.breached = {2}
        for model in catalog.models():
            await model.self_check()
        assert (await server.get("/readyz"))[:2] == (503, "not ready: mlp\n")
        assert not (await server.inference.ServerReady(oip.ServerReadyRequest())).ready
        for version, ready in {"": False, "1": True, "2": False}.items():
            answer = await server.inference.ModelReady(oip.ModelReadyRequest(name="mlp", version=version))
            assert answer.ready is ready, version
        route = catalog.route("mlp")
        for seed in range(8):
            call = server.digits.Generate(pb.GenerateRequest(count=1, seed=seed))
            if route.pick(seed) == 1:
                assert (await call).version == 1
            else:
                assert (await failure_of(call)).code() is StatusCode.UNAVAILABLE
        catalog.keep("mlp", (1, 2), Route(1))
        assert (await server.get("/readyz"))[0] == 200

    served(test, versions="latest:2", poll_interval_s=3600)


def test_every_protocol_splits_traffic_by_the_same_seeds(served: Served, models_dir: Path) -> None:
    add_version(models_dir, "mlp", 2)

    async def test(server: Running) -> None:
        route = Route(1, canary=2, canary_share=0.5)
        server.server.catalog.keep("mlp", server.server.catalog.versions("mlp"), route)
        picked = [route.pick(seed) for seed in range(12)]
        assert set(picked) == {1, 2}
        for seed, version in enumerate(picked):
            assert (await server.digits.Generate(pb.GenerateRequest(count=1, seed=seed))).version == version
            ends = {"begin": pb.Address(seed=seed), "end": pb.Address(seed=99)}
            assert (await server.digits.Interpolate(pb.InterpolateRequest(**ends, steps=2))).version == version
            assert (await server.inference.ModelInfer(infer_request(1, seed))).model_version == str(version)
            assert (await server.inference.ModelInfer(infer_request(1, seed, version="1"))).model_version == "1"
            assert json.loads((await server.get(f"/v1/digits?seed={seed}"))[1])["version"] == version

    served(test, versions="latest:2", poll_interval_s=3600)


def test_images_and_padding_are_counted_whichever_protocol_asks(served: Served) -> None:
    async def test(server: Running) -> None:
        for asked, encoding, call in (
            (3, "uint8", CALLS_OF_THREE["digits"]),
            (3, "uint8", CALLS_OF_THREE["inference"]),
            (3, "png", CALLS_OF_THREE["http"]),
        ):
            before = [
                await server.metric("digits_images_total", format=encoding),
                await server.metric("digits_padding_images_total"),
            ]
            await call(server)
            assert await server.metric("digits_images_total", format=encoding) == before[0] + asked
            assert await server.metric("digits_padding_images_total") == before[1] + 1

    served(test, buckets="powers")


CALLS_OF_THREE: dict[str, Callable[[Running], Any]] = {
    "digits": lambda server: server.digits.Generate(pb.GenerateRequest(count=3)),
    "inference": lambda server: server.inference.ModelInfer(infer_request(3)),
    "http": lambda server: server.get("/v1/digits?count=3"),
}


def test_status_is_the_same_over_grpc_and_http_and_is_what_is_served(served: Served) -> None:
    async def test(server: Running) -> None:
        [own] = (await server.digits.Status(pb.StatusRequest())).versions
        [listed] = json.loads((await server.get("/v1/status"))[1])["versions"]
        [model] = server.server.catalog.models()
        as_json = {field.name: getattr(own, field.name) for field in own.DESCRIPTOR.fields}
        assert listed == as_json | {"state": "READY"}
        assert own.state == pb.VERSION_STATE_READY
        assert (own.model, own.version) == (model.manifest.name, model.manifest.version)
        assert (own.digest, own.traffic_share) == (model.bundle.digest, 1.0)
        assert (own.calls, own.queued_images, own.reason) == (0, 0, "")
        assert not (await server.digits.Status(pb.StatusRequest(model="other"))).versions

        async def calls() -> int:
            return (await server.digits.Status(pb.StatusRequest())).versions[0].calls

        server.orders.hold()
        try:
            waiting = asyncio.ensure_future(server.digits.Generate(pb.GenerateRequest(count=3)))
            await until(calls, lambda seen: seen == 1)
        finally:
            server.orders.release()
        await waiting

    served(test)
