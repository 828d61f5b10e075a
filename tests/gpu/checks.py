"""What is checked and measured on a GPU. Each check takes a plan and returns figures and targets; none prints.

The plan's provider may be ``cpu``: the same code then runs where there is no GPU, which is how the tests try it.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from numpy.typing import NDArray

from export.generator import torch_form
from export.graphs.to_fp16 import to_fp16
from export.graphs.to_torchscript import load_torchscript
from serve.api.encoding import as_bytes, field_key, pack_field
from serve.engine.cuda import Device
from serve.engine.cuda_engine import CudaEngine, _graph_id, make_engine
from serve.engine.device_buffers import NO_GRAPH
from serve.engine.provider import EngineOptions, Provider
from serve.engine.session import PIXELS, PIXELS_AND_IMAGES, Engine
from serve.latents import LatentReader, Span, draw_span
from serve.manifest import BUNDLED_DIR, TORCHSCRIPT_FILE
from serve.models.model import batch_size
from serve.models.repository import Bundle, read_bundle
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from tests.bench.load import Load, by_python
from tests.bench.process import Started, started
from tests.bench.report import Target, runs_per_second
from train.checkpoint import create_run
from train.config import TrainConfig
from train.presets import PRESETS
from train.reports.bench import measure, milliseconds_per_step
from train.trainer.capture import CudaRecording, Recording
from train.trainer.loop import Trainer

MODELS = ("mlp", "dcgan", "cdcgan", "rpgan")
IN_PROCESS = {"mlp": 2.0, "dcgan": 1.0}  # millions of digits a second
SEED = 7
WIRE_COUNT, WIRE_IN_FLIGHT, WIRE_PROCESSES = 4096, 16, 4
PIXELS_BYTES = 784
IMAGES_KEY = field_key(pb.GenerateResponse, "images")
ENGINE_LIMIT_S = 120.0
COMPARED = 64  # digits whose difference is looked at
OPTION_SIZES = (1, 8, 64, 1024, 4096)
ALGORITHMS = ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")


@dataclass(frozen=True)
class Plan:
    """Where to check, and how long each measurement takes."""

    provider: Provider = "cuda"
    largest: int = 4096  # a quarter of it is measured as well
    seconds: float = 2.0
    memory_seconds: float = 45.0
    count: int = WIRE_COUNT
    training_steps: int = 200
    recording: Callable[[torch.Generator], Recording] = CudaRecording
    compile_options: Mapping[str, Any] = field(default_factory=lambda: {"mode": "reduce-overhead"})
    device: Callable[[], Device] | None = None  # what stands for the GPU where there is none

    def options(self, **changes: Any) -> EngineOptions:
        return EngineOptions(provider=self.provider, pad_to_powers=True, **changes)

    @property
    def graphs(self) -> bool:
        return self.provider == "cuda"

    @contextmanager
    def server(self, *more: str) -> Iterator[Started]:
        """This plan's server, as a process; on CUDA with the batches that it has by default."""
        flags = [f"--provider={self.provider}", *more]
        if self.provider == "cpu":
            flags += ["--buckets=powers", f"--max-batch-size={self.largest}"]
        # Room for all that is in flight: a refusal would be measured as an answer's speed.
        flags += [
            f"--max-queue-images={2 * WIRE_IN_FLIGHT * max(self.count, WIRE_COUNT)}",
            f"--max-count={max(self.count, WIRE_COUNT)}",
        ]
        with started("serve", "--grpc-port=0", "--http-port=0", *flags) as server:
            yield server


@dataclass(frozen=True)
class Outcome:
    """What a check found. ``fixed`` targets must hold anywhere; the others are aims for a fast GPU."""

    figures: dict[str, Any]
    fixed: tuple[Target, ...] = ()
    aims: tuple[Target, ...] = ()


Check = Callable[[Plan], Outcome]


def bundle_of(model: str) -> Bundle:
    return read_bundle(BUNDLED_DIR / model / "1")


def engine_of(model: str, plan: Plan, **changes: Any) -> Engine:
    bundle = bundle_of(model)
    if plan.device is not None:
        return CudaEngine(bundle.model, bundle.manifest, plan.options(**changes), plan.largest, plan.device())
    return make_engine(bundle.model, bundle.manifest, plan.options(**changes), plan.largest)


def plain_engine_of(model: str, plan: Plan) -> Engine:
    """The engine without graphs; where something stands for the GPU, the CPU's own."""
    return engine_of(model, replace(plan, device=None))


def strictness(plan: Plan) -> Outcome:
    """Every node is where it was asked to be; and with no GPU to be seen, ``--provider cuda`` refuses to start."""
    nodes = {model: engine_of(model, plan, record_assignment=True).nodes_by_provider() for model in MODELS}
    command = [sys.executable, "-m", "serve", "--grpc-port=0", "--http-port=0", "--provider=cuda"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=hidden)
    refused = done.returncode == 2 and "gRPC" not in done.stdout and "error: " in done.stderr
    wanted = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[plan.provider]
    there = sum(wanted in parts for parts in nodes.values())
    elsewhere = sum(count for parts in nodes.values() for provider, count in parts.items() if provider != wanted)
    return Outcome(
        {"nodes": nodes, "without_gpu": done.stderr.strip().splitlines()[-1:]},
        (
            Target("models with nodes on the provider that was asked for", there, len(MODELS)),
            Target("nodes elsewhere", elsewhere, 0, at_most=True),
            Target("--provider cuda refuses without a GPU", float(refused), 1),
        ),
    )


def parity(plan: Plan) -> Outcome:
    """The largest difference from fp32 TorchScript on the CPU, at every bucket: as served, with TF32, and in fp16."""
    figures: dict[str, Any] = {}
    targets = []
    for model in MODELS:
        bundle = bundle_of(model)
        reference = torch_form(load_torchscript((bundle.path / TORCHSCRIPT_FILE).read_bytes()))
        engines = {
            "fp32": engine_of(model, plan, cuda_graphs=plan.graphs),
            "tf32": engine_of(model, plan, cuda_options={"use_tf32": "1"}),
        }
        for tf32 in ("0", "1"):  # without it half precision may run beside the matrix units
            options = plan.options(cuda_options={"use_tf32": tf32})
            engines[f"fp16, use_tf32={tf32}"] = make_engine(to_fp16(bundle.model), bundle.manifest, options, plan.largest)
        engines["fp32"].warm()
        apart = {form: {"images": 0.0, "pixel_levels": 0} for form in engines}
        for bucket in engines["fp32"].buckets():
            rows = draw_span(Span(SEED, bucket, bucket), bundle.manifest.latent_size, bundle.manifest.labels)
            expected = reference(*rows)
            for form, engine in engines.items():
                replayed, with_images = engine.compute(*rows), engine.compute(*rows, PIXELS_AND_IMAGES)
                images = float(np.abs(expected["images"] - with_images["images"]).max())
                levels = int(np.abs(expected["pixels"].astype(np.int16) - replayed["pixels"]).max())
                worst = apart[form]
                images = float(np.maximum(worst["images"], images))  # NaN if one is
                apart[form] = {"images": images, "pixel_levels": max(worst["pixel_levels"], levels)}
        figures |= {f"{model} {form}": worst for form, worst in apart.items()}
        served = figures[f"{model} fp32"]
        targets.append(Target(f"{model}: largest difference of an image, × 1e-5", served["images"] * 1e5, 1, at_most=True))
        targets.append(Target(f"{model}: largest difference of a pixel, levels", served["pixel_levels"], 1, at_most=True))
    return Outcome(figures, tuple(targets))


def graphs(plan: Plan) -> Outcome:
    """Every bucket's graph captured and right for two inputs; and what replaying saves at small batches."""
    figures: dict[str, Any] = {}
    targets, aims = [], []
    for model in MODELS:
        engine, plain = engine_of(model, plan, cuda_graphs=plan.graphs), plain_engine_of(model, plan)
        captured = sum(engine.warm().values())
        plain.warm()
        shape = engine.manifest.latent_size, engine.manifest.labels
        apart = 0
        for bucket in engine.buckets():
            for seed in (1, 2):
                rows = draw_span(Span(seed, 0, bucket), *shape)
                replayed, expected = engine.compute(*rows)["pixels"].astype(np.int16), plain.compute(*rows)["pixels"]
                apart = max(apart, int(np.abs(replayed - expected).max()))
        ratios = {bucket: _run_s(engine, bucket, plan) / _run_s(plain, bucket, plan) for bucket in (1, 2, 4, 8)}
        figures[model] = {"captured": captured, "of": len(engine.buckets()), "apart_levels": apart, "run_time_ratio": ratios}
        if plan.graphs:
            targets.append(Target(f"{model}: buckets with a graph", captured, len(engine.buckets())))
            aims.append(Target(f"{model}: run time with / without, up to 8", max(ratios.values()), 0.5, at_most=True))
        targets.append(Target(f"{model}: replay and plain run apart, levels", apart, 1, at_most=True))
    return Outcome(figures, tuple(targets), tuple(aims))


def buckets(plan: Plan) -> Outcome:
    """Seconds of a run and digits a second at every bucket, host copies included."""
    figures: dict[str, Any] = {}
    for model in MODELS:
        engine = engine_of(model, plan, cuda_graphs=plan.graphs)
        engine.warm()
        seconds = {bucket: _run_s(engine, bucket, plan) for bucket in engine.buckets()}
        smaller = engine_of(model, replace(plan, largest=max(1, plan.largest // 4)), cuda_graphs=plan.graphs)
        smaller.warm()
        figures[model] = {
            "run_s": seconds,
            "quarter_digits_per_s": smaller.largest / _run_s(smaller, smaller.largest, plan),
            "digits_per_s": max(bucket / run_s for bucket, run_s in seconds.items()),
            "from_float32_on_cpu": difference(engine),  # were it TF32 after all, it would be here
            "waits_after_run": getattr(engine, "waits_after_run", None),
            "best_bucket": max(seconds, key=lambda bucket: bucket / seconds[bucket]),
        }
    reader, out = LatentReader(100), np.empty((plan.largest, 100), np.float32)
    fills_per_s = runs_per_second(lambda: reader.fill(out, [Span(7, 0, len(out))]), plan.seconds / 4)
    figures["latents_digits_per_s"] = len(out) * fills_per_s
    aims = [
        Target(f"{model}: digits a second in process, millions", figures[model]["digits_per_s"] / 1e6, wanted)
        for model, wanted in IN_PROCESS.items()
    ]
    return Outcome(figures, aims=tuple(aims))


def baseline(plan: Plan) -> Outcome:
    """A plain ``session.run`` on host arrays beside our buffers and graphs, by bucket: the run's time, ours / plain."""
    figures: dict[str, Any] = {}
    for model in MODELS:
        bundle = bundle_of(model)
        ours = engine_of(model, plan, cuda_graphs=plan.graphs)
        ours.warm()
        plain = Engine(bundle.model, bundle.manifest, plan.options(), plan.largest)
        figures[model] = {size: _run_s(ours, size, plan) / _run_s(plain, size, plan) for size in ours.buckets()}
    return Outcome(figures)


def side_by_side(plan: Plan) -> Outcome:
    """Two instances of a model, and two models, at once, each in its own thread, from addresses to pixels: rates beside one's
    alone, and beside the device's when nobody waits between two batches; no pixel off."""
    figures: dict[str, Any] = {"device_per_s": {model: _device_per_s(model, plan) for model in ("mlp", "dcgan", "rpgan")}}
    targets = []
    for pair in (("mlp", "mlp"), ("dcgan", "dcgan"), ("rpgan", "rpgan"), ("mlp", "dcgan")):
        alone = _rates(pair[1:], plan)[0]
        both = _rates(pair, plan)
        figures[" + ".join(pair)] = {"alone_per_s": alone["per_s"], "both_per_s": [each["per_s"] for each in both]}
        targets.append(Target(f"{' + '.join(pair)}: levels off", max(each["levels"] for each in both), 1, at_most=True))
    return Outcome(figures, tuple(targets))


def releases(plan: Plan) -> Outcome:
    """Engines made, captured and released in one thread while another one runs: neither fails, and the digits stay right."""
    stop = threading.Event()

    def come_and_go() -> int:
        rounds = 0
        while not stop.is_set():
            engine = engine_of("mlp", replace(plan, largest=min(64, plan.largest)), cuda_graphs=plan.graphs)
            engine.warm()
            engine.close()
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(come_and_go)
        try:
            [running] = _rates(("dcgan",), plan)
        finally:
            stop.set()
        rounds = coming.result()
    return Outcome(
        {"released": rounds, "runs_beside_per_s": running["per_s"]},
        (Target("engines released meanwhile", rounds, 1), Target("levels off beside them", running["levels"], 1, at_most=True)),
    )


def provider_options(plan: Plan) -> Outcome:
    """Digits a second by batch size under each of the CUDA provider's options, beside the defaults', and how far their images
    are from those."""
    choices: list[dict[str, str]] = [{"cudnn_conv_algo_search": name} for name in ALGORITHMS]
    choices += [{"prefer_nhwc": "1"}, {"use_tf32": "1"}, {"tunable_op_enable": "1", "tunable_op_tuning_enable": "1"}]
    sizes = [size for size in OPTION_SIZES if size <= plan.largest]
    figures: dict[str, Any] = {}
    for model in MODELS:
        manifest = bundle_of(model).manifest
        rows = draw_span(Span(SEED, 0, sizes[-1]), manifest.latent_size, manifest.labels)
        expected: NDArray[np.float32] | None = None
        figures[model] = {}
        for choice in ({}, *choices):
            name = ",".join(f"{key}={value}" for key, value in choice.items()) or "default"
            try:
                engine = engine_of(model, plan, cuda_graphs=plan.graphs, cuda_options=choice)
                engine.warm()
                images = engine.compute(*rows, PIXELS_AND_IMAGES)["images"]
                expected = images if expected is None else expected
                rates = {size: size / _run_s(engine, size, plan) for size in sizes}
                figures[model][name] = {"per_s": rates, "apart": float(np.abs(images - expected).max())}
            except Exception as error:  # an option this machine cannot take is a finding, not a failure
                figures[model][name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return Outcome(figures)


def warmness(plan: Plan) -> Outcome:
    """After SERVING: the first request of every size beside the median of the next ones."""
    worst: dict[str, float] = {}
    with plan.server() as server, grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.DigitGeneratorStub(channel)
        stub.ListModels(pb.ListModelsRequest())  # the connection itself is not what is measured

        def ask_s(model: str, count: int) -> float:
            begun = time.perf_counter()
            stub.Generate(pb.GenerateRequest(model=model, count=count, seed=SEED), timeout=60)
            return time.perf_counter() - begun

        for model in MODELS:
            ask_s(model, 1)
            ratios = []
            size = 1
            while size <= plan.largest:
                first = ask_s(model, size)
                ratios.append(first / statistics.median(ask_s(model, size) for _ in range(15)))
                size *= 2
            worst[model] = max(ratios)
    targets = [Target(f"{model}: first request / median of its size", ratio, 2, at_most=True) for model, ratio in worst.items()]
    return Outcome({"first_over_median": worst}, aims=tuple(targets))


def memory(plan: Plan) -> Outcome:
    """Batches of random sizes for a while: what the device, or without one the process, takes at the end and at a tenth."""

    def used() -> float:
        if plan.provider == "cuda":
            return Device().memory_in_use_bytes()
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    engines = [engine_of(model, plan, cuda_graphs=plan.graphs) for model in MODELS]
    for engine in engines:
        engine.warm()
    chance = random.Random(SEED)
    begun = time.monotonic()
    early, runs = 0.0, 0
    while (spent := time.monotonic() - begun) < plan.memory_seconds:
        for engine in engines:
            outputs = PIXELS_AND_IMAGES if chance.random() < 0.2 else PIXELS
            engine.run(engine.blank(chance.randint(1, plan.largest)), outputs)
            runs += 1
        if not early and spent > plan.memory_seconds / 10:
            early = used()
    growth = used() / early - 1
    return Outcome({"runs": runs, "growth": growth}, (Target("memory growth over random sizes, percent", growth * 100, 2, True),))


def wire(plan: Plan) -> Outcome:
    """Digits a second through gRPC on loopback when the answer is ready-made, the limit that no model can pass; by the
    answer's size, and what our own copy into the message takes beside it."""
    by_count = {}
    for count in (plan.count // 16, plan.count // 4, plan.count):
        with started("tests.bench.floor", str(count * PIXELS_BYTES + 64)) as floor:
            by_count[count] = _digits_per_s(floor.target, "", replace(plan, count=count))
    # As runs return them, digits in memory of their own: zeros that nothing was written to are one page of the system's.
    one = engine_of("mlp", plan)
    rows = [one.run(one.sample(plan.largest))["pixels"].copy() for _ in range(max(1, plan.count // plan.largest))]
    packed = (
        len(rows) * len(rows[0]) * runs_per_second(lambda: pack_field(b"", IMAGES_KEY, [[as_bytes(each) for each in rows]]), 0.5)
    )
    rate = by_count[plan.count]
    figures = {"digits_per_s": rate, "bytes_per_s": rate * PIXELS_BYTES, "by_count": by_count, "packed_digits_per_s": packed}
    return Outcome(figures)


def served(plan: Plan) -> Outcome:
    """Large requests through gRPC beside the lesser of the raw model and the wire; one digit's latency beside the floor's."""
    raw, limit = buckets(plan).figures, wire(plan).figures["digits_per_s"]
    figures: dict[str, Any] = {"wire_digits_per_s": limit}
    aims = []
    with plan.server() as server:
        for model in MODELS:
            rate = _digits_per_s(server.target, model, plan)
            bound = min(raw[model]["digits_per_s"], limit)
            figures[model] = {"digits_per_s": rate, "raw_digits_per_s": raw[model]["digits_per_s"], "share": rate / bound}
            aims.append(Target(f"{model}: served / the lesser of raw and wire", rate / bound, 0.8))
            aims.append(Target(f"{model}: digits a second, millions", rate / 1e6, 1))
        one = by_python(Load(server.target, "mlp", 1, plan.seconds)).p50_s
    with started("tests.bench.floor", "832") as floor:
        bare = by_python(Load(floor.target, "", 1, plan.seconds)).p50_s
    figures["one_digit"] = {"p50_s": one, "floor_p50_s": bare}
    aims.append(Target("one digit unloaded: p50 beyond the floor's, ms", (one - bare) * 1e3, 0.5, at_most=True))
    return Outcome(figures, aims=tuple(aims))


def training(plan: Plan) -> Outcome:
    """Milliseconds a step in each precision, plain and captured; the captured step's losses beside the plain one's."""
    device = torch.device(plan.provider)
    figures: dict[str, Any] = {"ms_per_step": measure(device, plan.seconds)}
    fixed, aims = [], []
    for name, config in PRESETS.items():
        plain, again, captured = (
            _losses(config, device, recording, plan.training_steps) for recording in (None, None, plan.recording)
        )
        # Two plain runs differ too, where kernels are not deterministic: what capturing adds is what counts.
        noise, apart = float((plain - again).abs().max()), float((plain - captured).abs().max())
        figures[f"{name} losses apart"] = {"captured and plain": apart, "plain and plain": noise}
        beyond = apart - 3 * noise
        fixed.append(Target(f"{name}: captured and plain losses apart beyond thrice the noise", beyond, 0.01, at_most=True))
    if plan.provider == "cuda":
        # The conditional presets are trained in bf16, the notebooks' in fp32.
        paces = {name: figures["ms_per_step"][f"{name} captured {config.precision}"] / 1e3 for name, config in PRESETS.items()}
        aims = [
            Target("mlp: 500 steps, s (the notebook: 15)", paces["mlp"] * 500, 0.25, at_most=True),
            Target("mlp: the 93,800 steps of a whole run, s", paces["mlp"] * 93_800, 60, at_most=True),
            Target("dcgan: the 9,380 steps of a whole run, s", paces["dcgan"] * 9_380, 15, at_most=True),
            Target("cdcgan: the 37,520 steps of a whole run, s", paces["cdcgan"] * 37_520, 300, at_most=True),
            Target("rpgan: the 42,210 steps of a whole run, s", paces["rpgan"] * 42_210, 300, at_most=True),
        ]
    return Outcome(figures, tuple(fixed), tuple(aims))


def compiled_training(plan: Plan) -> Outcome:
    """Milliseconds a step with both networks by ``torch.compile`` and its own graphs, to hold against a captured step's."""
    figures: dict[str, Any] = {}
    for name, config in PRESETS.items():
        try:
            device = torch.device(plan.provider)
            figures[name] = milliseconds_per_step(config, device, plan.seconds, compiled=plan.compile_options)
        except Exception as error:  # that it cannot be had is a finding
            figures[name] = f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return Outcome(figures)


def device_latents(plan: Plan) -> Outcome:
    """The kernel's latents are the host's to the bit, or it is not used; batches drawn and run, device / host, by bucket."""
    figures: dict[str, Any] = {}
    targets = []
    for model in MODELS:
        host, drawing = (engine_of(model, plan, cuda_graphs=plan.graphs, device_latents=draws) for draws in (False, True))
        for engine in (host, drawing):
            engine.warm()
        ratios = {bucket: _batch_s(drawing, bucket, plan) / _batch_s(host, bucket, plan) for bucket in host.buckets()}
        accepted = isinstance(drawing, CudaEngine) and drawing.drawing is not None
        figures[model] = {"same_bits": accepted, "batch_time_ratio": ratios}
        targets.append(Target(f"{model}: the device draws the host's latents", float(accepted), 1))
    return Outcome(figures, tuple(targets))


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        strictness,
        parity,
        graphs,
        buckets,
        baseline,
        side_by_side,
        releases,
        provider_options,
        warmness,
        memory,
        wire,
        served,
        training,
        compiled_training,
        device_latents,  # the last: a kernel that goes wrong takes the process's CUDA with it
    )
}


def difference(engine: Engine) -> dict[str, float]:
    """How far an engine's images are from those of the bundled graph in float32 on the CPU, and the share of pixels that are off;
    the worst of its buckets, each of which has plans of its own."""
    bundle = bundle_of(engine.manifest.name)
    latents, labels = draw_span(Span(SEED, 0, engine.largest), bundle.manifest.latent_size, bundle.manifest.labels)
    first = slice(0, COMPARED)
    plain = Engine(bundle.model, bundle.manifest, EngineOptions(), COMPARED)
    expected = plain.compute(latents[first], None if labels is None else labels[first], PIXELS_AND_IMAGES)
    apart, off = [], []
    for bucket in engine.buckets():
        got = engine.compute(latents[:bucket], None if labels is None else labels[:bucket], PIXELS_AND_IMAGES)
        seen = slice(0, min(bucket, COMPARED))
        apart.append(np.abs(expected["images"][seen] - got["images"][seen]).max())
        off.append((expected["pixels"][seen] != got["pixels"][seen]).mean())
    return {"apart": float(np.max(apart)), "pixels_off": float(np.max(off))}  # NaN if one is


def _batch_s(engine: Engine, bucket: int, plan: Plan) -> float:
    """Of a batch from spans to pixels."""
    reader = LatentReader(engine.manifest.latent_size, engine.manifest.labels)
    spans = [Span(SEED, 0, bucket)]
    return 1 / runs_per_second(lambda: engine.run(engine.assemble(reader, spans, bucket)), plan.seconds / 8)


def _run_s(engine: Engine, bucket: int, plan: Plan) -> float:
    feeds = engine.sample(bucket)
    return 1 / runs_per_second(lambda: engine.run(feeds), plan.seconds / 8)


def _digits_per_s(target: str, model: str, plan: Plan) -> float:
    """By several callers' processes at once: one alone would be the limit."""
    load = Load(target, model, plan.count, plan.seconds, WIRE_IN_FLIGHT // WIRE_PROCESSES)
    with ThreadPoolExecutor(WIRE_PROCESSES) as pool:
        results = [each.result() for each in [pool.submit(by_python, load) for _ in range(WIRE_PROCESSES)]]
    codes = {code: count for result in results for code, count in result.codes.items() if code != "OK"}
    if codes:
        raise RuntimeError(f"calls of {plan.count} digits by {model or 'the floor'} ended with {codes}: their rate says nothing")
    return sum(result.requests_per_s for result in results) * plan.count


def _rates(models: Sequence[str], plan: Plan) -> list[dict[str, float]]:
    """Digits a second of an engine for each model in batches as served, all at once, and by how many levels their digits were
    ever off in as long a time before that."""
    together = threading.Barrier(len(models), timeout=ENGINE_LIMIT_S)  # or one that fails would hold up the others for ever

    def run(model: str) -> dict[str, float]:
        engine = _as_served(model, plan)
        rows = engine.largest
        reader, spans = LatentReader(engine.manifest.latent_size, engine.manifest.labels), [Span(SEED, 0, rows)]

        def batch() -> NDArray[Any]:
            return engine.run(engine.assemble(reader, spans, rows))["pixels"]

        expected = batch().astype(np.int16)
        together.wait()
        levels, end = 0, time.monotonic() + plan.seconds
        while time.monotonic() < end:  # to look takes as long as to run: what is looked at is not what is timed
            levels = max(levels, int(np.abs(batch() - expected).max()))
        return {"per_s": rows * runs_per_second(batch, plan.seconds), "levels": levels}

    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(run, models))


def _as_served(model: str, plan: Plan) -> Engine:
    """A warm engine for batches as large as they are served, which draws latents where it can."""
    largest = min(plan.largest, batch_size(bundle_of(model).manifest, "cuda"))
    engine = engine_of(model, replace(plan, largest=largest), cuda_graphs=plan.graphs, device_latents=plan.graphs)
    engine.warm()
    return engine


def _device_per_s(model: str, plan: Plan) -> float:
    """Digits a second when runs are put into the stream one after the other, without copies, and waited for every tenth: no
    number of buffers gets more out of the device."""
    engine = _as_served(model, plan)
    assert isinstance(engine, CudaEngine)
    binding, graph = engine._binding(engine.largest, PIXELS), _graph_id(engine.largest, PIXELS) if plan.graphs else NO_GRAPH

    def ten() -> None:
        for _ in range(10):
            binding.run(graph, wait=False)
        engine._device.wait(engine._stream)

    return 10 * engine.largest * runs_per_second(ten, plan.seconds / 2)


def _losses(config: TrainConfig, device: torch.device, recording: Any, steps: int) -> torch.Tensor:
    """The losses of some steps on noise for pictures: the same images and seeds whichever way the step runs."""
    low, high = config.pixel_range
    generator = torch.Generator().manual_seed(SEED)
    images = (torch.rand(config.batch_size * 8, 1, 28, 28, generator=generator) * (high - low) + low).to(device)
    examples: tuple[torch.Tensor, ...] = (images,)
    if config.conditional:
        examples += (torch.arange(len(images), device=device) % config.labels,)
    with tempfile.TemporaryDirectory() as scratch:
        shorter = replace(config, epochs=steps // 8)
        trainer = Trainer(create_run(Path(scratch), shorter, {}), examples, device, recording=recording)
        taken = []
        for batch in trainer._batches():
            taken.append(trainer.take_step(batch).clone())
            trainer.step += 1  # penalties come every few steps
        return torch.stack(taken).cpu()
