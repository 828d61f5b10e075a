"""Attacks on the server's memory and on the thread that receives. Each is made on connections of its own and lasts while they do.

An attacker takes what it gets: refused streams and closed connections are no failures of an attack.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from hyperframe.frame import (
    ContinuationFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from serve.pb.digits.v1 import digits_pb2 as pb
from tests.hostile.http2 import Http2Connection, gzipped
from tests.hostile.shapes import GENERATE, STREAM, STREAM_INFER, generate_request, infer_count, stream_labels

WATCH = "/grpc.health.v1.Health/Watch"
UNREAD = 200  # answers, of 3.2 MB each
UNREAD_EVERY_S = 0.03  # one asks for the next: many at once would be refused for the queue's length
MANY_LABELS, LABEL_STREAMS = 1_000_000, 20
INFER_STREAMS, INFER_REQUESTS = 6, 50
MANY_STREAMS, CONNECTIONS = 20_000, 20
FLOOD_BLOCK = 1000  # frames in one write
RESETS, RESETS_EVERY_S = 1000, 0.02  # some 20,000 calls a second, more than the server begins


Connect = Callable[..., Http2Connection]  # with the options of a connection
Attack = Callable[[Connect], None]


def unread_answers(connect: Connect) -> None:
    """Ask for large answers and read none."""
    connection = connect(window=0, grants=False)
    message = generate_request(1024, pb.IMAGE_FORMAT_FLOAT32)
    for _ in range(UNREAD):
        connection.open_many(GENERATE, 1, message)
        connection.settle(UNREAD_EVERY_S)


def unread_label_streams(connect: Connect) -> None:
    """Begin streams with many labels each, compressed, and read nothing."""
    message = gzipped(stream_labels(MANY_LABELS))
    connect(window=0, grants=False).open_many(STREAM, LABEL_STREAMS, message, compressed=True)


def unread_infer_streams(connect: Connect) -> None:
    """Ask for answer after answer on streams that are not read."""
    message = infer_count(1024, raw=True, output="images")
    connections = [connect(window=0, grants=False) for _ in range(INFER_STREAMS)]
    streams = [(connection, connection.open(STREAM_INFER)) for connection in connections]
    for _ in range(INFER_REQUESTS):
        for connection, stream in streams:
            connection.send(stream, message, end=False)
            connection.settle(UNREAD_EVERY_S)


def watches(connect: Connect) -> None:
    """Watch the server's health many times over."""
    _many(connect, WATCH, b"")


def calls_without_a_message(connect: Connect) -> None:
    """Begin calls and send nothing."""
    _many(connect, GENERATE, None)


def _many(connect: Connect, method: str, message: bytes | None) -> None:
    for _ in range(CONNECTIONS):
        with contextlib.suppress(OSError):
            connect().open_many(method, MANY_STREAMS // CONNECTIONS, message)


ON_MEMORY: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (unread_answers, unread_label_streams, unread_infer_streams, watches, calls_without_a_message)
}


@contextmanager
def under_attack(target: str, *attacks: Attack) -> Iterator[list[Http2Connection]]:
    """A block during which these attacks last, entered once all of them, side by side, have done their worst; the connections."""
    with ExitStack() as stack, ThreadPoolExecutor(len(attacks)) as threads:
        connections: list[Http2Connection] = []

        def connect(**options: Any) -> Http2Connection:
            connections.append(stack.enter_context(Http2Connection(target, **options)))
            return connections[-1]

        def do(attack: Attack) -> None:
            with contextlib.suppress(OSError):
                attack(connect)

        list(threads.map(do, attacks))
        yield connections


def flood(target: str, kind: str, seconds: float) -> int:
    """Send frames of a kind as fast as they are taken, for so long or until the server closes the connection; how many bytes."""
    connection = Http2Connection(target)
    more = FLOODS[kind](connection)
    deadline = time.monotonic() + seconds
    with connection, contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            connection.write(more())
            connection.drop_received()
    return connection.sent_bytes


def resets(target: str, seconds: float) -> None:
    """Connection after connection, each with a thousand calls without a request that end as they begin, in 28 KB."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), Http2Connection(target) as connection:
            calls = range(1, 2 * RESETS, 2)
            connection.write(b"".join(connection.head(call, GENERATE) + RstStreamFrame(call, 8).serialize() for call in calls))
        time.sleep(RESETS_EVERY_S)


def _endless_headers(connection: Http2Connection) -> Callable[[], bytes]:
    connection.write(HeadersFrame(1, b"").serialize())  # neither this frame nor those that follow end the block
    return lambda: ContinuationFrame(1, b"\x00\x01a\x01b" * 20).serialize() * FLOOD_BLOCK


def _resets(connection: Http2Connection) -> Callable[[], bytes]:
    def more() -> bytes:
        streams = connection.open_many(GENERATE, FLOOD_BLOCK // 10, generate_request(1))
        connection.reset(streams)
        return b""

    return more


def _frames(frame: Frame) -> Callable[[Http2Connection], Callable[[], bytes]]:
    block = frame.serialize() * FLOOD_BLOCK
    return lambda _: lambda: block


FLOODS: dict[str, Callable[[Http2Connection], Callable[[], bytes]]] = {
    "continuation": _endless_headers,
    "settings": _frames(SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 65_535})),
    "ping": _frames(PingFrame(opaque_data=b"12345678")),
    "priority": _frames(PriorityFrame(1, depends_on=0, stream_weight=1)),
    "window_update": _frames(WindowUpdateFrame(0, 1)),
    "resets": _resets,
}
