"""What this process may use, according to its affinity and its container: processor cores, and memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")

NumberT = TypeVar("NumberT", int, float)


def usable_cores(cgroup_root: Path = CGROUP_ROOT, own_cgroups: Path = OWN_CGROUPS) -> int:
    """Cores of the affinity mask, all where there is none; or of the smallest CPU quota that applies if that is less; at least 1.

    A quota of two and a half cores counts as two: one thread more would be throttled together with the others.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    return max(1, min([affinity, *(int(quota) for quota in _quotas(cgroup_root, own_cgroups))]))


def memory_bytes(cgroup_root: Path = CGROUP_ROOT, own_cgroups: Path = OWN_CGROUPS) -> int:
    """The memory of the machine, or of the smallest limit that applies if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_limits(cgroup_root, own_cgroups, "memory", _memory_version_1, _memory_version_2)])


def give_memory_back() -> None:
    """Give the system what the allocator keeps of freed memory. Without glibc nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _quotas(root: Path, own_cgroups: Path) -> Iterator[float]:
    """The quota, in cores, of this process's cgroup and of each above it that has one."""
    return _limits(root, own_cgroups, "cpu", _version_1, _version_2)


def _limits(
    root: Path,
    own_cgroups: Path,
    controller: str,
    version_1: Callable[[Path], NumberT | None],
    version_2: Callable[[Path], NumberT | None],
) -> Iterator[NumberT]:
    """What a controller's files say of this process's cgroup and of each above it."""
    for line in _read(own_cgroups).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one tree for all controllers
            top, limit_of = root, version_2
        elif controller in controllers.split(","):
            top, limit_of = root / controller, version_1
        else:
            continue
        own: Path = top / path.lstrip("/")
        # In a container the path may be the host's while the root is the container's own: both are looked at.
        for folder in (own, *own.parents):
            limit = limit_of(folder) if folder.is_relative_to(top) else None
            if limit is not None:
                yield limit


def _version_2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _version_1(folder: Path) -> float | None:
    quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None  # -1: none


def _memory_version_2(folder: Path) -> int | None:
    limit = _read(folder / "memory.max").strip()
    return int(limit) if limit.isdecimal() else None  # max: none


def _memory_version_1(folder: Path) -> int | None:
    limit = _read(folder / "memory.limit_in_bytes").strip()
    return int(limit) if limit.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
