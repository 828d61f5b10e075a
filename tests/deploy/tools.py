"""The platform's own tools, wherever ``make deploy-test`` has put them. One that is missing fails the test, by name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FROM_PIP = Path("build/deploy-tools/bin")
# Command → Debian package.
PACKAGES = {"prometheus": "prometheus", "promtool": "prometheus", "nginx": "nginx-light"} | {
    name: name for name in ("haproxy", "podman", "buildah", "mmdebstrap")
}


def tool(name: str) -> str:
    """The command's path."""
    if name in PACKAGES:
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin")
        if found is None:
            pytest.fail(f"{name} is not installed: apt-get install {PACKAGES[name]}")
        return found
    path = FROM_PIP / name
    if not path.exists():
        pytest.fail(f"{name} is not installed: run make deploy-test, which sets it up in {FROM_PIP.parent}")
    return str(path)


def run(name: str, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end."""
    return subprocess.run([tool(name), *arguments], input=stdin, capture_output=True, text=True, timeout=300, check=False)
