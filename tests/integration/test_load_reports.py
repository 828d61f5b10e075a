"""Answers that end with a load report, and gRPC's own client that sends a slow replica less by it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from serve.client.channel import SERVICE_CONFIG
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from serve.ports import grpc_call
from serve.ports.load_report import METADATA_KEY, REFRESH_S, Load, LoadReports, encoded
from tests.server_process import ServerProcess

RUN_S, SLOWER = 0.006, 4
CALLS_PER_S, SECONDS, SETTLE_S = 200, 6, 3  # an even share is more than the slow one can answer
WEIGHTED = {"blackoutPeriod": "0.5s", "weightUpdatePeriod": "0.2s"}
# A server of whose runs every other raises while a file is there: eight in a row would end it.
FAILING = """
import itertools, pathlib, runpy
from serve.engine.session import Engine
launch, turns = Engine.launch, itertools.count()
def fails(*arguments):
    if pathlib.Path({flag!r}).exists() and next(turns) % 2:
        raise RuntimeError("on purpose")
    return launch(*arguments)
Engine.launch = fails
runpy.run_module("serve", run_name="__main__", alter_sys=True)
"""


def test_a_report_is_an_orca_load_report() -> None:
    """By a message with the published names and numbers (xds/data/orca/v3/orca_load_report.proto)."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="orca.proto", package="xds.data.orca.v3", syntax="proto3")
    message = file.message_type.add(name="OrcaLoadReport")
    for name, number in (("rps_fractional", 6), ("eps", 7), ("application_utilization", 9)):
        message.field.add(name=name, number=number, type=field.TYPE_DOUBLE, label=field.LABEL_OPTIONAL)
    entry = message.nested_type.add(name="UtilizationEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=field.TYPE_DOUBLE, label=field.LABEL_OPTIONAL)
    message.field.add(
        name="utilization", number=5, type=field.TYPE_MESSAGE, label=field.LABEL_REPEATED,
        type_name=".xds.data.orca.v3.OrcaLoadReport.UtilizationEntry",
    )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    report_type = message_factory.GetMessageClass(pool.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport"))
    report = report_type.FromString(encoded(120.5, 2.5, 0.75, 0.25))
    assert (report.rps_fractional, report.eps, report.application_utilization) == (120.5, 2.5, 0.75)
    assert dict(report.utilization) == {"queue": 0.25}
    assert report.SerializeToString() == encoded(120.5, 2.5, 0.75, 0.25), "nothing in it is unknown"


def test_figures_follow_what_is_done_and_are_made_anew_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, load, reads = [100.0], [Load(0.0, 2, 0.0)], [0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def read() -> Load:
        reads[0] += 1
        return load[0]

    reports = LoadReports(read)
    for turn in range(1, 401):  # 100 calls a second; both instances busy for three quarters of the time
        now[0] += 0.01
        load[0] = Load(turn * 0.01 * 2 * 0.75, 2, 0.5)
        latest = reports.answered(failed=turn % 4 == 0)
    assert reads[0] == pytest.approx(400 * 0.01 / REFRESH_S, rel=0.15)
    np.testing.assert_allclose(np.frombuffer(latest[-26:-18], "<f8"), 100, rtol=0.02)
    np.testing.assert_allclose(np.frombuffer(latest[-17:-9], "<f8"), 25, rtol=0.2)
    np.testing.assert_allclose(np.frombuffer(latest[-8:], "<f8"), 0.75 + 0.5, rtol=0.02)


@contextmanager
def replicas() -> Iterator[list[ServerProcess]]:
    """Three, of which the last is slowed four times."""
    running: list[ServerProcess] = []
    try:
        for slower in (1, 1, SLOWER):
            module = ("-m", "tests.paced_server", str(RUN_S * slower))
            flags = ("--load-reports", "--instances=1", "--max-batch-size=1", "--provider=cpu")
            running.append(ServerProcess(*flags, module=module))
        yield running
    finally:
        for server in running:
            server.kill()


async def latencies(target: str, policy: dict[str, object]) -> list[float]:
    """Seconds of each call, once weights have settled; calls begin at a steady rate, whatever becomes of those before."""
    config = {**SERVICE_CONFIG, "loadBalancingConfig": [policy]}
    options = [("grpc.service_config", json.dumps(config)), ("grpc.use_local_subchannel_pool", 1)]
    taken: list[float] = []
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)

        async def call(due: float) -> None:
            await stub.Generate(pb.GenerateRequest(model="mlp", count=1, seed=1), timeout=30)
            taken.append(time.monotonic() - due)

        await call(time.monotonic())
        taken.clear()
        begun, calls = time.monotonic(), []
        for number in range(CALLS_PER_S * SECONDS):
            due = begun + number / CALLS_PER_S
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            calls.append(asyncio.ensure_future(call(due)))
            if number == CALLS_PER_S * SETTLE_S:
                settled = len(taken)
        await asyncio.gather(*calls)
    return taken[settled:]


@pytest.mark.long
def test_a_slow_replica_gets_less_and_the_slowest_calls_are_sooner() -> None:
    """The 99th percentile beside round robin's, with three replicas of which one is four times as slow."""
    with replicas() as servers:
        target = "ipv4:" + ",".join(server.target for server in servers)
        ratios, slowed = [], []
        for _ in range(3):
            even = asyncio.run(latencies(target, {"round_robin": {}}))
            before = [answered(server) for server in servers]
            weighted = asyncio.run(latencies(target, {"weighted_round_robin": WEIGHTED}))
            shares = [answered(server) - count for server, count in zip(servers, before, strict=True)]
            ratios.append(float(np.percentile(weighted, 99) / np.percentile(even, 99)))
            slowed.append(shares[2] / min(shares[:2]))
            print(f"calls by replica {shares}, p99 {np.percentile(weighted, 99):.4f} s against {np.percentile(even, 99):.4f} s")
        assert sorted(slowed)[1] < 0.6, slowed
        assert sorted(ratios)[1] <= 0.6, ratios


@pytest.mark.long
def test_a_failing_replica_gets_less_though_it_is_as_quick(tmp_path: Path) -> None:
    """Issue: half of all calls were INTERNAL for as long as the replica lived."""
    flag, servers = tmp_path / "fail", []
    try:
        for failing in (tmp_path / "never", tmp_path / "never", flag):
            module = ("-c", FAILING.format(flag=str(failing)))
            flags = ("--load-reports", "--instances=1", "--provider=cpu", "--self-check-interval-s=0")
            servers.append(ServerProcess(*flags, module=module))
        flag.touch()
        target, config = "ipv4:" + ",".join(server.target for server in servers), [{"weighted_round_robin": WEIGHTED}]
        options = [("grpc.service_config", json.dumps({**SERVICE_CONFIG, "loadBalancingConfig": config}))]
        with grpc.insecure_channel(target, [*options, ("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub, shares = pb_grpc.DigitGeneratorStub(channel), [0.0] * len(servers)
            begun = time.monotonic()
            while (took := time.monotonic() - begun) < SECONDS:
                if took < SETTLE_S:
                    shares = [started(server) for server in servers]
                with contextlib.suppress(grpc.RpcError):
                    stub.Generate(pb.GenerateRequest(model="mlp", count=1, seed=1), timeout=30)
                time.sleep(1 / CALLS_PER_S)
        shares = [started(server) - count for server, count in zip(servers, shares, strict=True)]
        print(f"calls by replica {shares}")
        assert shares[2] < 0.6 * min(shares[:2])
    finally:
        for server in servers:
            server.kill()


def started(server: ServerProcess) -> float:
    return server.metric("grpc_server_started_total", grpc_method="Generate")


def answered(server: ServerProcess) -> float:
    return server.metric("grpc_server_handled_total", grpc_method="Generate", grpc_code="OK")


@pytest.mark.parametrize("wanted", [False, True])
def test_answers_end_with_a_report_only_where_it_is_asked_for(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the call itself: gRPC's client keeps the report to itself."""
    trailing: list[tuple[str, bytes]] = []
    monkeypatch.setattr(grpc_call.core, "SendStatusFromServerOperation", lambda pairs, *rest: trailing.extend(pairs))
    event = MagicMock()
    reports = LoadReports(lambda: Load(1.0, 1, 0.0)) if wanted else None
    call = grpc_call.GrpcCall(event, MagicMock(), MagicMock(), reports)
    call.ending(grpc.StatusCode.NOT_FOUND, "an error is no answer")
    assert trailing == []
    call.ending(grpc.StatusCode.OK, message=b"answer")
    assert [key for key, _ in trailing] == [METADATA_KEY] * wanted
    trailing.clear()
    call.ending(grpc.StatusCode.INTERNAL, "a fault of the server's, for which clients are to turn away", (("hint", "5"),))
    assert [key for key, _ in trailing] == ["hint"] + [METADATA_KEY] * wanted
    assert reports is None or reports._errors == 1
