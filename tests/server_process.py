"""A real server in a process of its own, as a test's peer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import IO, Any

from tests.bench.process import sample_sum

SERVE = ("-m", "serve")
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60
GENTLE_S = 5


def free_port() -> int:
    """A port of the loopback that nobody has at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


class ServerProcess:
    """``python -m serve`` on free ports unless the flags say otherwise. The constructor returns once it serves.

    A ``log`` to a file is written however much there is; otherwise it is a pipe, which is read when the server ends.
    """

    def __init__(
        self,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        module: Sequence[str] = SERVE,
        log: IO[str] | None = None,
    ) -> None:
        ports = [] if any(flag.startswith("--grpc-port") for flag in flags) else ["--grpc-port=0"]
        command = [sys.executable, *module, *ports, "--http-port=0", "--https-port=0", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log or subprocess.PIPE, text=True, env=os.environ | (environment or {})
        )
        # There the announcement is a part of the log.
        in_log = "--log-format=json" in flags or (environment or {}).get("DIGITS_LOG_FORMAT") == "json"
        stream = self.process.stderr if in_log else self.process.stdout
        assert stream is not None
        self.announced = self._log = ""
        for line in stream:
            said = json.loads(line)["message"] + "\n" if in_log else line
            self.announced += said
            self._log += line if in_log else ""
            if said.startswith("next"):
                break
        else:
            raise AssertionError(f"the server did not start: {self.process.communicate()[1]}")
        grpc_address = re.search(r"^gRPC +(\S+)", self.announced, re.MULTILINE)
        http_address = re.search(r"^HTTP +http://(\S+)/metrics", self.announced, re.MULTILINE)
        if grpc_address is None or http_address is None:
            self.kill()
            raise AssertionError(f"the server announced no addresses: {self.announced}")
        self.target = grpc_address[1]
        self.http = http_address[1]
        api = re.search(r"^API +https://(\S+)/v1", self.announced, re.MULTILINE)
        self.https = api[1] if api else ""  # where the HTTP API has a port of its own

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a path on the HTTP port."""
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a sample's values over all its children that have these labels."""
        return sample_sum(self.get("/metrics")[1], name, labels)

    def terminate(self) -> tuple[int, str]:
        """SIGTERM; the exit status and what was logged."""
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=STOP_TIMEOUT_S)
        return self.process.returncode, self._log + (log or "")

    def kill(self) -> None:
        """End it at once; where coverage is measured gently first, or what it ran would not be counted."""
        if self.process.poll() is None and "COVERAGE_PROCESS_CONFIG" in os.environ:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.communicate(timeout=GENTLE_S)
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        for stream in (self.process.stdout, self.process.stderr):  # of a process that has ended by itself
            if stream is not None:
                stream.close()

    def wait(self, **options: Any) -> int:
        return self.process.wait(**options)
