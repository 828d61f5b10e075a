"""Cores that may be used: the affinity, and quotas of either version of cgroups, pretended in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve.engine.resources import usable_cores


def cgroups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A pretended /sys/fs/cgroup and /proc/self/cgroup."""
    for name, content in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "self").write_text(own)
    return folder / "cgroup", folder / "self"


V1 = "cpu/{}cpu.cfs_{}_us"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 32),
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),  # half a core is one thread
        ("0::/pod/box\n", {"pod/cpu.max": "300000 100000", "pod/box/cpu.max": "max 100000"}, 3),  # a parent's quota holds
        ("0::/kubepods/pod1/box\n", {"cpu.max": "200000 100000"}, 2),  # the host's path in a container's own namespace
        ("4:cpu,cpuacct:/\n", {V1.format("", "quota"): "-1\n", V1.format("", "period"): "100000\n"}, 32),
        ("4:cpuacct,cpu:/\n", {V1.format("", "quota"): "150000\n", V1.format("", "period"): "50000\n"}, 3),
        ("4:cpu:/docker/a\n", {V1.format("docker/a/", "quota"): "200000", V1.format("docker/a/", "period"): "100000"}, 2),
        ("9:memory:/\n", {V1.format("", "quota"): "100000", V1.format("", "period"): "100000"}, 32),  # no cpu controller here
        ("", {}, 32),
        ("0::/\n", {"cpu.max": "nonsense"}, 32),
    ],
)
def test_cores_are_the_least_of_affinity_and_quotas(
    own: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue: a container's CPU quota was not looked at, and 32 cores meant 32 threads whatever it was."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    assert usable_cores(*cgroups(tmp_path, own, files)) == cores


def test_where_there_is_no_affinity_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert usable_cores(*cgroups(tmp_path, "", {})) == 10


def test_a_narrow_affinity_bounds_a_wide_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert usable_cores(*cgroups(tmp_path, "0::/\n", {"cpu.max": "400000 100000"})) == 1
