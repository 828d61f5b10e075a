"""What must hold on a GPU. Where there is none these are skipped, and ``make gpu-check`` exits with 3."""

from __future__ import annotations

import pytest

from tests.gpu.__main__ import no_gpu
from tests.gpu.checks import Plan, graphs, memory, parity, strictness, warmness

REASON = no_gpu()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no GPU: {REASON}")


@pytest.mark.parametrize("check", [strictness, parity, graphs, warmness, memory])
def test_it_holds(check: object) -> None:
    assert callable(check)
    outcome = check(Plan(memory_seconds=10, largest=256))
    missed = [target for target in outcome.fixed if not target.met]
    assert not missed, missed
