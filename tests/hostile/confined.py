"""A memory limit that the kernel enforces: a control group of version 1 of its own, for one process and what it starts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = Path("/sys/fs/cgroup/memory")
JOIN = "import pathlib, os, runpy, sys; pathlib.Path({group!r}, 'cgroup.procs').write_text(str(os.getpid()));" + (
    " runpy.run_module('serve', run_name='__main__', alter_sys=True)"
)


class Group:
    """The control group of a ``memory_limit`` block."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def module(self) -> tuple[str, str]:
        """What runs the server in the group, for ``ServerProcess``."""
        return ("-c", JOIN.format(group=str(self._path)))

    @property
    def most_bytes(self) -> int:
        """The most that was used so far."""
        return int((self._path / "memory.max_usage_in_bytes").read_text())

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed for the limit."""
        words = (self._path / "memory.oom_control").read_text().split()
        return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def can_confine() -> bool:
    """Whether this process may make such groups."""
    return (MEMORY / "memory.limit_in_bytes").exists() and os.access(MEMORY, os.W_OK)


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Group]:
    """A block with a group; whoever is in it must have ended before the block does."""
    path = Path(tempfile.mkdtemp(prefix="digits-test-", dir=MEMORY))
    try:
        (path / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield Group(path)
    finally:
        path.rmdir()
