"""The server's image, built for real from our Dockerfile and run as the manifests run it: read-only, no capability, its uid.

The base is a Debian made on the spot, since no registry need be within reach; the wheels are fetched outside, by the lock's
hashes, and mounted: the build asks no package index.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.client import DigitClient
from tests.deploy.manifests import containers, of_kind, rendered
from tests.deploy.relations.server_rules import quantity
from tests.deploy.tools import tool

REQUIREMENTS = Path("deploy/requirements")
BASE, IMAGE = "localhost/digits-base:test", "localhost/digits-serve:test"
REVISION = "0123456789abcdef"
CONFIGURATION = """
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
"""

pytestmark = pytest.mark.timeout(900)


class Engine:
    """podman and buildah with a storage of their own."""

    def __init__(self, folder: Path, runroot: str) -> None:
        (folder / "containers.conf").write_text(CONFIGURATION)
        self._environment = os.environ | {"CONTAINERS_CONF": str(folder / "containers.conf")}
        self._storage = ["--storage-driver=vfs", f"--root={folder / 'root'}", f"--runroot={runroot}"]

    def command(self, name: str, *arguments: str) -> list[str]:
        return [tool(name), *self._storage, *arguments]

    def run(self, name: str, *arguments: str) -> str:
        done = subprocess.run(
            self.command(name, *arguments), env=self._environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command("podman", "run", *arguments),
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="module")
def runroot() -> Iterator[str]:
    """A folder whose path podman takes: of at most 50 characters."""
    with TemporaryDirectory(prefix="run-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, runroot: str) -> Iterator[Engine]:
    """An engine that holds the built image."""
    folder = tmp_path_factory.mktemp("image")
    engine = Engine(folder, runroot)
    sources = [str(path) for path in Path("/etc/apt/sources.list.d").glob("debian.sources")]
    release = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    assert release, "the base is made by mmdebstrap, which takes a Debian"
    packages = "python3,python3-venv,ca-certificates"
    base = [
        tool("mmdebstrap"),
        "--quiet",
        "--variant=minbase",
        f"--include={packages}",
        release[1],
        str(folder / "base.tar"),
        *sources,
    ]
    made = subprocess.run(base, capture_output=True, text=True, timeout=300, check=False)
    assert made.returncode == 0, made.stderr
    engine.run("podman", "import", "--quiet", str(folder / "base.tar"), BASE)
    wheels = folder / "wheels"
    locks = [f"--requirement={REQUIREMENTS / name}" for name in ("serve.txt", "cpu.txt")]
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps", f"--dest={wheels}", *locks]
    subprocess.run(fetch, check=True, timeout=300)
    arguments = {"BASE": BASE, "RUNTIME": "cpu", "REVISION": REVISION, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
    engine.run(
        "buildah", "bud", "--isolation=chroot", "--network=host", f"--volume={wheels}:/wheels:ro", "--target=serve",
        *(f"--build-arg={name}={value}" for name, value in arguments.items()), "--file=deploy/Dockerfile", f"--tag={IMAGE}", ".",
    )  # fmt: skip
    yield engine
    shutil.rmtree(folder, ignore_errors=True)


def as_deployed() -> list[str]:
    """The environment of the cpu overlay's own pods, on ports that are free here."""
    [settings] = [item["data"] for item in rendered("overlays/cpu") if item["kind"] == "ConfigMap"]
    [container] = containers(of_kind("overlays/cpu", "Deployment"))
    instances = str(int(quantity(container["resources"]["requests"]["cpu"])))
    changed = settings | {"DIGITS_GRPC_PORT": "0", "DIGITS_HTTP_PORT": "0", "DIGITS_INSTANCES": instances}
    return [f"--env={name}={value}" for name, value in changed.items()]


def memory_limit() -> int:
    """Of the cpu overlay's container, in bytes."""
    [container] = containers(of_kind("overlays/cpu", "Deployment"))
    return int(quantity(container["resources"]["limits"]["memory"]))


def probed(address: str, http: str) -> dict[str, bool]:
    """What the kubelet's probes of the cpu overlay find."""
    [container] = containers(of_kind("overlays/cpu", "Deployment"))
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        found = {
            probe: health.Check(health_pb2.HealthCheckRequest(service=container[probe]["grpc"]["service"]), timeout=10).status
            == health_pb2.HealthCheckResponse.SERVING
            for probe in ("startupProbe", "readinessProbe", "livenessProbe")
        }
    with urllib.request.urlopen(f"http://{http}/readyz", timeout=10) as answer:
        return found | {"/readyz": answer.status == 200}


def test_it_serves_read_only_as_its_user_without_capabilities_and_drains_on_sigterm(image: Engine) -> None:
    restricted = [
        "--read-only",
        "--read-only-tmpfs=false",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--network=host",
    ]
    process = image.start("--rm", "--name=digits", *restricted, *as_deployed(), f"--memory={memory_limit()}", IMAGE)
    try:
        said = logged = ""
        assert process.stderr is not None
        for line in process.stderr:
            logged += line
            assert line.startswith("{"), logged + process.stderr.read()
            said += json.loads(line)["message"] + "\n"
            if said.splitlines()[-1].startswith("next"):
                break
        address = re.search(r"^gRPC +(\S+)", said, re.MULTILINE)
        assert address, logged
        here = address[1].replace("[::]", "127.0.0.1")
        http = re.search(r"^HTTP +http://(\S+)/metrics", said, re.MULTILINE)
        assert http
        assert all(probed(here, http[1].replace("[::]", "127.0.0.1")).values())
        with DigitClient(here, timeout_s=30) as client:
            assert {model.name for model in client.list_models().models} == {"mlp", "dcgan", "cdcgan", "rpgan"}
            assert client.generate(25, labels=7, seed=7).pixels.any()
        inside = image.run("podman", "exec", "digits", "python3", "-c", "import os; print(os.getuid(), os.getpid())")
        assert inside.split()[0] == "65532"
        memory = image.run("podman", "exec", "digits", "grep", "VmRSS", "/proc/1/status")
        assert int(memory.split()[1]) << 10 < memory_limit() / 2, "as it was measured"
        asked = "from serve.engine.resources import memory_bytes; print(memory_bytes())"
        assert int(image.run("podman", "exec", "digits", "python", "-c", asked)) == memory_limit(), "a quarter is for open calls"
        first = image.run("podman", "exec", "digits", "cat", "/proc/1/cmdline")
        assert first.split("\0")[:3] == ["python", "-m", "serve"], "signals go to Python"
        begun = time.monotonic()
        image.run("podman", "kill", "--signal=TERM", "digits")
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0
        assert time.monotonic() - begun < 45, "within the grace period of the manifests"
        assert '"message": "stopped; 0 requests were cancelled by the drain deadline"' in log
    finally:
        if process.poll() is None:
            image.run("podman", "kill", "digits")
            process.communicate(timeout=60)


def test_a_change_of_our_code_ships_no_dependency(image: Engine) -> None:
    """Issue: code and dependencies were one layer of 255 MB. A COPY is a layer; the last one has what changes most."""
    copies = re.findall(r"^COPY --from=(\S+) (\S+) \S+$", Path("deploy/Dockerfile").read_text(), re.MULTILINE)
    assert copies[-3:] == [("cuda", "/opt/digits"), ("serve-dependencies", "/opt/digits"), ("serve-code", "/opt/code")]
    sizes = image.run("podman", "run", "--rm", "--network=none", IMAGE, "du", "-sb", "/opt/code", "/opt/digits")
    code, dependencies = (int(line.split()[0]) for line in sizes.splitlines())
    print(f"\nour code and models: {code / 1e6:.0f} MB, what they need: {dependencies / 1e6:.0f} MB")
    assert code < 50e6  # four models of 9 MB each
    held = image.run(
        "podman", "run", "--rm", "--network=none", IMAGE, "python", "-c", "import serve, numpy; print(serve.__file__)"
    )
    assert held.startswith("/opt/code/serve/")
    labels = json.loads(image.run("podman", "image", "inspect", IMAGE))[0]["Config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == REVISION


def test_it_holds_no_torch_and_no_installer(image: Engine) -> None:
    code = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'pip', 'setuptools', 'hatchling') if u.find_spec(n)])"
    assert image.run("podman", "run", "--rm", "--network=none", IMAGE, "python", "-c", code) == "[]\n"


def test_its_layers_are_small(image: Engine, tmp_path: Path) -> None:
    """What ours add to the base: 300 MB for the whole image, of which a slim Python takes 125."""
    sizes = {name: int(image.run("podman", "image", "inspect", "--format={{.Size}}", name)) for name in (BASE, IMAGE)}
    ours = sizes[IMAGE] - sizes[BASE]
    image.run("podman", "save", "--quiet", f"--output={tmp_path / 'image.tar'}", IMAGE)
    packed = len(gzip.compress((tmp_path / "image.tar").read_bytes(), 1))
    print(
        f"\nimage: {sizes[IMAGE] / 1e6:.0f} MB unpacked, {ours / 1e6:.0f} MB of it beyond the base; {packed / 1e6:.0f} MB packed"
    )
    assert ours < 275e6
    assert packed < 300e6
