"""Writes files atomically, beside the target and renamed into place; and locks a file while it is read and rewritten."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO

LOCK_WAIT_S, LOOK_S = 10.0, 0.02

FileState = tuple[int, int, int] | None  # None: not there


def replace_file(path: Path, content: bytes, mode: int) -> None:
    """Replace a file, or make it, with these permissions. Raises OSError, and then it is as it was and nothing is left beside."""
    with replacing([path], mode) as (file,):
        file.write(content)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A block that one process or thread at a time is in, of those that ask for the same folder.

    Raises OSError without such a folder, or when another stays in its block for longer than ``LOCK_WAIT_S``.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_WAIT_S
        while not _has_locked(handle):
            if time.monotonic() > deadline:
                raise OSError(errno.EAGAIN, f"another process has locked {folder}")
            time.sleep(LOOK_S)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(paths: Sequence[Path], mode: int | None = None) -> Iterator[Sequence[IO[bytes]]]:
    """A block that writes files: at its end they take the places of ``paths``, in that order; if it raises, they are gone.

    With a ``mode`` these are their permissions, and until then they are for their owner alone.
    """
    # Not by the process's number: in containers that share a volume it is 1 for all.
    beside = [path.with_name(f".{path.name}-{secrets.token_hex(8)}") for path in paths]
    opener = partial(os.open, mode=0o666 if mode is None else 0o600)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open(each, "xb", opener=opener)) for each in beside]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
        for each, path in zip(beside, paths, strict=True):
            each.replace(path)
    finally:
        for each in beside:
            with contextlib.suppress(OSError):
                each.unlink()


def _has_locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: as good as it can be had
        pass
    return True


def file_state(path: Path) -> FileState:
    """Differs from an earlier one when the file has been written, replaced, removed or made."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
