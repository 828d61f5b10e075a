"""A file that is watched: what is taken up, what is tried again, what is never waited for."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve import files
from serve.access.tokens import TokenFile, main
from serve.errors import SettingsError, UnauthenticatedError
from serve.files import Watched, remove_abandoned, replacing


def parse(contents: list[bytes]) -> str:
    if contents[0] == b"spoilt":
        raise SettingsError("--file is spoilt")
    return contents[0].decode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("one")
    return path


def failing(error: int, monkeypatch: pytest.MonkeyPatch, target: Path, call: str = "open") -> list[int]:
    """Let ``os.open`` or ``os.stat`` of a file fail while the list that is returned holds something."""
    honest: Callable[..., Any] = getattr(os, call)
    active = [error]

    def maybe(path: Any, *given: Any, **named: Any) -> Any:
        if active and Path(path) == target:
            raise OSError(error, os.strerror(error), str(path))
        return honest(path, *given, **named)

    monkeypatch.setattr(files.os, call, maybe)
    return active


def test_a_change_is_taken_up_once(path: Path) -> None:
    watched = Watched([("--file", path)], parse)
    assert (watched.look(), watched.value) == (None, "one")
    path.write_text("another")
    assert (watched.look(), watched.value, watched.look()) == ("ok", "another", None)


def test_a_file_of_the_same_size_time_and_inode_is_read_when_it_was_given_to_others(path: Path) -> None:
    """ctime is in the state: chmod changes nothing else, and a writer can set the time back."""
    watched = Watched([("--file", path)], parse)
    before = path.stat()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size, path.stat().st_ino) == (before.st_mtime_ns, 3, before.st_ino)
    assert (watched.look(), watched.value) == ("ok", "two")


@pytest.mark.parametrize(("error", "call"), [(errno.EMFILE, "open"), (errno.EACCES, "open"), (errno.ESTALE, "stat")])
def test_a_reading_that_failed_is_tried_again_and_logged_once(
    error: int, call: str, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched([("--file", path)], parse)
    path.write_text("another")
    if call == "open":
        active = failing(error, monkeypatch, path)
    else:
        honest, active = Path.stat, [error]

        def maybe(self: Path, **named: Any) -> os.stat_result:
            if active and self == path:
                raise OSError(error, os.strerror(error))
            return honest(self, **named)

        monkeypatch.setattr(Path, "stat", maybe)
    assert [watched.look() for _ in range(3)] == ["failed"] * 3
    assert watched.value == "one"
    assert caplog.text.count(os.strerror(error)) == 1
    active.clear()
    assert (watched.look(), watched.value) == ("ok", "another")


def test_content_that_cannot_be_used_stays_out_and_another_error_is_said_too(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched([("--file", path)], parse)
    path.write_text("spoilt")
    assert [watched.look() for _ in range(2)] == ["failed"] * 2
    path.unlink()
    assert [watched.look() for _ in range(2)] == ["failed"] * 2
    assert watched.value == "one"
    assert [record.getMessage() for record in caplog.records] == [
        "--file is spoilt: what was read before stays in force",
        f"--file {path} cannot be read (No such file or directory): what was read before stays in force",
    ]
    path.write_text("one")
    assert watched.look() == "ok"


def test_a_file_that_may_be_missing_is_gone_at_the_second_look(path: Path) -> None:
    watched = Watched([("--file", path)], parse, missing="nothing")
    path.rename(path.with_name("away"))
    assert (watched.look(), watched.value) == (None, "one")
    path.with_name("away").rename(path)
    watched.look()
    path.unlink()
    assert (watched.look(), watched.value) == (None, "one")
    assert (watched.look(), watched.value) == ("ok", "nothing")
    assert watched.look() is None
    path.write_text("two")
    assert (watched.look(), watched.value) == ("ok", "two")
    assert Watched([("--file", path.with_name("never"))], parse, missing="nothing").value == "nothing"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "large"])
def test_what_is_no_regular_file_of_a_sane_size_is_refused_in_a_line_and_not_waited_for(kind: str, path: Path) -> None:
    watched = Watched([("--file", path)], parse)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(files.MOST_BYTES + 1)
    gc.collect()  # what other tests left open is not to be closed in between
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert [watched.look() for _ in range(3)] == ["failed"] * 3
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "no descriptor is left open"
    with pytest.raises(
        SettingsError, match=rf"--file .*file cannot be read \({'over' if kind == 'large' else 'no regular file'}"
    ):
        Watched([("--file", path)], parse, missing="nothing")


def test_files_that_belong_together_are_read_together(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("beside")
    watched = Watched([("--file", path), ("--other", other)], lambda contents: b" ".join(contents).decode())
    assert watched.value == "one beside"
    other.write_text("next")
    assert (watched.look(), watched.value) == ("ok", "one next")


def test_a_token_revoked_while_the_file_could_not_be_read_is_out_once_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue: after one failed reading, as when descriptors are used up, a revoked token worked for ever."""
    path = tmp_path / "tokens.json"
    assert main(["add", str(path), "--name=leaving"]) == 0
    token, reloads = capsys.readouterr().out.strip(), []  # type: tuple[str, list[str]]
    tokens = TokenFile(path, reloads.append)
    assert main(["remove", str(path), "--name=leaving"]) == 0
    active = failing(errno.EMFILE, monkeypatch, path)
    tokens.look()
    assert tokens.check(token).name == "leaving", "what was read before stays in force"
    active.clear()
    tokens.look()
    with pytest.raises(UnauthenticatedError):
        tokens.check(token)
    assert reloads == ["failed", "ok"]


KILLED = """
import os, signal, sys
from pathlib import Path
from serve.files import replacing
with replacing([Path(sys.argv[1])]) as (file,):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_when_the_file_is_written_again(path: Path) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
        assert len(list(path.parent.iterdir())) == 2, "the next one that is killed removes what the one before left"
    others = [path.with_name(name) for name in (f".{path.name}-notes", f".{path.name}x-{'0' * 16}", f".{path.name}-{'0' * 17}")]
    for other in others:
        other.write_text("somebody's")
    with replacing([path]) as (file,):
        file.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert set(path.parent.iterdir()) == {path, *others}


def test_what_is_being_written_is_not_taken_for_abandoned(path: Path) -> None:
    with replacing([path]) as (one,):
        one.write(b"one")
        remove_abandoned(path)
        with replacing([path]) as (other,):
            other.write(b"other")
    assert path.read_bytes() == b"one"


def test_a_file_that_another_removes_before_it_is_locked_is_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, removed = fcntl.flock, []

    def late(handle: Any, operation: int) -> None:
        [made] = path.parent.glob(".file-*")
        if not removed:
            made.unlink()
            removed.append(made)
        honest(handle, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with replacing([path]) as (file,):
        file.write(b"two")
    assert (path.read_bytes(), len(removed)) == (b"two", 1)


def test_without_locks_nothing_is_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refused)
    beside = path.with_name(f".{path.name}-{'0' * 16}")
    beside.write_text("perhaps somebody writes it")
    with replacing([path]) as (file,):
        file.write(b"two")
    assert (path.read_bytes(), beside.exists()) == (b"two", True)
