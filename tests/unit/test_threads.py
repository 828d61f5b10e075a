"""What calls share is used by several threads at once: nothing is lost, counted twice or seen half done."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from serve.access.budget import Budget
from serve.access.identity import Account, Accounts, Caller
from serve.api.admission import Admission, Call
from serve.core.generate import Core
from serve.core.request import Addresses, DigitsRequest
from serve.errors import BusyError, CallerLimitError, DrainingError, OverloadedError, UnknownModelError
from serve.models.catalog import Catalog
from serve.models.model import RefCount
from serve.models.serving_file import Route
from serve.observability.call_metrics import RpcMetrics
from serve.observability.metrics import Metrics
from serve.ports.load_report import Load, LoadReports

THREADS = 4
TURNS = 3000


@pytest.fixture(autouse=True)
def _frequent_switches() -> Iterator[None]:
    """Threads take turns after every few instructions, so that what is not safe shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def side_by_side(run: Callable[[], object], threads: int = THREADS) -> None:
    """Run it in so many threads at once; raises what one of them raised."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=guarded, daemon=True) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def fake_model(version: int) -> Any:
    return SimpleNamespace(manifest=SimpleNamespace(name="mlp", version=version), in_use=RefCount())


def test_every_call_is_observed_once() -> None:
    metrics = Metrics(CollectorRegistry())
    observed = RpcMetrics(metrics, "unary", "a.B", "Generate")

    def calls() -> None:
        for turn in range(TURNS):
            observed.started()
            observed.ended("OK", 200, 0.001)
            if turn % 50 == 0:
                metrics.collect()

    side_by_side(calls)
    metrics.collect()
    labels = {"grpc_type": "unary", "grpc_service": "a.B", "grpc_method": "Generate"}
    handled = metrics.registry.get_sample_value("grpc_server_handled_total", labels | {"grpc_code": "OK"})
    assert handled == metrics.registry.get_sample_value("grpc_server_started_total", labels) == THREADS * TURNS
    assert metrics.registry.get_sample_value("grpc_server_handling_seconds_count", labels) == THREADS * TURNS


def test_images_in_flight_are_counted_and_bounded_and_requests_paced() -> None:
    account = Account("a", images_limit=3, requests_per_s=0.0)
    most = [0]

    def calls() -> None:
        for _ in range(TURNS):
            try:
                taken = account.take(1)
                most[0] = max(most[0], account.images)
                account.give_back(taken)
            except CallerLimitError:
                pass

    side_by_side(calls)
    assert account.images == 0
    assert 1 <= most[0] <= 3
    paced, passed = Account("b", 0, requests_per_s=0.001), []

    def asks() -> None:
        for _ in range(TURNS // 10):
            try:
                paced.count_request()
            except CallerLimitError:
                continue
            passed.append(1)

    side_by_side(asks)
    assert len(passed) == 1, "more came through than the limit lets"


def test_a_caller_has_one_account() -> None:
    accounts = Accounts(None, images=5, requests_per_s=0.0)
    seen: set[int] = set()
    kept: list[Account] = []

    def calls() -> None:
        for number in range(TURNS // 10):
            account = accounts.admit(Caller(lambda number=number: f"10.0.{number // 250}.{number % 250}"), "generate")
            kept.append(account)
            seen.add(id(account))

    side_by_side(calls)
    assert len(seen) == TURNS // 10


def test_a_model_is_not_released_before_its_last_call_has_left_and_takes_none_afterwards() -> None:
    uses = RefCount()
    begun = threading.Event()
    at_work = [0]

    def calls() -> None:
        while uses.enter():
            at_work[0] += 1
            begun.set()
            uses.leave()

    threads = [threading.Thread(target=calls, daemon=True) for _ in range(THREADS)]
    assert uses.enter()
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    uses.close()
    assert uses.calls >= 1
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert uses.calls == 1
    uses.leave()
    assert not uses.calls


def test_a_drain_waits_for_calls_that_end_in_other_threads() -> None:
    metrics = Metrics(CollectorRegistry())
    accounts = Accounts(None, images=0, requests_per_s=0.0)
    admission = Admission(metrics, accounts, Budget(1 << 20))
    observed = RpcMetrics(metrics, "unary", "a.B", "Generate")

    def begun() -> Call:
        call = Call(admission, observed, Caller(), None)
        call.admit("generate")
        return call

    async def scenario() -> None:
        calls = [begun() for _ in range(10)]
        leaving = threading.Thread(target=lambda: [call.sent() for call in calls], daemon=True)
        waiting = asyncio.ensure_future(admission.close(20))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        with pytest.raises(DrainingError):
            begun()
        assert len(admission.open) == 11, "also what is refused is waited for, until its answer is sent"
        list(admission.open)[-1].sent()
        leaving.start()
        await asyncio.wait_for(waiting, 10)

    asyncio.run(scenario())


def test_what_calls_hold_of_the_budget_is_bounded_together_and_for_each_caller_and_given_back() -> None:
    budget = Budget(10 << 20)
    most = [0]

    def calls() -> None:
        for turn in range(TURNS):
            caller = "" if turn % 2 else f"10.0.0.{turn % 3}"
            try:
                budget.take(4 << 20, caller)
            except BusyError:
                continue
            most[0] = max(most[0], budget.held_bytes)
            budget.give_back(4 << 20, caller)

    side_by_side(calls)
    assert (budget.held_bytes, budget._held_by) == (0, {})
    assert most[0] <= 10 << 20
    budget.take(5 << 20, "a")
    with pytest.raises(CallerLimitError, match="half"):
        budget.take(1, "a")
    budget.take(5 << 20, "b")
    with pytest.raises(OverloadedError, match="--max-inflight-mib 10"):
        budget.take(1, "")
    budget.give_back(5 << 20, "a")
    budget.take(5 << 20, "a")


def test_a_look_at_the_catalog_sees_a_change_whole() -> None:
    catalog = Catalog("mlp")
    models = [fake_model(version) for version in (1, 2)]
    catalog.put(models[0])
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for new in reversed(models):
                catalog.put(new)
                catalog.keep("mlp", (new.manifest.version,), Route(new.manifest.version))

    def look() -> None:
        for _ in range(TURNS):
            assert catalog.find("", 0) in models
            assert catalog.models()

    changing = threading.Thread(target=change, daemon=True)
    changing.start()
    try:
        side_by_side(look)
    finally:
        stop.set()
        changing.join(20)


def test_a_call_that_finds_a_retired_model_is_answered_by_the_one_that_replaces_it() -> None:
    retired, replacement = fake_model(1), fake_model(2)
    retired.in_use.close()
    found = iter((retired, replacement))
    catalog = SimpleNamespace(find=lambda *_: next(found))
    model, rows, count = Core(cast(Any, catalog), 16, 16)._enter(DigitsRequest(rows=Addresses(7, 0, 1)))
    assert (model, cast(Addresses, rows).seed, count) == (replacement, 7, 1)
    assert (retired.in_use.calls, replacement.in_use.calls) == (0, 1)

    def nothing_left(*_: object) -> Any:
        raise UnknownModelError("none", "mlp")

    catalog = SimpleNamespace(find=nothing_left)
    with pytest.raises(UnknownModelError):
        Core(cast(Any, catalog), 16, 16)._enter(DigitsRequest(rows=Addresses(7, 0, 1)))


def test_load_reports_count_the_calls_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.ports.load_report.REFRESH_S", 1e9)
    reports = LoadReports(lambda: Load(0.0, 1, 0.0))
    assert reports.answered()
    side_by_side(lambda: [reports.answered() for _ in range(TURNS)])
    assert reports._calls == THREADS * TURNS
