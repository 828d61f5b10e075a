"""How many processor cores this process may use, according to its affinity and its container's CPU quota."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cores(cgroup_root: Path = CGROUP_ROOT, own_cgroups: Path = OWN_CGROUPS) -> int:
    """Cores of the affinity mask, all where there is none; or of the smallest CPU quota that applies if that is less; at least 1.

    A quota of two and a half cores counts as two: one thread more would be throttled together with the others.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    return max(1, min([affinity, *(int(quota) for quota in _quotas(cgroup_root, own_cgroups))]))


def _quotas(root: Path, own_cgroups: Path) -> Iterator[float]:
    """The quota, in cores, of this process's cgroup and of each above it that has one."""
    for line in _read(own_cgroups).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one tree for all controllers
            top, quota_of = root, _version_2
        elif "cpu" in controllers.split(","):
            top, quota_of = root / "cpu", _version_1
        else:
            continue
        own = top / path.lstrip("/")
        # In a container the path may be the host's while the root is the container's own: both are looked at.
        for folder in (own, *own.parents):
            if folder.is_relative_to(top) and (quota := quota_of(folder)) is not None:
                yield quota


def _version_2(folder: Path) -> float | None:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _version_1(folder: Path) -> float | None:
    quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None  # -1: none


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
