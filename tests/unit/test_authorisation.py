"""Every RPC beside every kind of caller: what each needs is written down here once more, apart from the tables."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from serve.access.budget import Budget
from serve.access.identity import Accounts
from serve.access.tokens import TokenFile
from serve.api.admission import Admission
from serve.api.digits_v1 import DigitService
from serve.api.open_inference import UNSUPPORTED, OpenInferenceService
from serve.api.rpc import RpcTable
from serve.observability.metrics import Metrics
from tests.fake_wire import FakeWire

DIGITS, INFERENCE = "digits.v1.DigitGenerator", "inference.GRPCInferenceService"
NEEDS = {
    (DIGITS, "Generate"): "generate",
    (DIGITS, "GenerateStream"): "generate",
    (DIGITS, "Interpolate"): "generate",
    (DIGITS, "ListModels"): "generate",
    (DIGITS, "GetModel"): "generate",
    (DIGITS, "Status"): "generate",
    (INFERENCE, "ServerLive"): "nothing",
    (INFERENCE, "ServerReady"): "nothing",
    (INFERENCE, "ModelReady"): "nothing",
    (INFERENCE, "ServerMetadata"): "generate",
    (INFERENCE, "ModelMetadata"): "generate",
    (INFERENCE, "ModelInfer"): "generate",
    (INFERENCE, "ModelStreamInfer"): "generate",
    (INFERENCE, "ModelConfig"): "generate",
    (INFERENCE, "ModelStatistics"): "generate",
    **{(INFERENCE, method): "generate" for method in UNSUPPORTED},
    (INFERENCE, "RepositoryIndex"): "generate",
}
# What a caller who was let in meets here, where there is nothing behind the services.
LET_IN = {grpc.StatusCode.OK, grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}
NOT_KNOWN, NOT_ALLOWED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED


def tables(accounts: Accounts) -> list[RpcTable]:
    """The services' own tables, with nothing behind them."""
    admission = Admission(Metrics(CollectorRegistry()), accounts, Budget(1 << 20))
    nothing: Any = SimpleNamespace()
    workers = ThreadPoolExecutor(1)
    return [
        DigitService(nothing, nothing).table(admission, workers),
        OpenInferenceService(nothing, lambda: None, Metrics(CollectorRegistry()), nothing).table(admission, workers),
    ]


def call(accounts: Accounts, service: str, method: str, token: str) -> grpc.StatusCode:
    """The status that a call ends with."""
    path = f"/{service}/{method}"
    [found] = [table.methods[path] for table in tables(accounts) if path in table.methods]
    wire = FakeWire(token)
    if found.begin is not None:
        found.begin(wire, b"")
    else:
        assert found.task is not None
        asyncio.run(found.task(wire, b""))
    return wire.ended()


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    """A tokens file with a token, one of an earlier release, and one that has expired, called as their scopes."""

    def entry(name: str, *scopes: str, **more: str) -> dict[str, Any]:
        return {"name": name, "sha256": hashlib.sha256(f"{name}.secret".encode()).hexdigest(), "scopes": scopes, **more}

    past = "2020-01-01T00:00:00+00:00"
    entries = [entry("generate", "generate"), entry("admin", "admin"), entry("expired", "generate", "admin", expires=past)]
    path = tmp_path / "tokens.json"
    path.write_bytes(msgspec.json.encode({"tokens": entries}))
    return Accounts(TokenFile(path), 0, 0.0)


def test_every_rpc_of_every_service_is_in_the_matrix() -> None:
    there = {tuple(path[1:].split("/")) for table in tables(Accounts(None, 0, 0.0)) for path in table.methods}
    assert there == NEEDS.keys()


@pytest.mark.parametrize(("service", "method"), NEEDS)
def test_an_rpc_lets_in_whom_it_may_and_nobody_else(service: str, method: str, accounts: Accounts) -> None:
    need = NEEDS[service, method]

    def status(token: str) -> grpc.StatusCode:
        return call(accounts, service, method, token)

    if need == "nothing":
        assert {status(token) for token in ("", "generate.wrong", "expired.secret", "generate.secret")} <= LET_IN
        return
    assert status("") is NOT_KNOWN
    assert status("generate.wrong") is NOT_KNOWN
    assert status("nobody.secret") is NOT_KNOWN
    assert status("expired.secret") is NOT_KNOWN
    assert status("admin.secret") is NOT_ALLOWED
    assert status(f"{need}.secret") in LET_IN


@pytest.mark.parametrize(("service", "method"), NEEDS)
def test_without_a_tokens_file_everybody_is_let_in(service: str, method: str) -> None:
    assert call(Accounts(None, 0, 0.0), service, method, "") in LET_IN


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_triton_clients_are_told_that_a_file_says_what_is_served(method: str) -> None:
    assert call(Accounts(None, 0, 0.0), INFERENCE, method, "") is grpc.StatusCode.UNIMPLEMENTED
    assert "serving.json" in UNSUPPORTED[method]
