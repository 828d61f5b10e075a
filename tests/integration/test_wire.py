"""Garbage on the wire, below gRPC: well-behaved callers are answered throughout, and memory comes back."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack

import psutil
import pytest
from hyperframe.frame import PingFrame

from tests.hostile.http2 import Http2Connection
from tests.integration.test_hostile_callers import well_behaved_caller
from tests.server_process import ServerProcess

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
CANCEL = struct.pack(">I", 8)
PATH = b"/digits.v1.DigitGenerator/Generate"
HALF_OPEN = 2_000
HALF_OPEN_LONG = 9_000  # as many as a limit of 20,000 descriptors leaves room for, here and there
RESETS = 50_000
# Allocators keep some of it: 50 MB over 9,000 connections, 80 MB over 25,000 calls that were reset at once, were seen.
MOST_GROWTH_BYTES = 192 << 20


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field without indexing, name and value as they are (RFC 7541, section 6.2.2)."""
    return b"\0" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes((len(text),))
    rest, out = len(text) - 127, bytearray((127,))
    while rest > 127:
        out.append(rest & 127 | 128)
        rest >>= 7
    return bytes((*out, rest))


def request_headers(*more: tuple[bytes, bytes]) -> bytes:
    """The header block of a call."""
    pairs = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", PATH), (b":authority", b"localhost"))
    grpc = ((b"content-type", b"application/grpc"), (b"te", b"trailers"))
    return b"".join(literal(*pair) for pair in (*pairs, *grpc, *more))


def connect(server: ServerProcess) -> socket.socket:
    host, _, port = server.target.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def send(connection: socket.socket, content: bytes) -> None:
    """Send as much as the server will take: it may well hang up."""
    with contextlib.suppress(OSError):
        connection.sendall(content)


def endure(server: ServerProcess, garbage: Callable[[], None]) -> None:
    """Do it twice beside a well-behaved caller: what the first time made the server take is enough for the second."""
    process = psutil.Process(server.process.pid)
    with well_behaved_caller(server.target):
        garbage()
        before = process.memory_info().rss
        garbage()
    deadline = time.monotonic() + 30
    while (grown := process.memory_info().rss - before) > MOST_GROWTH_BYTES and time.monotonic() < deadline:
        time.sleep(0.1)
    assert grown <= MOST_GROWTH_BYTES
    assert server.process.poll() is None


def test_random_bytes_and_frames_cut_short(shared_server: ServerProcess) -> None:
    chance = random.Random(1)
    call = frame(HEADERS, END_HEADERS, 1, request_headers()) + frame(DATA, END_STREAM, 1, b"\0\0\0\0\0")

    def garbage() -> None:
        for turn in range(300):
            with connect(shared_server) as connection:
                if turn % 3 == 0:
                    send(connection, chance.randbytes(chance.randrange(1, 4096)))
                elif turn % 3 == 1:
                    frames = [frame(chance.randrange(11), chance.randrange(256), chance.randrange(9), chance.randbytes(20))]
                    send(connection, PREFACE + frame(SETTINGS, 0, 0) + b"".join(frames * chance.randrange(1, 50)))
                else:
                    content = PREFACE + frame(SETTINGS, 0, 0) + call
                    send(connection, content[: chance.randrange(len(PREFACE), len(content))])

    endure(shared_server, garbage)


@pytest.mark.parametrize("count", [HALF_OPEN, pytest.param(HALF_OPEN_LONG, marks=pytest.mark.long)])
def test_half_open_connections(shared_server: ServerProcess, count: int) -> None:
    """Half of them say nothing at all, half of them begin and do not go on."""

    def garbage() -> None:
        with ExitStack() as stack:
            for number in range(count):
                connection = stack.enter_context(connect(shared_server))
                if number % 2:
                    send(connection, PREFACE[:-1] if number % 4 == 1 else PREFACE + frame(SETTINGS, 0, 0)[:-1])

    endure(shared_server, garbage)


def test_headers_without_end(shared_server: ServerProcess) -> None:
    """A header of a megabyte, and CONTINUATION frames that never end (CVE-2024-27316)."""

    def garbage() -> None:
        for _ in range(20):
            with connect(shared_server) as connection:
                send(connection, PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, 0, 1, request_headers()))
                for _ in range(2_000):
                    send(connection, frame(CONTINUATION, 0, 1, literal(b"x", b"y" * 8_000)))

    endure(shared_server, garbage)


@pytest.mark.long
def test_streams_opened_and_reset_at_once(shared_server: ServerProcess) -> None:
    """Rapid reset (CVE-2023-44487): a call and its end in one breath, over and over."""

    def garbage() -> None:
        sent = 0
        while sent < RESETS:
            with connect(shared_server) as connection:
                send(connection, PREFACE + frame(SETTINGS, 0, 0))
                for stream in range(1, 2_000, 2):
                    send(
                        connection, frame(HEADERS, END_HEADERS, stream, request_headers()) + frame(RST_STREAM, 0, stream, CANCEL)
                    )
                    sent += 1

    endure(shared_server, garbage)


def test_callers_who_read_nothing(shared_server: ServerProcess) -> None:
    """Large answers are asked for and never read; pings and settings are sent and their answers not read either."""
    body = b"\x0a\x03mlp\x18\x80\x08\x20\x07"  # model: mlp, count: 1024, seed: 7
    call = frame(DATA, END_STREAM, 1, b"\0" + struct.pack(">I", len(body)) + body)

    def garbage() -> None:
        with ExitStack() as stack:
            for _ in range(50):
                connection = stack.enter_context(connect(shared_server))
                connection.settimeout(0.5)
                send(connection, PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, request_headers()) + call)
                send(connection, (frame(PING, 0, 0, bytes(8)) + frame(SETTINGS, 0, 0)) * 5_000)

    endure(shared_server, garbage)


@pytest.mark.long
def test_keepalive_pings_every_ten_seconds_are_not_too_many(shared_server: ServerProcess) -> None:
    """Issue: Go's least interval; the connection was ended at the fourth."""
    with Http2Connection(shared_server.target) as connection:
        for _ in range(4):
            connection.write(PingFrame(opaque_data=bytes(8)).serialize())
            connection.settle(10)
        assert not connection.going_away
