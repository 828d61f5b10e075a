"""Files: written whole or not at all, locked while they are rewritten, and read anew when they change."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Generic, Literal, TypeVar

from serve.errors import SettingsError

log = logging.getLogger(__name__)

LOCK_WAIT_S, LOOK_S = 10.0, 0.02
MOST_BYTES = 1 << 20  # of a file that is watched
NAME_BYTES = 8  # drawn for the name of a file that is being written

FileState = tuple[int, int, int, int]
ValueT = TypeVar("ValueT")


def replace_file(path: Path, content: bytes, mode: int) -> None:
    """Replace a file, or make it, with these permissions. Raises OSError, and then it is as it was and nothing is left beside."""
    with replacing([path], mode) as (file,):
        file.write(content)


@contextlib.contextmanager
def locked(folder: Path, wait_s: float | None = None) -> Iterator[None]:
    """Lock a folder for the block: one process or thread at a time, among those that call this.

    Raises OSError without such a folder, or BlockingIOError when another stays in its block for longer than ``wait_s``
    (``LOCK_WAIT_S``).
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + (LOCK_WAIT_S if wait_s is None else wait_s)
        while not _has_locked(handle):
            if time.monotonic() >= deadline:
                raise OSError(errno.EAGAIN, f"another process has locked {folder}")
            time.sleep(LOOK_S)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(paths: Sequence[Path], mode: int | None = None) -> Iterator[Sequence[IO[bytes]]]:
    """A block that writes files: at its end they take the places of ``paths``, in that order; if it raises, they are gone.

    With a ``mode`` these are their permissions, and until then they are for their owner alone. What a killed process left of the
    same files is removed.
    """
    # Not by the process's number: in containers that share a volume it is 1 for all.
    beside = [path.with_name(f".{path.name}-{secrets.token_hex(NAME_BYTES)}") for path in paths]
    for path in paths:
        remove_abandoned(path)
    opener = partial(os.open, mode=0o666 if mode is None else 0o600)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(_made_and_locked(each, opener)) for each in beside]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
            for each, path in zip(beside, paths, strict=True):  # still locked
                each.replace(path)
    finally:
        for each in beside:
            with contextlib.suppress(OSError):
                each.unlink()


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of a file that they were to write: nobody has locked it.

    Nothing is removed where the file system has no locks.
    """
    remove_abandoned_in(path.parent, glob.escape(path.name))


def remove_abandoned_in(folder: Path, names: str = "*") -> None:
    """The same for all files of a folder whose names match a pattern."""
    for each in folder.glob(f".{names}-{'[0-9a-f]' * 2 * NAME_BYTES}"):
        with contextlib.suppress(OSError), each.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            each.unlink()


def _made_and_locked(path: Path, opener: Callable[[str, int], int]) -> IO[bytes]:
    """A new file, locked for as long as it is open."""
    while True:
        file = open(path, "xb", opener=opener)  # noqa: SIM115  # whoever it is returned to closes it
        if _has_locked(file.fileno()) and path.exists():
            return file
        file.close()  # another process took it for an abandoned one
        path.unlink(missing_ok=True)


def _has_locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: as good as it can be had
        pass
    return True


def file_state(status: os.stat_result) -> FileState:
    """Differs from an earlier one when the file has been written, replaced, or given to others."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def read_regular(path: Path, most_bytes: int, flags: int = 0) -> tuple[bytes, FileState]:
    """A regular file's bytes, and its state as it was opened. Raises OSError, also for anything else, which is not waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        if status.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"over {most_bytes} bytes")
        with open(handle, "rb", closefd=False) as file:
            return file.read(most_bytes), file_state(status)
    finally:
        os.close(handle)


class Watched(Generic[ValueT]):
    """The ``value`` of files that belong together, read anew when one of them has changed. Not for several threads at once.

    What cannot be read or used changes nothing: it is logged once, and tried again at every look.
    """

    def __init__(
        self, flags: Sequence[tuple[str, Path]], parse: Callable[[list[bytes]], ValueT], missing: ValueT | None = None
    ) -> None:
        """``flags``: what names each file. ``missing``: the value without a file. Raises SettingsError, as ``parse`` does."""
        self._flags = flags
        self._parse = parse
        self._missing = missing
        self._seen_missing = False
        self._problem = ""
        self._states: list[FileState] | None = None  # at the last reading that succeeded; None: there was no file
        self.value: ValueT
        if missing is None or self._look_at() is not None:
            self._read()
        else:
            self.value = missing

    def look(self, *, may_be_gone: bool = True) -> Literal["ok", "failed"] | None:
        """Read again after a change; None: no change. A file counts as missing only at the second look, because volumes fail.

        ``may_be_gone``: False where a missing file says nothing, because its folder's other content is missing too.
        """
        names = " and ".join(str(path) for _, path in self._flags)
        try:
            now = self._look_at()
            if now is None and self._missing is not None:
                if not may_be_gone or self._states is None or not self._seen_missing:
                    self._seen_missing = may_be_gone
                    return None
                self._states, self.value = None, self._missing
                log.warning("%s is gone", names)
                return "ok"
            self._seen_missing = False
            if now is not None and now == self._states:
                self._problem = ""
                return None
            self._read()
        except SettingsError as error:
            if str(error) != self._problem:
                log.error("%s: what was read before stays in force", error)
            self._problem = str(error)
            return "failed"
        self._problem = ""
        log.info("%s read anew", names)
        return "ok"

    def _look_at(self) -> list[FileState] | None:
        """The files' states; None when one is not there. Raises SettingsError when that cannot be told."""
        states = []
        for flag, path in self._flags:
            try:
                states.append(file_state(path.stat()))
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                raise _unreadable(flag, path, error) from None
        return states

    def _read(self) -> None:
        contents, states = [], []
        for flag, path in self._flags:
            try:
                content, state = read_regular(path, MOST_BYTES)
            except OSError as error:
                raise _unreadable(flag, path, error) from None
            contents.append(content)
            states.append(state)
        self.value = self._parse(contents)
        self._states = states


def _unreadable(flag: str, path: Path, error: OSError) -> SettingsError:
    return SettingsError(f"{flag} {path} cannot be read ({error.strerror})")
