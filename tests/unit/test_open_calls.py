"""The open calls are bounded, for each address where there are many, and forgotten when they end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from serve.ports import open_calls
from serve.ports.open_calls import MUCH_BYTES, OpenCalls

ONE, OTHER = "ipv4:10.0.0.1", "ipv4:10.0.0.2"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_calls, "MOST_CALLS", 10)
    monkeypatch.setattr(open_calls, "FEW_CALLS", 4)


class FakeCall(SimpleNamespace):
    """A call as it is counted."""

    __hash__ = object.__hash__


def call(address: str = ONE, sent_bytes: int = 0) -> Any:
    return FakeCall(peer=lambda: f"{address}:5000", sent_bytes=sent_bytes, counted_for="")


def test_an_address_has_a_share_and_all_have_a_bound_and_what_ends_makes_room() -> None:
    opened = OpenCalls()
    few = [call() for _ in range(4)]
    own = [call() for _ in range(3)]
    assert [opened.add(each) for each in (*few, *own)] == [None] * 7
    refused = call()
    assert "10.0.0.1 has 3" in str(opened.add(refused)), "half of what there is beyond a few"
    opened.remove(refused)
    others = [call(OTHER) for _ in range(3)]
    assert [opened.add(each) for each in others] == [None] * 3
    refused = call("ipv4:10.0.0.3")
    assert "10 calls" in str(opened.add(refused)), "all that there may be"
    opened.remove(refused)
    opened.remove(own.pop())
    again = call()
    assert opened.add(again) is None
    for each in (*few, *own, *others, again):
        opened.remove(each)
        opened.remove(each) if each in few else None
    assert (len(opened), opened._by_address) == (0, {})


def test_much_of_an_answer_may_be_with_the_core_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(open_calls.time, "monotonic", lambda: now[0])
    opened = OpenCalls()
    for sent_bytes, sending in ((MUCH_BYTES, False), (MUCH_BYTES + 1, True)):
        opened.add(each := call(sent_bytes=sent_bytes))
        opened.remove(each)
        assert opened.sending is sending
    now[0] += open_calls.SENDING_S
    assert not opened.sending
