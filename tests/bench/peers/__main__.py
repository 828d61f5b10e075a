"""``make bench-peers``: compares this server with general model servers on the same graph and requests.

Each peer is installed from the package index into a venv of its own below build/peers and serves the bundled model's
ONNX file (folded, uint8 output) as its documentation shows; the Open Inference Protocol request carries the latents.
h2load generates the load, in alternating rounds (``tests.bench.rounds``): all servers run, and all but the one measured are idle.
A peer that cannot be installed or does not start is reported with the reason. With ``--busy N``, N other processes compute
meanwhile, as noisy neighbours do.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil

from serve.command_line import OneLineParser, within
from serve.latents import draw
from serve.manifest import BUNDLED_DIR
from serve.pb.inference import open_inference_pb2 as pb
from tests.bench.load import H2LOAD, Load, by_h2load
from tests.bench.process import Started, started
from tests.bench.report import say, spread, write
from tests.bench.rounds import ROUNDS, Sample, alternate, costs_us, measure, ratios

HERE = Path(__file__).parent
FOLDER = Path("build/peers")
OUT = Path("build/bench-peers.json")
PATH = "/inference.GRPCInferenceService/ModelInfer"
LATENT_SIZES = {"mlp": 64, "dcgan": 100}
LOADS = {"64 × 1": (64, 1), "16 × 16": (16, 16), "16 × 64": (16, 64), "1 × 1": (1, 1)}  # in flight × digits a request
ALONE = "1 × 1"  # whose latency is of interest, not its rate
SECONDS = 3
START_S = 90
STOP_S = 20
ONNXRUNTIME = "onnxruntime"  # the newest that the peer's own pins leave


@dataclass(frozen=True)
class Peer:
    """A general server: what to install, and which script starts it."""

    name: str
    package: str
    script: str


PEERS = (
    Peer("pytriton", "nvidia-pytriton==0.7.*", "pytriton_server.py"),
    Peer("kserve", "kserve==0.21.*", "kserve_server.py"),
    Peer("mlserver", "mlserver==1.7.*", "mlserver_model.py"),
)
US = "serve"
Rounds = dict[str, dict[str, dict[str, list[Sample]]]]  # model → load → server


class PeerError(Exception):
    """A peer that cannot be had or does not start."""


def main() -> int:
    parser = OneLineParser(prog="python -m tests.bench.peers", description=__doc__)
    parser.add_argument("--busy", type=within(0, 1024), default=0, metavar="N", help="processes that compute all the while")
    neighbours = parser.parse_args().busy
    if H2LOAD is None:
        print("error: h2load is missing; install nghttp2-client (Debian) or nghttp2", file=sys.stderr)
        return 2
    there = [peer for peer in PEERS if install(peer)]
    measured: Rounds = {}
    for model in LATENT_SIZES:
        with ExitStack() as stack:
            for _ in range(neighbours):
                stack.enter_context(busy())
            servers = {US: stack.enter_context(started("serve", "--grpc-port=0", "--http-port=0"))}
            for peer in there:
                try:
                    servers[peer.name] = stack.enter_context(serving(peer, model))
                except PeerError as error:
                    say(f"{peer.name} is left out: {error}")
            measured[model] = {name: in_rounds(model, name, servers) for name in LOADS}
    print(table(measured))
    versions = {peer.name: onnxruntime_of(peer) for peer in there}
    print(f"onnxruntime: {versions}")
    write(OUT, {"onnxruntime": versions, "measured": measured}, [])
    return 0


@contextmanager
def busy() -> Iterator[None]:
    """A process that computes without end."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def in_rounds(model: str, name: str, servers: Mapping[str, Started]) -> dict[str, list[Sample]]:
    """One kind of load on every server, by turns."""
    in_flight, digits = LOADS[name]
    body = infer_request(model, digits)

    def subject(server: Started) -> Callable[[], Sample]:
        load = Load(server.target, model, digits, SECONDS, in_flight)
        return partial(measure, server, load, partial(by_h2load, path=PATH, body=body))

    say(f"{model} {name}: {', '.join(servers)}, {ROUNDS} rounds")
    return alternate({each: subject(server) for each, server in servers.items()})


def onnxruntime_of(peer: Peer) -> str:
    """Which ONNX Runtime the peer runs."""
    python = FOLDER / peer.name / "bin" / "python"
    command = [str(python), "-c", "import importlib.metadata as m; print(m.version('onnxruntime'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def infer_request(model: str, digits: int) -> bytes:
    """The same bytes for every server: raw latents in, pixels out."""
    rows = draw(7, 0, digits, LATENT_SIZES[model])
    tensor = pb.ModelInferRequest.InferInputTensor(name="latents", datatype="FP32", shape=rows.shape)
    wanted = [pb.ModelInferRequest.InferRequestedOutputTensor(name="pixels")]
    request = pb.ModelInferRequest(
        model_name=model, inputs=[tensor], outputs=wanted, raw_input_contents=[rows.astype("<f4").tobytes()]
    )
    return request.SerializeToString()


def install(peer: Peer) -> bool:
    """Whether the peer is there, now if it was not before."""
    python = FOLDER / peer.name / "bin" / "python"
    ready = FOLDER / peer.name / ".ready"
    if ready.exists():
        return True
    say(f"installing {peer.package}")
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER / peer.name)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", peer.package, ONNXRUNTIME]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(FOLDER / peer.name)
        say(f"{peer.name} is left out: {peer.package} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        return False
    ready.touch()
    return True


@contextmanager
def serving(peer: Peer, model: str) -> Iterator[Started]:
    """The peer serving one model on a free port. Raises PeerError when it does not answer in time."""
    port = free_port()
    path = (BUNDLED_DIR / model / "1" / "model.onnx").resolve()
    environment = os.environ.copy()
    if peer.name == "mlserver":
        command = [str(FOLDER / peer.name / "bin" / "mlserver"), "start", str(mlserver_folder(model, path, port))]
        environment["PYTHONPATH"] = str(HERE)
    else:
        python = (FOLDER / peer.name / "bin" / "python").absolute()
        command = [str(python), str(HERE / peer.script), model, str(path), str(port)]
        # PyTriton's backend is linked against libpython and does not look where the interpreter has it.
        environment["LD_LIBRARY_PATH"] = str(sysconfig.get_config_var("LIBDIR"))
    log = FOLDER / f"{peer.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink, subprocess.Popen(command, env=environment, stdout=sink, stderr=sink) as process:
        try:
            wait_until_it_answers(f"127.0.0.1:{port}", model, process, log)
            yield Started(f"127.0.0.1:{port}", "", psutil.Process(process.pid))
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_it_answers(target: str, model: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a request of two digits comes back right: the pixels that this server's own engine would give, in shape."""
    deadline = time.monotonic() + START_S
    with grpc.insecure_channel(target) as channel:
        call: Any = channel.unary_unary(PATH)
        while time.monotonic() < deadline and process.poll() is None:
            try:
                answer = pb.ModelInferResponse.FromString(call(infer_request(model, 2), timeout=5))
            except grpc.RpcError:
                time.sleep(0.3)  # between two questions whether it is up
                continue
            if len(answer.raw_output_contents) == 1:
                pixels = np.frombuffer(answer.raw_output_contents[0], np.uint8)
            else:  # MLServer answers with typed contents
                pixels = np.array(answer.outputs[0].contents.uint_contents, np.uint8)
            if pixels.size == 2 * 28 * 28 and pixels.any():
                return
            raise PeerError(f"it answers with {pixels.size} values instead of two digits")
    raise PeerError(f"it does not answer; see {log}")


def mlserver_folder(model: str, path: Path, port: int) -> Path:
    """The configuration MLServer wants: one process, no metrics or HTTP to take time from gRPC."""
    folder = FOLDER / "mlserver-models" / model
    folder.mkdir(parents=True, exist_ok=True)
    server = {
        "host": "127.0.0.1", "grpc_port": port, "http_port": port + 1, "metrics_port": port + 2, "parallel_workers": 0,
    }  # fmt: skip
    settings = {"name": model, "implementation": "mlserver_model.Digits", "parameters": {"uri": str(path)}}
    (folder / "settings.json").write_text(json.dumps(server))
    (folder / "model-settings.json").write_text(json.dumps(settings))
    return folder


def free_port() -> int:
    """A port with two free ones above it, most likely: the peers want three."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def table(measured: Rounds) -> str:
    """All servers side by side, and this one against the best of the others, round by round."""
    lines = []
    for model, loads in measured.items():
        for name, seen in loads.items():
            _, digits = LOADS[name]
            lines.append(f"{model} {name}")
            others = [server for server in seen if server != US]
            lowest = name == ALONE  # of a lone caller's mean latency, in ms
            values = {
                server: [sample.result.mean_s * 1e3 if lowest else sample.rate * digits for sample in samples]
                for server, samples in seen.items()
            }
            for server, samples in seen.items():
                line = f"  {server:9s} {spread(values[server], 2 if lowest else 0):>32s} {'ms' if lowest else 'digits a second'}"
                line += f"  {spread(costs_us(samples), 0):>26s} µs a request"
                if server == US and others:
                    best = [(min if lowest else max)(values[other][turn] for other in others) for turn in range(len(samples))]
                    line += f"  {spread(ratios(values[server], best))} × the best other's"
                lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
