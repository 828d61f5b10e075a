"""A raw HTTP/2 client for gRPC calls that no library would make: frames over a plain socket, read and answered only on demand."""

from __future__ import annotations

import gzip
import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

from hpack import Decoder, Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)  # fmt: skip

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DEFAULT_WINDOW = 65_535
FRAME = 16_384  # bytes in a frame's body unless the peer allows more
HEAD = 9  # bytes of a frame's head
TIMEOUT_S = 20.0
ATTACKER = "127.0.0.66"  # loopback too, but not the victim's address: without tokens callers are told apart by theirs

Header = tuple[bytes, bytes]


class Answer:
    """What has come of a stream so far. ``status`` is gRPC's, None until it came; ``reset`` an HTTP/2 error code."""

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.ended = False
        self.reset: int | None = None

    @property
    def status(self) -> int | None:
        value = self.headers.get(b"grpc-status")
        return None if value is None else int(value)


class Http2Connection:
    """A connection to a server's gRPC port. Methods raise OSError when it is gone, TimeoutError (one too) when it stalls.

    Nothing is read but by ``pump`` and the methods that wait. ``window`` is what the server may send on a stream before it is
    granted more, which happens only when ``grants``; ``answers_pings=False`` plays a peer that is silent. IPv4.
    """

    def __init__(
        self,
        target: str,
        *,
        window: int = DEFAULT_WINDOW,
        grants: bool = True,
        answers_pings: bool = True,
        settings: Mapping[int, int] | None = None,
        source: str = ATTACKER,
    ) -> None:
        host, _, port = target.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), TIMEOUT_S, (source, 0))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answers: dict[int, Answer] = {}
        self.sent_bytes = 0
        self.going_away = False
        self._grants, self._answers_pings = grants, answers_pings
        self._encoder, self._decoder = Encoder(), Decoder()
        self._unread = b""
        self._next_stream = 1
        self._window = DEFAULT_WINDOW  # what may be sent on the connection
        self._stream_window = DEFAULT_WINDOW  # and on a stream that is new
        self._windows: dict[int, int] = {}
        self._authority = target.encode()
        chosen = {SettingsFrame.INITIAL_WINDOW_SIZE: window, **(settings or {})}
        try:
            self.write(PREFACE + SettingsFrame(settings=chosen).serialize())
        except OSError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def write(self, content: bytes) -> None:
        """Send bytes as they are: whole frames, or whatever else they may be."""
        self.socket.sendall(content)
        self.sent_bytes += len(content)

    def open(self, method: str, headers: Sequence[Header] = (), *, compressed: bool = False) -> int:
        """Begin a call of ``/service/method``; returns its stream. Header values are any bytes."""
        stream = self._new_stream()
        self.write(self.head(stream, method, headers, compressed=compressed))
        return stream

    def open_many(self, method: str, number: int, message: bytes | None = None, *, compressed: bool = False) -> list[int]:
        """Begin calls in one go, each with the same message, if there is one, and no further one."""
        streams = [self._new_stream() for _ in range(number)]
        body = b"" if message is None else framed(message, compressed=compressed)
        assert len(body) <= FRAME, "one frame each, so that no window is waited for"
        content = []
        for stream in streams:
            content.append(self.head(stream, method, compressed=compressed))
            if message is not None:
                content.append(_data(stream, body, end=True))
        self._window -= len(body) * number
        self.write(b"".join(content))
        return streams

    def head(self, stream: int, method: str, headers: Sequence[Header] = (), *, compressed: bool = False) -> bytes:
        """The frames that begin a call."""
        fields: list[Header] = [
            (b":method", b"POST"), (b":scheme", b"http"), (b":path", method.encode()), (b":authority", self._authority),
            (b"te", b"trailers"), (b"content-type", b"application/grpc"),
        ]  # fmt: skip
        if compressed:
            fields.append((b"grpc-encoding", b"gzip"))
        block = self._encoder.encode([*fields, *headers])
        pieces = [block[at : at + FRAME] for at in range(0, len(block), FRAME)]
        frames: list[Frame] = [HeadersFrame(stream, pieces[0])]
        frames += [ContinuationFrame(stream, piece) for piece in pieces[1:]]
        frames[-1].flags.add("END_HEADERS")
        return b"".join(frame.serialize() for frame in frames)

    def send(self, stream: int, message: bytes, *, compressed: bool = False, end: bool = True) -> None:
        """Send one message, waiting for the server's windows; ``compressed``: it has been made by ``gzipped``."""
        left = framed(message, compressed=compressed)
        deadline = time.monotonic() + TIMEOUT_S
        while left:
            room = min(self._window, self._windows[stream], FRAME)
            if room <= 0:
                if self.answers[stream].ended:
                    return  # refused before all of it was there
                if time.monotonic() > deadline:
                    raise TimeoutError("the server grants no window")
                self.pump(0.1)
                continue
            piece, left = left[:room], left[room:]
            self._window -= len(piece)
            self._windows[stream] -= len(piece)
            self.write(_data(stream, piece, end=end and not left))

    def reset(self, streams: Iterable[int], error: int = 8) -> None:
        """End streams without waiting, by default as cancelled."""
        self.write(b"".join(RstStreamFrame(stream, error).serialize() for stream in streams))

    def call(self, method: str, message: bytes, headers: Sequence[Header] = (), *, compressed: bool = False) -> Answer:
        """A whole call."""
        stream = self.open(method, headers, compressed=compressed)
        self.send(stream, message, compressed=compressed)
        return self.finish(stream)

    def finish(self, stream: int, timeout_s: float = TIMEOUT_S) -> Answer:
        """Wait until a stream has ended."""
        deadline = time.monotonic() + timeout_s
        answer = self.answers[stream]
        while not answer.ended:
            if time.monotonic() > deadline:
                raise TimeoutError("no answer")
            self.pump(0.1)
        return answer

    def settle(self, seconds: float) -> None:
        """Read what comes for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.pump(left)

    def pump(self, timeout_s: float) -> None:
        """Take up what the server has sent, waiting for something no longer than ``timeout_s``."""
        self.socket.settimeout(max(timeout_s, 0.001))
        try:
            content = self.socket.recv(1 << 18)
        except TimeoutError:
            return
        finally:
            self.socket.settimeout(TIMEOUT_S)
        if not content:
            raise ConnectionResetError("the server has closed the connection")
        self._unread += content
        at = 0
        while len(self._unread) - at >= HEAD:
            frame, length = Frame.parse_frame_header(memoryview(self._unread)[at : at + HEAD])
            if len(self._unread) - at < HEAD + length:
                break
            frame.parse_body(memoryview(self._unread)[at + HEAD : at + HEAD + length])
            at += HEAD + length
            self._take(frame)
        self._unread = self._unread[at:]

    def drop_received(self) -> None:
        """Throw away what the server has sent: its answers to what cannot be answered."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(1 << 18):
                pass
        except BlockingIOError:
            pass
        finally:
            self.socket.settimeout(TIMEOUT_S)

    def _new_stream(self) -> int:
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.answers[stream] = Answer()
        self._windows[stream] = self._stream_window
        return stream

    def _take(self, frame: Frame) -> None:
        answer = self.answers.setdefault(frame.stream_id, Answer())
        match frame:
            case SettingsFrame() if "ACK" not in frame.flags:
                new = frame.settings.get(SettingsFrame.INITIAL_WINDOW_SIZE, self._stream_window)
                for stream in self._windows:
                    self._windows[stream] += new - self._stream_window
                self._stream_window = new
                self.write(SettingsFrame(flags=["ACK"]).serialize())
            case WindowUpdateFrame(stream_id=0):
                self._window += frame.window_increment
            case WindowUpdateFrame():
                self._windows[frame.stream_id] += frame.window_increment
            case PingFrame() if "ACK" not in frame.flags and self._answers_pings:
                self.write(PingFrame(opaque_data=frame.opaque_data, flags=["ACK"]).serialize())
            case HeadersFrame():  # gRPC's fit into one frame
                answer.headers |= {_raw(key): _raw(value) for key, value in self._decoder.decode(frame.data, raw=True)}
            case DataFrame():
                answer.body += frame.data
                if self._grants and frame.flow_controlled_length:
                    for stream in (0, frame.stream_id):
                        self.write(WindowUpdateFrame(stream, frame.flow_controlled_length).serialize())
            case RstStreamFrame():
                answer.ended, answer.reset = True, frame.error_code
            case GoAwayFrame():
                self.going_away = True
        if "END_STREAM" in frame.flags:
            answer.ended = True


def framed(message: bytes, *, compressed: bool = False) -> bytes:
    """A message with gRPC's prefix."""
    return struct.pack(">BI", compressed, len(message)) + message


def gzipped(message: bytes) -> bytes:
    return gzip.compress(message, mtime=0)


def _data(stream: int, content: bytes, *, end: bool) -> bytes:
    """A DATA frame, without hyperframe: megabytes go this way."""
    return struct.pack(">I", len(content) << 8)[:-1] + struct.pack(">BBI", 0, end, stream) + content


def _raw(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
