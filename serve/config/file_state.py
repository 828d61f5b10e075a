"""Detects whether a file has changed, by time, size and inode. Follows links, because Kubernetes replaces those."""

from __future__ import annotations

from pathlib import Path

FileState = tuple[int, int, int] | None  # None: not there


def file_state(path: Path) -> FileState:
    """Differs from an earlier one when the file has been written, replaced, removed or made."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
