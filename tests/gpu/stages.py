"""The stages of a session on a GPU. Each notes its figures as it goes, ends at its deadline, and returns what it decides."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch.nn import functional

from export.graphs.to_fp16 import to_fp16
from export.graphs.to_tf32x3 import Sums, to_tf32x3
from export.parity import TOLERANCES
from serve.engine.cuda import Device, compiled
from serve.engine.cuda_engine import CudaEngine
from serve.engine.device_latents import FUNCTION, SOURCE, definitions
from serve.engine.session import Engine
from serve.errors import DeviceLostError, EngineError
from serve.models.model import CUDA_INSTANCES
from serve.models.repository import Bundle
from tests.bench.report import Target, runs_per_second
from tests.gpu import checks
from tests.gpu.checks import CHECKS, Outcome, Plan, bundle_of, engine_of
from tests.gpu.forms import FORMS, biases_apart

CONVOLVED = ("dcgan", "rpgan")
WANTED = {"dcgan": 1.0, "rpgan": 1.2}  # millions a second, as exact as float32 or by tf32x3's own tolerance
WANTED_FP16 = 3.0
EXACT = 1e-5
HEURISTIC_A = {"cudnn_conv_algo_search": "HEURISTIC"}
HEURISTIC_B = {"cudnn_conv_algo_search": "EXHAUSTIVE"}
NHWC = {"prefer_nhwc": "1"}
TF32 = {"use_tf32": "1"}
PTX_BEFORE = b".version 9.0"  # what the driver of CUDA 13.0 takes
Out = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Notes:
    """Where a stage's findings go, and until when it may measure (``time.monotonic()``)."""

    out: Out
    deadline: float

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.deadline

    def figure(self, name: str, value: Any) -> None:
        self.out({"figures": {name: value}})

    def outcome(self, name: str, outcome: Outcome) -> None:
        self.out({"figures": {name: outcome.figures}, "fixed": [*outcome.fixed], "aims": [*outcome.aims]})

    def aim(self, target: Target) -> None:
        self.out({"aims": [target]})


def latents(plan: Plan, notes: Notes) -> str:
    """Which form of the kernel the driver takes: PTX as NVRTC writes it, with the version before, machine code."""
    source, own = SOURCE.read_text(encoding="utf-8"), Device().capability if plan.graphs else 90
    ptx = compiled(source, f"compute_{own}", definitions())
    version = next(line for line in ptx.splitlines() if line.startswith(b".version"))
    images = {
        "PTX 9.0": ptx.replace(version, PTX_BEFORE),
        f"PTX as written ({version.decode().split()[1]})": ptx,
        "machine code": compiled(source, f"sm_{own}", definitions()),
    }
    taken = {}
    for name, image in images.items():
        try:
            if plan.graphs:
                Device().load(image, FUNCTION)
            taken[name] = "taken"
        except EngineError as error:
            taken[name] = str(error)
        notes.figure(name, {"bytes": len(image), "driver": taken[name]})
    engine = engine_of("mlp", replace(plan, largest=min(64, plan.largest)), device_latents=True)
    engine.warm()
    if plan.graphs:
        notes.figure("driver's CUDA", Device()._call("cudaDriverGetVersion")[0])
    notes.out({"fixed": [Target("latents are drawn by the device", float(engine.draws_latents), 1)]})
    refused = ", ".join(name for name, said in taken.items() if said != "taken") or "none"
    return f"the device draws: {engine.draws_latents}; refused: {refused}"


def profile(plan: Plan, notes: Notes) -> str:
    """Microseconds a kernel, of the bundled graphs and of those with another last layer."""
    size, totals = max(1, plan.largest // 2), {}
    if plan.graphs:
        torch.cuda.init()  # what looks on needs it
        os.environ["TEARDOWN_CUPTI"] = "0"  # begun anew beside CUDA graphs it has crashed (pytorch/pytorch #112507)
    activities = [torch.profiler.ProfilerActivity.CUDA] if plan.graphs else [torch.profiler.ProfilerActivity.CPU]
    for model in CONVOLVED:
        for name in ("as_bundled", "last_as_3x3"):
            engine = _engine(bundle_of(model), plan, FORMS[name](bundle_of(model).model), (size,))
            totals[model, name] = size / _rate(engine, size, plan)
            notes.figure(f"{model} {name}, s a run", totals[model, name])
            engine.captures.clear()  # kernels of a graph are not all seen one by one
            feeds = engine.sample(size)
            engine.run(feeds)
            with torch.profiler.profile(activities=activities) as seen:  # CUPTI sees the whole process's kernels
                for _ in range(10):
                    engine.run(feeds)
            kernels = {each.key: round(getattr(each, "device_time_total", 0.0) / 10, 1) for each in seen.key_averages()}
            notes.figure(f"{model} {name}, µs a run of {size}", dict(sorted(kernels.items(), key=lambda kernel: -kernel[1])[:20]))
            engine.close()
            if notes.over:
                return "not all were profiled in the time there was"
    ratios = {model: totals[model, "last_as_3x3"] / totals[model, "as_bundled"] for model in CONVOLVED}
    return "last layer as a 3×3 convolution, time of a run / today's: " + _listed(ratios)


# Name → the CUDA provider's options, what is made of a graph, what the result is called, and how far it may be from float32.
ARITHMETICS: dict[str, tuple[dict[str, str], Callable[[bytes], bytes], str, float]] = {
    "fp32 A": (HEURISTIC_A, bytes, "exact", EXACT),
    "fp32 B": (HEURISTIC_B, bytes, "exact", EXACT),
    "fp16 A": (HEURISTIC_A | TF32, to_fp16, "fp16", TOLERANCES["fp16"].images),
    "TF32 A": (HEURISTIC_A | TF32, bytes, "TF32", math.inf),
    # The last: nothing else is lost with a process that this ends.
    "fp16 A NHWC": (HEURISTIC_A | TF32 | NHWC, lambda model: to_fp16(biases_apart(model)), "fp16", TOLERANCES["fp16"].images),
}
SMALL = (1, 8, 64)  # sizes at which the two heuristics are compared besides


def forms(plan: Plan, notes: Notes) -> str:
    """Digits a second of every form of a graph in every arithmetic, with the difference from float32 on the CPU."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    today: dict[tuple[str, str], dict[str, float]] = {}  # model and arithmetic → size → digits a second of the bundled graph
    for arithmetic, (options, made, kind, most) in ARITHMETICS.items():
        for model in CONVOLVED:
            bundle = bundle_of(model)
            for name, form in FORMS.items():
                if notes.over:
                    break
                if name == "biases_back" and model != "rpgan":
                    continue
                small = SMALL if kind == "exact" and name == "as_bundled" else ()
                rate, found = _measured(bundle, plan, lambda: made(form(bundle.model)), options, small)  # noqa: B023  # called at once
                notes.figure(f"{model}, {name}, {arithmetic}", found)
                if name == "as_bundled":
                    today[model, arithmetic] = found.get("per_s", {})
                apart = found.get("apart", math.nan)
                held = kind if apart <= most else f"{kind} but for its difference"
                best[model, held] = max(best.get((model, held), (0.0, "")), (rate, f"{name} {arithmetic}, {apart:.1e} apart,"))
    for model in CONVOLVED:
        for held, wanted in (("exact", WANTED[model]), ("fp16", WANTED_FP16)):
            if (model, held) in best:
                notes.aim(Target(f"{model}, {held}: digits a second, millions", best[model, held][0] / 1e6, wanted))
    ratios = {
        f"{model} {size}": rate / today[model, "fp32 B"][size]
        for model in CONVOLVED
        for size, rate in today.get((model, "fp32 A"), {}).items()
        if size in today.get((model, "fp32 B"), {})
    }
    fastest = "; ".join(f"{model} {held} {how} {rate:,.0f}" for (model, held), (rate, how) in best.items())
    return f"fastest: {fastest}. Bundled graphs, heuristic A / B: {_listed(ratios)}"


def tf32x3(plan: Plan, notes: Notes) -> str:
    """The three ways to add up three products: which is fast, and how far each is from float32 on the CPU."""
    best: dict[str, tuple[float, str]] = {}
    ways: tuple[Sums, ...] = ("apart", "one", "short")
    for sums in ways:
        for model in CONVOLVED:
            if notes.over:
                break
            bundle = bundle_of(model)
            rate, found = _measured(bundle, plan, lambda: to_tf32x3(bundle.model, sums), HEURISTIC_A | TF32)  # noqa: B023  # called at once
            notes.figure(f"{model}, {sums}", found)
            apart = found.get("apart", math.nan)
            if apart <= TOLERANCES["tf32x3"].images:
                best[model] = max(best.get(model, (0.0, "")), (rate, f"{sums}, {apart:.1e} apart,"))
    for model in CONVOLVED:
        notes.aim(Target(f"{model}, tf32x3: digits a second, millions", best.get(model, (0.0, ""))[0] / 1e6, WANTED[model]))
    return "fastest of those within the tolerance: " + "; ".join(
        f"{model} {how} {rate:,.0f}" for model, (rate, how) in best.items()
    )


def yardstick(plan: Plan, notes: Notes) -> str:
    """What PyTorch takes for each convolution alone, with cuDNN's own search: what these layers can do on this device."""
    size, device = max(1, plan.largest // 2), torch.device(plan.provider)
    sums: dict[str, float] = {}
    torch.backends.cudnn.benchmark = True
    for arithmetic, tf32, kind in (("fp32", False, torch.float32), ("TF32", True, torch.float32), ("fp16", True, torch.float16)):
        torch.backends.cudnn.allow_tf32 = tf32
        for model in CONVOLVED:
            for name, run in _layers(model, size, device, kind):
                if notes.over:
                    return "not all layers were measured in the time there was"
                run()  # the search

                def ten(run: Callable[[], Any] = run) -> None:
                    for _ in range(10):
                        run()
                    if plan.graphs:
                        torch.cuda.synchronize()

                taken = 1 / runs_per_second(ten, plan.seconds / 8) / 10
                notes.figure(f"{model} {name} {arithmetic}, µs of {size}", round(taken * 1e6, 1))
                sums[f"{model} {arithmetic}"] = sums.get(f"{model} {arithmetic}", 0.0) + taken
    rates = {which: size / taken / 1e6 for which, taken in sums.items()}
    return "PyTorch's convolutions one by one, million digits a second: " + _listed(rates)


def served(plan: Plan, notes: Notes) -> str:
    """Digits a second through gRPC with two and three instances, those of the two beside the lesser of model and wire."""
    limit = checks.wire(plan)
    notes.outcome("wire", limit)
    rates: dict[int, dict[str, float]] = {2: {}, 3: {}}
    for instances, found in rates.items():
        with plan.server(f"--instances={instances}") as server:
            for model in checks.MODELS:
                if notes.over:
                    break
                found[model] = checks._digits_per_s(server.target, model, plan)
                notes.figure(f"{model}, {instances} instances, digits a second", found[model])
        if instances == CUDA_INSTANCES:  # what it is to reach comes before what might be better
            for model, rate in found.items():
                engine = checks._as_served(model, plan)
                raw = _rate(engine, engine.largest, plan)
                engine.close()
                notes.figure(f"{model}, in process", raw)
                bound = min(raw, limit.figures["digits_per_s"])
                notes.aim(Target(f"{model}: served / the lesser of raw and wire", rate / bound, 0.8))
        if notes.over:
            break
    ratios = {model: rate / rates[2][model] for model, rate in rates[3].items() if rates[2][model]}
    return f"three instances / two: {_listed(ratios)}"


def chosen(plan: Plan, notes: Notes) -> str:
    """What must hold of the bundles as they are."""
    return _checked(plan, notes, ("strictness", "parity", "graphs"))


def rest(plan: Plan, notes: Notes) -> str:
    """The other checks, until the time is spent."""
    before = ("strictness", "parity", "graphs", "wire")
    names = [name for name in CHECKS if name not in (*before, "compiled_training", "provider_options")]
    return _checked(plan, notes, ["served", "memory", *(name for name in names if name not in ("served", "memory"))])


def _checked(plan: Plan, notes: Notes, names: Any) -> str:
    done = []
    for name in names:
        if notes.over:
            break
        notes.outcome(name, CHECKS[name](plan))
        done.append(name)
    return f"ran {', '.join(done)}" + ("" if len(done) == len(names) else "; there was no time for more")


def _measured(
    bundle: Bundle, plan: Plan, make: Callable[[], bytes], options: Mapping[str, str], small: Sequence[int] = ()
) -> tuple[float, dict[str, Any]]:
    """The best rate of a graph over some sizes, ``small`` ones among them, and what was found. A graph that cannot be run is a
    finding; a device that is lost ends the stage."""
    largest = {max(1, plan.largest // part) for part in (8, 4, 2)}
    sizes = tuple(sorted(largest | {size for size in small if size < max(largest)}))
    try:
        engine = _engine(bundle, plan, make(), sizes, options)
        found: dict[str, Any] = dict(checks.difference(engine))
        rates = {str(size): _rate(engine, size, plan) for size in sizes}
        engine.close()
    except DeviceLostError:
        raise
    except Exception as error:  # an option this machine cannot take, a graph that ONNX Runtime does not
        return 0.0, {"raised": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
    return max(rates.values()), found | {"per_s": rates}


def _engine(
    bundle: Bundle, plan: Plan, model: bytes, sizes: tuple[int, ...], options: Mapping[str, str] | None = None
) -> CudaEngine:
    """An engine of a graph with graphs of these sizes alone."""
    manifest = msgspec.structs.replace(bundle.manifest, cuda_buckets=sizes)
    chosen = plan.options(cuda_graphs=plan.graphs, cuda_options=dict(options or {}))
    device = plan.device() if plan.device is not None else None
    engine = CudaEngine(model, manifest, chosen, sizes[-1], device)
    if plan.graphs:
        engine.warm()
    return engine


def _rate(engine: Engine, size: int, plan: Plan) -> float:
    """Digits a second, copies included, of drawn latents."""
    feeds = engine.sample(size)
    return size * runs_per_second(lambda: engine.run(feeds), plan.seconds / 8)


def _layers(model: str, size: int, device: torch.device, kind: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each convolution of a bundled model, with inputs of its shape, channels last in half precision."""
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(bundle_of(model).model)).graph
    weights: dict[str, NDArray[Any]] = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    shapes = {each.name: [axis.dim_value for axis in each.type.tensor_type.shape.dim] for each in graph.value_info}
    layout = torch.channels_last if kind == torch.float16 else torch.contiguous_format
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
            weight = torch.from_numpy(weights[node.input[1]].copy()).to(device, kind).contiguous(memory_format=layout)
            maps = torch.randn(size, *shapes[node.input[0]][1:]).to(device, kind).contiguous(memory_format=layout)
            layer: Any = functional.conv2d if node.op_type == "Conv" else functional.conv_transpose2d
            given = {"stride": attributes["strides"][0], "padding": attributes["pads"][0]}
            yield node.name, lambda layer=layer, maps=maps, weight=weight, given=given: layer(maps, weight, **given)


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())
