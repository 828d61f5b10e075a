"""``make bench-peers``: this server and the general ones, the same graph, the same request bytes, the same run.

Each peer is installed from the package index into a venv of its own below build/peers and serves the bundled model's
ONNX file (folded, uint8 output) as its documentation shows; the Open Inference Protocol request carries the latents.
Load by h2load. A peer that the index does not give, or that does not start, is named with the reason.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from serve.bench.load import H2LOAD, Load, by_h2load
from serve.latents import draw
from serve.manifest import BUNDLED_DIR
from serve.pb.inference import open_inference_pb2 as pb

HERE = Path(__file__).parent
FOLDER = Path("build/peers")
OUT = Path("build/bench-peers.json")
PATH = "/inference.GRPCInferenceService/ModelInfer"
LATENT_SIZES = {"mlp": 64, "dcgan": 100}
LOADS = {"64 × 1": (64, 1), "16 × 16": (16, 16), "16 × 64": (16, 64), "1 × 1": (1, 1)}  # in flight × digits a request
SECONDS = 4.0
START_S = 90
STOP_S = 20
ONNXRUNTIME = "onnxruntime==1.22.*"  # as old as the peers' numpy pins ask for


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
US = Peer("digits-serve", "", "")


class PeerError(Exception):
    """A peer that cannot be had or does not start."""


def main() -> int:
    if H2LOAD is None:
        print("error: h2load is missing; install nghttp2-client (Debian) or nghttp2", file=sys.stderr)
        return 2
    measured: dict[str, dict[str, dict[str, float]]] = {}
    for peer in (US, *PEERS):
        try:
            measured[peer.name] = measure(peer)
        except PeerError as error:
            print(f"{peer.name} is left out: {error}", file=sys.stderr)
    print(table(measured))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(measured, indent=2) + "\n")
    print(f"written: {OUT}")
    return 0


def measure(peer: Peer) -> dict[str, dict[str, float]]:
    """Digits a second and the unloaded mean for both models. Raises PeerError."""
    if peer is not US:
        install(peer)
    results: dict[str, dict[str, float]] = {}
    for model in LATENT_SIZES:
        with serving(peer, model) as target:
            results[model] = {}
            for name, (in_flight, digits) in LOADS.items():
                print(f"{peer.name}: {model} {name}", file=sys.stderr, flush=True)
                load = Load(target, model, digits, SECONDS, in_flight)
                seen = by_h2load(load, PATH, infer_request(model, digits))
                results[model][name] = seen.mean_s * 1e3 if in_flight == 1 else seen.requests_per_s * digits
    return results


def infer_request(model: str, digits: int) -> bytes:
    """The same bytes for every server: raw latents in, pixels out."""
    rows = draw(7, 0, digits, LATENT_SIZES[model])
    tensor = pb.ModelInferRequest.InferInputTensor(name="latents", datatype="FP32", shape=rows.shape)
    wanted = [pb.ModelInferRequest.InferRequestedOutputTensor(name="pixels")]
    request = pb.ModelInferRequest(
        model_name=model, inputs=[tensor], outputs=wanted, raw_input_contents=[rows.astype("<f4").tobytes()]
    )
    return request.SerializeToString()


def install(peer: Peer) -> None:
    python = FOLDER / peer.name / "bin" / "python"
    ready = FOLDER / peer.name / ".ready"
    if ready.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER / peer.name)], check=True)
    command = [str(python), "-m", "pip", "install", "--quiet", peer.package, ONNXRUNTIME]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(FOLDER / peer.name)
        raise PeerError(f"{peer.package} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    ready.touch()


@contextmanager
def serving(peer: Peer, model: str) -> Iterator[str]:
    """The peer serving one model on a free port. Raises PeerError when it does not answer in time."""
    port = free_port()
    path = (BUNDLED_DIR / model / "1" / "model.onnx").resolve()
    environment = os.environ.copy()
    if peer is US:
        command = [sys.executable, "-m", "serve", f"--grpc-port={port}", "--http-port=0"]
    elif peer.name == "mlserver":
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
            yield f"127.0.0.1:{port}"
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


def table(measured: dict[str, dict[str, dict[str, float]]]) -> str:
    """All servers side by side, and this one against the best of the others."""
    lines = [f"{'digits/s':14s} {'model':6s} " + " ".join(f"{name:>10s}" for name in list(LOADS)[:-1]) + "   unloaded ms"]
    for server, models in measured.items():
        for model, seen in models.items():
            figures = " ".join(f"{seen[name]:10,.0f}" for name in list(LOADS)[:-1])
            lines.append(f"{server:14s} {model:6s} {figures} {seen['1 × 1']:13.2f}")
    others = [models for server, models in measured.items() if server != US.name]
    if others:
        for model in LATENT_SIZES:
            ratios = []
            for name in LOADS:
                theirs = [models[model][name] for models in others]
                best = min(theirs) if name == "1 × 1" else max(theirs)
                ratios.append(measured[US.name][model][name] / best)
            figures = " ".join(f"{ratio:9.2f}×" for ratio in ratios[:-1])
            lines.append(f"{'ours / best':14s} {model:6s} {figures} {ratios[-1]:12.2f}×")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
