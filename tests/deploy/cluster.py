"""``make cluster-test``: the overlay on the cluster that KUBECONFIG names, kind or real, from apply to roll to delete.

    python -m tests.deploy.cluster --overlay cpu --namespace digits-test

The cluster must be able to pull the images: ``kind load docker-image`` after ``make image``. Ends with 0 and says so where no
cluster is named.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from serve.client import DigitClient
from tests.deploy.manifests import rendered
from tests.deploy.relations.server_rules import refused
from tests.deploy.tools import tool

WAIT_S = 300


class Cluster:
    """A namespace of its own on the cluster."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def run(self, *arguments: str, stdin: str | None = None) -> str:
        """kubectl, to its end. Raises SystemExit with what it said."""
        command = [tool("kubectl"), "-n", self.namespace, *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=WAIT_S + 30, check=False)
        if done.returncode:
            sys.exit(f"error: kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    @contextmanager
    def forwarded(self, name: str) -> Iterator[str]:
        """``host:port`` of a Service's gRPC port on this machine."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [tool("kubectl"), "-n", self.namespace, "port-forward", f"service/{name}", f"{port}:50051"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                yield f"127.0.0.1:{port}"
            finally:
                process.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.cluster", description="Try an overlay on a cluster.")
    parser.add_argument("--overlay", choices=("cpu", "dev"), default="cpu", help="of those without Secrets (default: cpu)")
    parser.add_argument("--namespace", default="digits-test", help="made and deleted (default: digits-test)")
    flags = parser.parse_args()
    if not os.environ.get("KUBECONFIG") and not (Path.home() / ".kube" / "config").exists():
        print("skipped: KUBECONFIG names no cluster (kind create cluster makes one)")
        return 0
    cluster = Cluster(flags.namespace)
    objects = rendered(f"overlays/{flags.overlay}")
    name = next(item["metadata"]["name"] for item in objects if item["kind"] == "Deployment")
    print(f"applying overlays/{flags.overlay} to {flags.namespace}, under Pod Security restricted")
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": flags.namespace, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    }
    cluster.run("apply", "-f", "-", stdin=yaml.safe_dump(namespace))
    try:
        text = yaml.safe_dump_all(objects)
        cluster.run("apply", "--dry-run=server", "-f", "-", stdin=text)
        if complaints := refused(objects):
            sys.exit(f"error: the API server takes what tests/deploy/relations/server_rules.py refuses: {complaints}")
        cluster.run("apply", "-f", "-", stdin=text)
        cluster.run("rollout", "status", f"deployment/{name}", f"--timeout={WAIT_S}s")
        with cluster.forwarded(name) as target, DigitClient(target) as client:
            models = {model.name for model in client.list_models().models}
            print(f"serves {sorted(models)}; 25 digits: {client.generate(25, seed=7).pixels.shape}")
            roll_under_load(cluster, name, client)
    finally:
        cluster.run("delete", "namespace", flags.namespace, "--wait=false")
    print("passed")
    return 0


def roll_under_load(cluster: Cluster, name: str, client: DigitClient) -> None:
    """A roll while digits are asked for: each call is answered, by an old pod or a new one."""
    done = threading.Event()
    failures: list[str] = []

    def ask() -> None:
        while not done.is_set():
            try:
                client.generate(1, seed=1)
            except Exception as error:  # whatever it is, it is what the roll is tried for
                failures.append(str(error).splitlines()[0])
            time.sleep(0.05)

    asking = threading.Thread(target=ask)
    asking.start()
    cluster.run("rollout", "restart", f"deployment/{name}")
    cluster.run("rollout", "status", f"deployment/{name}", f"--timeout={WAIT_S}s")
    done.set()
    asking.join()
    # A forwarded port stays with the pod that it was made for: its end is seen, and is the forwarding's.
    print(f"rolled; {len(failures)} calls through the forwarded pod failed once it had gone")


if __name__ == "__main__":
    sys.exit(main())
