"""The log never holds up who logs, and says nothing that a caller sent."""

from __future__ import annotations

import json
import logging
import os
import threading
import time

import pytest

from serve.observability.logs import LINES_AHEAD, JsonFormatter, QueuedHandler, mute


def a_record(text: str) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, __file__, 0, text, None, None)


def test_a_log_that_nobody_reads_holds_nobody_up_and_says_later_what_is_missing() -> None:
    reading, writing = os.pipe()
    handler = QueuedHandler(writing)
    handler.setFormatter(JsonFormatter())
    started = time.monotonic()
    for number in range(3 * LINES_AHEAD):
        handler.handle(a_record(f"{number} " + "x" * 100))
    handler.flush()
    assert 0.9 < time.monotonic() - started < 5, "the flush alone waits"
    content = bytearray()

    def read() -> None:
        while part := os.read(reading, 1 << 16):
            content.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    handler.flush()
    os.close(writing)
    reader.join(10)
    os.close(reading)
    said = [json.loads(line)["message"] for line in content.decode().splitlines()]
    kept, dropped = [text for text in said if "dropped" not in text], [text for text in said if "dropped" in text]
    numbers = [int(text.split()[0]) for text in kept]
    assert numbers == sorted(set(numbers)), "in order, and each once"
    assert numbers[: LINES_AHEAD // 2] == list(range(LINES_AHEAD // 2))
    assert 1 <= len(dropped) <= 3
    assert len(kept) + sum(int(text.split()[0]) for text in dropped) == 3 * LINES_AHEAD


def test_a_muted_logger_says_its_text_a_line_a_second_and_never_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Untouchable:
        def __str__(self) -> str:
            raise AssertionError("formatted")

    mute("a.library.of.others", "something was wrong")
    library, said = logging.getLogger("a.library.of.others"), []
    monkeypatch.setattr(library, "handle", lambda record: said.append(record) if library.filter(record) else None)
    for _ in range(3):
        for _ in range(1000):
            try:
                raise ValueError("secret")
            except ValueError:
                library.exception("%s", Untouchable())
        now[0] += 1.0
    more = "something was wrong; 999 more since the last such line"
    assert [record.getMessage() for record in said] == ["something was wrong", more, more]
    assert not any(record.exc_info for record in said)


def test_what_is_not_said_costs_next_to_nothing() -> None:
    mute("another.library", "something was wrong")
    library = logging.getLogger("another.library")
    library.error("x")
    started = time.thread_time()
    for _ in range(100_000):
        library.error("x")
    assert time.thread_time() - started < 1
