"""Whether a file has changed, as far as its time, size and inode tell. Links are followed: Kubernetes swaps those."""

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
