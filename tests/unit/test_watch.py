"""The watch without a server: what it counts of comparisons that go well, go wrong and cannot be made."""

from __future__ import annotations

import math
import random
import threading
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from prometheus_client import CollectorRegistry

from export.errors import ExportError
from export.watch import Check, Round, Watch, WatchMetrics, table, watch_forever
from serve.client import DigitClient, DigitError
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle

REFUSED = DigitError(grpc.StatusCode.UNAVAILABLE, "nobody answers")


def check(difference: float) -> Check:
    return Check("mlp", 1, "address", 16, difference, 1e-5)


class Rounds:
    """A watch whose rounds are these; the last one stops it."""

    def __init__(self, *rounds: Round | Exception) -> None:
        self.rounds = list(rounds)
        self.stop = threading.Event()

    def round(self) -> Round:
        done = self.rounds.pop(0)
        if not self.rounds:
            self.stop.set()
        if isinstance(done, Exception):
            raise done
        return done


def test_breaches_and_what_cannot_be_compared_are_counted_and_the_watch_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    rounds = Rounds(
        REFUSED,
        Round([check(1e-6), check(2e-5)], [REFUSED, ExportError("mlp/2 is not what the server serves")]),
        Round([check(math.nan)], []),
    )
    watch_forever(cast(Watch, rounds), WatchMetrics(registry), 0.0, rounds.stop)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    compared = {"model": "mlp", "version": "1", "source": "address"}
    assert value("digits_watch_difference_count", **compared) == 3
    assert value("digits_watch_breaches_total", **compared) == 2, "a difference beyond the tolerance, and one that is no number"
    assert value("digits_watch_failures_total", code="UNAVAILABLE") == 2
    assert value("digits_watch_failures_total", code="bundle") == 1
    assert [record.getMessage() for record in caplog.records] == ["mlp/2 is not what the server serves"]


def test_a_breach_is_said_in_the_table() -> None:
    rows = table([check(1e-6), check(2e-5)]).splitlines()[1:]
    assert [row.endswith("BREACH") for row in rows] == [False, True]


def test_a_server_that_serves_another_bundle_of_that_number_is_not_compared() -> None:
    mine = read_bundle(BUNDLED_DIR / "mlp" / "1").digest
    served: Any = SimpleNamespace(
        list_models=lambda: SimpleNamespace(models=[SimpleNamespace(name="mlp", version=1)]),
        get_model=lambda *_: SimpleNamespace(digest=mine[::-1]),
    )
    done = Watch(cast(DigitClient, served), BUNDLED_DIR, random.Random(0)).round()
    assert done.checks == []
    assert [str(failure).partition(" is not what the server serves as mlp/1")[1] != "" for failure in done.failures] == [True]
