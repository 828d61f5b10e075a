"""What this process may use, according to its affinity and its container: processor cores, and memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cores(cgroup_root: Path = CGROUP_ROOT, own_cgroups: Path = OWN_CGROUPS) -> int:
    """Cores of the affinity mask, all where there is none; or of the smallest CPU quota that applies if that is less; at least 1.

    A quota of two and a half cores counts as two: one thread more would be throttled together with the others.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    return max(1, min([affinity, *_limits(cgroup_root, own_cgroups, "cpu", _cores)]))


def memory_bytes(cgroup_root: Path = CGROUP_ROOT, own_cgroups: Path = OWN_CGROUPS) -> int:
    """The memory of the machine, or of the smallest limit that applies if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_limits(cgroup_root, own_cgroups, "memory", _memory)])


def give_memory_back() -> None:
    """Give the system what the allocator keeps of freed memory. Without glibc nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _limits(root: Path, own_cgroups: Path, controller: str, limit_of: Callable[[Path], int | None]) -> Iterator[int]:
    """What a controller's files say of this process's cgroup and of each above it."""
    for line in _read(own_cgroups).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root  # version 2 has one tree for all controllers
        own = top / path.lstrip("/")
        # In a container the path may be the host's while the root is the container's own: both are looked at.
        for folder in (own, *own.parents):
            limit = limit_of(folder) if folder.is_relative_to(top) else None
            if limit is not None:
                yield limit


def _cores(folder: Path) -> int | None:
    """Whole cores of a quota; None without one, which is ``max`` in version 2 and -1 in version 1."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not period:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(quota) // int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _memory(folder: Path) -> int | None:
    limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
    return int(limit) if limit.isdecimal() else None  # max: none


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
