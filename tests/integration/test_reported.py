"""Every field that leaves the server beside its value obtained another way: from files, from arithmetic, from what was sent.

The pairs below stand apart from the code. A field or a metric that is in none of them fails, and so does a pair of neither.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import onnxruntime
import pytest
from google.protobuf.descriptor import Descriptor
from prometheus_client import CollectorRegistry

from serve.client.channel import CHANNEL_OPTIONS
from serve.command_line import release
from serve.latents import draw
from serve.manifest import BUNDLED_DIR
from serve.observability.metrics import Metrics
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc
from serve.pb.inference import open_inference_pb2 as oip
from serve.pb.inference import open_inference_pb2_grpc as oip_grpc
from tests.bundle_copies import add_version, break_golden
from tests.server_process import ServerProcess
from tests.waiting import wait_until

INSTANCES, MAX_BATCH, MAX_COUNT, MAX_FLOAT32, MAX_QUEUE = 2, 8, 64, 16, 4000
# Runs wait while a file is there: what is under way stands still to be counted. A lone request's rows are shared by the idle
# instances if runs were slow, which a busy machine makes them: here they never are, so that the number of batches is known.
HELD = """
import math, pathlib, runpy, time
import serve.batching.policy
from serve.engine.session import Engine
serve.batching.policy.LEAST_SHARE_S = math.inf
launch = Engine.launch
def held(*arguments):
    while pathlib.Path({flag!r}).exists():
        time.sleep(0.01)
    return launch(*arguments)
Engine.launch = held
runpy.run_module("serve", run_name="__main__", alter_sys=True)
"""
# Not brought about here: who compares them.
ELSEWHERE = {
    "digits_access_denied": "tests/integration/test_access.py",
    "digits_access_reloads": "tests/integration/test_access.py",
    "digits_background_failures": "tests/unit/test_unreadable.py",
    "digits_drain_refusals": "tests/integration/test_wiring.py",
    "digits_dropped_images": "tests/integration/test_wiring.py",
    "digits_model_ready": "tests/unit/test_model.py",
    "digits_run_failures": "tests/integration/test_wiring.py",
    "digits_self_checks": "tests/unit/test_model.py",
    "digits_serving_file_reads": "tests/unit/test_reconcile.py",
    "http_server_request_duration_seconds": "tests/integration/test_http_api.py",
}


class World:
    """A server whose every setting, model and call is known; the calls are made one after the other."""

    def __init__(self, folder: Path) -> None:
        self.models, self.flag = folder / "models", folder / "hold"
        for name in ("mlp", "cdcgan", "dcgan"):
            shutil.copytree(BUNDLED_DIR / name, self.models / name)
        add_version(self.models, "mlp", 2)
        break_golden(add_version(self.models, "mlp", 3))
        route = {"default": 1, "canary": 2, "canary_share": 0.25}
        wanted = {"mlp": {"versions": [1, 2, 3], "route": route}, "dcgan": {"versions": []}}
        (self.models / "serving.json").write_text(json.dumps({"schema_version": 1, "models": wanted}))
        self.server = ServerProcess(
            f"--models-dir={self.models}", "--wait-for-models", "--default-model=mlp", f"--instances={INSTANCES}",
            f"--max-batch-size={MAX_BATCH}", f"--max-count={MAX_COUNT}",
            f"--max-queue-images={MAX_QUEUE}", "--self-check-interval-s=0", "--linger-us=0", "--watchdog-s=600", "--provider=cpu",
            module=("-c", HELD.format(flag=str(self.flag))),
        )  # fmt: skip
        self.channel = grpc.insecure_channel(self.server.target, CHANNEL_OPTIONS[1:])
        self.digits, self.inference = pb_grpc.DigitGeneratorStub(self.channel), oip_grpc.GRPCInferenceServiceStub(self.channel)

    def file(self, name: str) -> Any:
        return json.loads((self.models / name).read_text())

    def sha256(self, name: str) -> str:
        return hashlib.sha256((self.models / name / "model.onnx").read_bytes()).hexdigest()

    def metric(self, name: str, **labels: str) -> float:
        return self.server.metric(name, **labels)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("reported"))
    yield made
    made.channel.close()
    made.server.kill()


def fields_of(*services: Any) -> set[str]:
    """``Message.field`` of everything that the services' methods answer with."""
    found: set[str] = set()

    def add(message: Descriptor) -> None:
        for field in message.fields:
            nested = field.message_type
            if nested is None or nested.GetOptions().map_entry:
                found.add(f"{message.name}.{field.name}")
            elif f"{nested.name}.{nested.fields[0].name}" not in found:
                add(nested)

    for service in services:
        for method in service.methods:
            add(method.output_type)
    return found


def fields_match(pairs: Mapping[str, tuple[Any, Any]]) -> None:
    for field, (got, wanted) in pairs.items():
        assert got == wanted, f"{field} is {got!r}, and should be {wanted!r}"


def answers(world: World) -> dict[str, tuple[Any, Any]]:
    """Of ``Generate``, for digits with labels in more batches than one, and for one address alone."""
    compute = world.metric("digits_compute_seconds_sum", model="cdcgan")
    began = time.perf_counter()
    one = world.digits.Generate(pb.GenerateRequest(model="cdcgan", count=20, seed=7, start=3, labels=[4]))
    took = time.perf_counter() - began
    rows = draw(7, 3, 20, 100)
    same = world.digits.Generate(pb.GenerateRequest(model="cdcgan", latents=rows.tobytes(), labels=[4]))
    difference = np.abs(np.frombuffer(one.images[0], np.uint8).astype(int) - np.frombuffer(same.images[0], np.uint8))
    computed = world.metric("digits_compute_seconds_sum", model="cdcgan") - compute - same.timing.compute_seconds
    return {
        "GenerateResponse.images": (int(difference.max()) <= 1, True),
        "GenerateResponse.model": (one.model, "cdcgan"),
        "GenerateResponse.version": (one.version, 1),
        "GenerateResponse.seed": ((one.seed, same.HasField("seed")), (7, False)),
        "GenerateResponse.start": (one.start, 3),
        "GenerateResponse.count": (one.count, 20),
        "GenerateResponse.height": (one.height, 28),
        "GenerateResponse.width": (len(one.images[0]) // one.count // one.height, one.width),
        "GenerateResponse.format": (one.format, pb.IMAGE_FORMAT_UINT8),
        "GenerateResponse.labels": (list(one.labels), [4] * 20),
        "GenerateResponse.digest": (one.digest, world.file("cdcgan/1/manifest.json")["files"]["model.onnx"]),
        "Timing.compute_seconds": (one.timing.compute_seconds, pytest.approx(computed, rel=0.01)),
        "Timing.queue_seconds": (0 < one.timing.queue_seconds < took, True),
    }


def models(world: World) -> dict[str, tuple[Any, Any]]:
    listed = world.digits.ListModels(pb.ListModelsRequest())
    found = {(each.name, each.version): each for each in listed.models}
    about = world.digits.GetModel(pb.GetModelRequest(model="cdcgan"))
    manifest = world.file("cdcgan/1/manifest.json")
    too_many = [refused(world, count=MAX_COUNT + 1), refused(world, count=MAX_FLOAT32 + 1, format=pb.IMAGE_FORMAT_FLOAT32)]
    return {
        "ModelSummary.name": (sorted({name for name, _ in found}), ["cdcgan", "mlp"]),
        "ModelSummary.version": (sorted(found), [("cdcgan", 1), ("mlp", 1), ("mlp", 2)]),
        "ModelSummary.ready": ([each.ready for each in found.values()], [True] * 3),
        "ModelSummary.default_version": (
            [key for key, each in found.items() if each.default_version],
            [("cdcgan", 1), ("mlp", 1)],
        ),
        "ModelSummary.traffic_share": ([found["mlp", number].traffic_share for number in (1, 2)], [0.75, 0.25]),
        "ListModelsResponse.default_model": (listed.default_model, "mlp"),
        **{
            f"GetModelResponse.{name}": (getattr(about, name), manifest[name])
            for name in ("architecture", "latent_size", "latent_distribution", "height", "width", "precision", "labels")
        },
        **{f"Tolerance.{name}": (getattr(about.tolerance, name), value) for name, value in manifest["tolerance"].items()},
        "GetModelResponse.batch_invariant": (about.batch_invariant, same_in_every_batch(world.models / "cdcgan/1/model.onnx")),
        "GetModelResponse.provider": (about.provider, "cpu"),
        "GetModelResponse.digest": (about.digest, world.sha256("cdcgan/1")),
        "GetModelResponse.training_json": (json.loads(about.training_json), manifest["training"]),
        "GetModelResponse.parity_json": (json.loads(about.parity_json), world.file("cdcgan/1/parity.json")),
        "GetModelResponse.quality_json": (json.loads(about.quality_json), world.file("cdcgan/1/quality.json")),
        # What is one beyond is refused by this very number; what it allows is answered.
        "Limits.max_count": (about.limits.max_count, too_many[0]),
        "Limits.max_count_float32": (about.limits.max_count_float32, too_many[1]),
        "Limits.max_batch_size": (about.limits.max_batch_size, MAX_BATCH),
        "Limits.max_queue_images": (about.limits.max_queue_images, MAX_QUEUE),
    }


def same_in_every_batch(model: Path) -> bool:
    """By ONNX Runtime alone: whether digits have the same bits in batches of other sizes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    rows = draw(1, 0, MAX_BATCH, session.get_inputs()[0].shape[1])
    labels = {"labels": np.zeros(MAX_BATCH, np.int64)} if len(session.get_inputs()) > 1 else {}

    def images(size: int) -> bytes:
        parts = (slice(first, first + size) for first in range(0, MAX_BATCH, size))
        feeds = ({"latents": rows[part]} | {name: values[part] for name, values in labels.items()} for part in parts)
        return b"".join(session.run(["images"], each)[0].tobytes() for each in feeds)

    return len({images(size) for size in (1, 2, 4, MAX_BATCH)}) == 1


def refused(world: World, **fields: Any) -> int:
    """What one less than the count is, which is answered; this one is refused, and the text names the other."""
    with pytest.raises(grpc.RpcError) as caught:
        world.digits.Generate(pb.GenerateRequest(**fields))
    world.digits.Generate(pb.GenerateRequest(**fields | {"count": fields["count"] - 1}))
    assert str(fields["count"] - 1) in str(caught.value.details())
    return int(fields["count"]) - 1


def status(world: World) -> dict[str, tuple[Any, Any]]:
    """While three calls are under way, of which two run."""
    world.flag.touch()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(world.digits.Generate, pb.GenerateRequest(version=1, count=MAX_BATCH, seed=1)) for _ in range(3)]

        try:

            def seen() -> Any:
                return next(each for each in world.digits.Status(pb.StatusRequest(model="mlp")).versions if each.version == 1)

            def running() -> float:
                return world.metric("digits_running_images", model="mlp", version="1")

            wait_until(lambda: seen().calls == 3 and running() == 2 * MAX_BATCH, lambda: f"{seen()} {running()}")
            found = {(each.model, each.version): each for each in world.digits.Status(pb.StatusRequest()).versions}
            gauges = {
                name: world.metric(f"digits_{name}", model="mlp", version="1")
                for name in ("queue_images", "running_images", "instances_busy", "instances_live", "instances_wanted")
            }
        finally:
            world.flag.unlink()
        for each in asked:
            each.result()
    states = {key: pb.VersionState.Name(each.state).removeprefix("VERSION_STATE_") for key, each in found.items()}
    served = {("mlp", 1): "READY", ("mlp", 2): "READY", ("mlp", 3): "FAILED", ("cdcgan", 1): "READY", ("dcgan", 1): "UNLOADED"}
    return {
        "VersionStatus.model": (sorted({name for name, _ in found}), ["cdcgan", "dcgan", "mlp"]),
        "VersionStatus.version": (sorted(found), sorted(served)),
        "VersionStatus.state": (states, served),
        "VersionStatus.reason": (
            {key: bool(re.search("golden", each.reason)) for key, each in found.items() if each.reason},
            {("mlp", 3): True},
        ),
        "VersionStatus.digest": (
            {key: each.digest for key, each in found.items()},
            {key: world.sha256(f"{key[0]}/{key[1]}") if state == "READY" else "" for key, state in served.items()},
        ),
        "VersionStatus.traffic_share": (
            {key: each.traffic_share for key, each in found.items() if each.traffic_share},
            {("mlp", 1): 0.75, ("mlp", 2): 0.25, ("cdcgan", 1): 1.0},
        ),
        "VersionStatus.calls": ({key: each.calls for key, each in found.items() if each.calls}, {("mlp", 1): 3}),
        "VersionStatus.queued_images": (
            {key: each.queued_images for key, each in found.items() if each.queued_images},
            {("mlp", 1): MAX_BATCH},
        ),
        "digits_queue_images": (gauges["queue_images"], MAX_BATCH),
        "digits_running_images": (gauges["running_images"], 2 * MAX_BATCH),
        "digits_instances_busy": (gauges["instances_busy"], 2),
        "digits_instances_live": (gauges["instances_live"], INSTANCES),
        "digits_instances_wanted": (gauges["instances_wanted"], INSTANCES),
    }


Tensors = Mapping[str, tuple[str, list[int]]]


def kinds(tensors: Tensors) -> dict[str, str]:
    return {name: kind for name, (kind, _) in tensors.items()}


def shapes(tensors: Tensors) -> dict[str, list[int]]:
    return {name: shape for name, (_, shape) in tensors.items()}


def of_config(tensors: Any) -> Tensors:
    return {each.name: (oip.DataType.Name(each.data_type).removeprefix("TYPE_"), list(each.dims)) for each in tensors}


def inference(world: World) -> dict[str, tuple[Any, Any]]:
    tensor, value = oip.ModelInferRequest.InferInputTensor, oip.InferTensorContents
    request = oip.ModelInferRequest(
        model_name="cdcgan",
        id="mine",
        inputs=[
            tensor(name="count", datatype="INT32", shape=[1], contents=value(int_contents=[2])),
            tensor(name="seed", datatype="UINT64", shape=[1], contents=value(uint64_contents=[7])),
        ],
        outputs=[oip.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in ("pixels", "images", "labels")],
    )
    typed, wanted = (
        world.inference.ModelInfer(request),
        world.digits.Generate(pb.GenerateRequest(model="cdcgan", count=2, seed=7)),
    )
    raw = oip.ModelInferRequest(model_name="cdcgan", raw_input_contents=[np.int32(2).tobytes(), np.uint64(7).tobytes()])
    raw.inputs.extend(tensor(name=name, datatype=kind, shape=[1]) for name, kind in (("count", "INT32"), ("seed", "UINT64")))
    [pixels] = world.inference.ModelInfer(raw).raw_output_contents
    wrong = oip.ModelInferRequest(model_name="none", id="wrong")
    failed, streamed = world.inference.ModelStreamInfer(iter([wrong, request]))
    contents = {each.name: each.contents for each in typed.outputs}
    images = np.array(contents["images"].fp32_contents)
    values = list(wanted.images[0])
    about = world.inference.ModelMetadata(oip.ModelMetadataRequest(name="cdcgan"))
    config = world.inference.ModelConfig(oip.ModelConfigRequest(name="cdcgan")).config
    taken = {"latents": ("FP32", [-1, 100]), "seed": ("UINT64", [1]), "count": ("INT32", [1]), "start": ("UINT64", [1])}
    taken |= {"truncation": ("FP32", [1]), "labels": ("INT64", [-1])}
    given = {"pixels": ("UINT8", [-1, 28, 28]), "images": ("FP32", [-1, 1, 28, 28]), "labels": ("INT64", [-1])}
    indexed = world.inference.RepositoryIndex(oip.RepositoryIndexRequest()).models
    states = {(each.name, int(each.version)): each for each in indexed}
    tensors = {each.name: (each.datatype, list(each.shape)) for each in (*about.inputs, *about.outputs)}
    inputs, outputs = of_config(config.input), of_config(config.output)
    unset = {
        f"InferTensorContents.{name}"
        for name in ("bool_contents", "fp64_contents", "bytes_contents", "int_contents", "uint64_contents")
    }
    server = world.inference.ServerMetadata(oip.ServerMetadataRequest())
    return {
        "ServerLiveResponse.live": (world.inference.ServerLive(oip.ServerLiveRequest()).live, True),
        "ServerReadyResponse.ready": (
            world.inference.ServerReady(oip.ServerReadyRequest()).ready,
            world.server.get("/v2/health/ready")[0] == 200,
        ),
        "ModelReadyResponse.ready": (world.inference.ModelReady(oip.ModelReadyRequest(name="mlp", version="2")).ready, True),
        "ServerMetadataResponse.name": (server.name, "digits-serve"),
        "ServerMetadataResponse.version": (server.version, release()),
        "ServerMetadataResponse.extensions": (list(server.extensions), []),
        "ModelMetadataResponse.name": (about.name, "cdcgan"),
        "ModelMetadataResponse.versions": (
            list(world.inference.ModelMetadata(oip.ModelMetadataRequest(name="mlp")).versions),
            ["1", "2"],
        ),
        "ModelMetadataResponse.platform": (about.platform, "onnxruntime_onnx"),
        "TensorMetadata.name": (sorted({each.name for each in about.inputs}), sorted(taken)),
        "TensorMetadata.datatype": (kinds(tensors), kinds(taken | given)),
        "TensorMetadata.shape": (shapes(tensors), shapes(taken | given)),
        "ModelInferResponse.model_name": (typed.model_name, "cdcgan"),
        "ModelInferResponse.model_version": (typed.model_version, "1"),
        "ModelInferResponse.id": (typed.id, "mine"),
        "ModelInferResponse.parameters": (
            {name: each.uint64_param or each.int64_param for name, each in typed.parameters.items()}["seed"],
            7,
        ),
        "ModelInferResponse.raw_output_contents": (list(pixels), values),
        "InferOutputTensor.name": ([each.name for each in typed.outputs], ["pixels", "images", "labels"]),
        "InferOutputTensor.datatype": ([each.datatype for each in typed.outputs], ["UINT8", "FP32", "INT64"]),
        "InferOutputTensor.shape": ([list(each.shape) for each in typed.outputs], [[2, 28, 28], [2, 1, 28, 28], [2]]),
        "InferOutputTensor.parameters": ([len(each.parameters) for each in typed.outputs], [0, 0, 0]),
        "InferTensorContents.uint_contents": (list(contents["pixels"].uint_contents), values),
        "InferTensorContents.fp32_contents": (bool(np.abs(images * 255 - values).max() <= 1), True),
        "InferTensorContents.int64_contents": (list(contents["labels"].int64_contents), list(wanted.labels)),
        **{name: (any(getattr(each, name.partition(".")[2]) for each in contents.values()), False) for name in unset},
        "ModelStreamInferResponse.error_message": ((bool(failed.error_message), streamed.error_message), (True, "")),
        "ModelIndex.name": (sorted({name for name, _ in states}), ["cdcgan", "dcgan", "mlp"]),
        "ModelIndex.version": (sorted(states), [("cdcgan", 1), ("dcgan", 1), ("mlp", 1), ("mlp", 2), ("mlp", 3)]),
        "ModelIndex.state": (
            [states[key].state for key in sorted(states)],
            ["READY", "UNAVAILABLE", "READY", "READY", "UNAVAILABLE"],
        ),
        "ModelIndex.reason": ({key for key, each in states.items() if each.reason}, {("dcgan", 1), ("mlp", 3)}),
        "ModelConfig.name": (config.name, "cdcgan"),
        "ModelConfig.platform": (config.platform, "onnxruntime_onnx"),
        "ModelConfig.backend": (config.backend, "onnxruntime"),
        "ModelConfig.max_batch_size": (config.max_batch_size, 0),
        "ModelInput.name": (sorted(inputs), sorted(taken)),
        "ModelInput.data_type": (kinds(inputs), kinds(taken)),
        "ModelInput.dims": (shapes(inputs), shapes(taken)),
        "ModelInput.optional": ({each.optional for each in config.input}, {True}),
        "ModelOutput.name": (sorted(outputs), sorted(given)),
        "ModelOutput.data_type": (kinds(outputs), kinds(given)),
        "ModelOutput.dims": (shapes(outputs), shapes(given)),
    }


def statistics(world: World) -> dict[str, tuple[Any, Any]]:
    """What five requests of one batch each, and one of three, add to the statistics and to the metrics: both are known."""
    own = {"model": "mlp", "version": "2"}

    def now() -> SimpleNamespace:
        [stats] = world.inference.ModelStatistics(oip.ModelStatisticsRequest(name="mlp", version="2")).model_stats
        names = ("queue_wait", "assembly", "compute", "encode")
        sums = {name: world.metric(f"digits_{name}_seconds_sum", **own) for name in names}
        counts = {name: world.metric(f"digits_{name}_seconds_count", **own) for name in names}
        more = {
            name: world.metric(name, **own)
            for name in (
                "digits_images_total", "digits_batch_images_sum", "digits_batch_images_count", "digits_bucket_runs_total",
                "digits_bucket_run_seconds_total", "digits_padding_images_total", "digits_split_requests_total",
            )
        }  # fmt: skip
        rpc = {"grpc_service": "digits.v1.DigitGenerator", "grpc_method": "Generate"}
        calls = {
            "started": world.metric("grpc_server_started_total", **rpc),
            "handled": world.metric("grpc_server_handled_total", grpc_code="OK", **rpc),
            "count": world.metric("grpc_server_handling_seconds_count", **rpc),
            "sum": world.metric("grpc_server_handling_seconds_sum", **rpc),
        }
        return SimpleNamespace(stats=stats, sums=sums, counts=counts, more=more, calls=calls)

    before = now()
    time.sleep(0.2)
    while (settled := now()).more != before.more:  # what was asked and given up before may still be computed
        before = settled
        time.sleep(0.2)
    began = time.perf_counter()
    told = [world.digits.Generate(pb.GenerateRequest(model="mlp", version=2, count=5, seed=1)).timing for _ in range(5)]
    split_began = time.perf_counter()
    told.append(world.digits.Generate(pb.GenerateRequest(model="mlp", version=2, count=2 * MAX_BATCH + 3, seed=1)).timing)
    ended = time.perf_counter()
    took, split_took, after = ended - began, ended - split_began, now()
    queued, computed = sum(each.queue_seconds for each in told), sum(each.compute_seconds for each in told)
    requests, runs, images = 6, 5 + 3, 5 * 5 + 2 * MAX_BATCH + 3
    sums = {name: after.sums[name] - before.sums[name] for name in after.sums}
    counts = {name: after.counts[name] - before.counts[name] for name in after.counts}
    more = {name: after.more[name] - before.more[name] for name in after.more}
    calls = {name: after.calls[name] - before.calls[name] for name in after.calls}
    rows = more["digits_padding_images_total"] + images

    def ns(field: str) -> float:
        return float(getattr(after.stats.inference_stats, field).ns - getattr(before.stats.inference_stats, field).ns) / 1e9

    def count(field: str) -> int:
        return int(getattr(after.stats.inference_stats, field).count - getattr(before.stats.inference_stats, field).count)

    pairs = {"queue": "queue_wait", "compute_input": "assembly", "compute_infer": "compute", "compute_output": "encode"}
    wanted = {
        "queue": requests,
        "compute_input": runs,
        "compute_infer": runs,
        "compute_output": requests,
        "success": requests,
        "fail": 0,
    }
    times = {field: pytest.approx(sums[name], abs=1e-6) for field, name in pairs.items()}
    labelled = {each.name for each in (after.stats,)}
    return {
        "ModelStatistics.name": (labelled, {"mlp"}),
        "ModelStatistics.version": (after.stats.version, "2"),
        "ModelStatistics.inference_count": (after.stats.inference_count - before.stats.inference_count, images),
        "ModelStatistics.execution_count": (after.stats.execution_count - before.stats.execution_count, runs),
        "StatisticDuration.count": ({field: count(field) for field in wanted}, wanted),
        "StatisticDuration.ns": (
            {field: ns(field) for field in pairs} | {"all": ns("success")},
            times | {"all": pytest.approx(sum(sums.values()), abs=1e-6)},
        ),
        # The wait of a request of one batch ends with its first row; that of the split one is longer, within its own time.
        "digits_queue_wait_seconds": (
            counts["queue_wait"] == requests and queued - 1e-6 <= sums["queue_wait"] <= queued + split_took + 1e-6,
            True,
        ),
        "digits_assembly_seconds": (counts["assembly"] == runs and 0 < sums["assembly"] < took, True),
        "digits_compute_seconds": (sums["compute"], pytest.approx(computed, rel=0.01)),
        "digits_encode_seconds": (counts["encode"] == requests and 0 < sums["encode"] < took, True),
        "digits_batch_images": ((more["digits_batch_images_sum"], more["digits_batch_images_count"]), (images, runs)),
        "digits_images": (more["digits_images_total"], images),
        "digits_bucket_runs": (more["digits_bucket_runs_total"], runs),
        "digits_bucket_run_seconds": (more["digits_bucket_run_seconds_total"], pytest.approx(computed, rel=0.01)),
        "digits_padding_images": (images <= rows <= runs * MAX_BATCH, True),
        "digits_split_requests": (more["digits_split_requests_total"], 1),
        "grpc_server_started": (calls["started"], requests),
        "grpc_server_handled": (calls["handled"], requests),
        "grpc_server_handling_seconds": (calls["count"] == requests and queued < calls["sum"] < took, True),
    }


def gauges(world: World) -> dict[str, tuple[Any, Any]]:
    return {
        "digits_queue_limit_images": (world.metric("digits_queue_limit_images", model="mlp", version="1"), MAX_QUEUE),
        "digits_model_traffic_share": (
            [world.metric("digits_model_traffic_share", model="mlp", version=each) for each in "12"],
            [0.75, 0.25],
        ),
        "digits_provider_info": (
            world.metric("digits_provider_info", model="cdcgan", provider="cpu", digest=world.sha256("cdcgan/1")),
            1,
        ),
        "digits_expected_provider_info": (world.metric("digits_expected_provider_info", provider="cpu"), 1),
        "digits_model_batch_invariant": (
            world.metric("digits_model_batch_invariant", model="mlp", version="1"),
            same_in_every_batch(world.models / "mlp/1/model.onnx"),
        ),
        "digits_models_loaded": (world.metric("digits_models_loaded"), 3),
        "digits_model_failed": (world.metric("digits_model_failed", model="mlp", version="3"), 1),
        "digits_model_loads": (
            [world.metric("digits_model_loads_total", model="mlp", result=each) for each in ("ok", "golden")],
            [2, 1],
        ),
        **{f"digits_gpu_memory_{name}_bytes": (world.metric(f"digits_gpu_memory_{name}_bytes"), 0) for name in ("used", "total")},
        "digits_device": (world.metric("digits_device_info", number=""), 1),
        "digits_device_latents": (world.metric("digits_device_latents", model="mlp", version="1"), 0),
        "digits_cuda_graph_captures": (world.metric("digits_cuda_graph_captures_total"), 0),
        "digits_build": (world.metric("digits_build_info", version=release(), grpcio=version("grpcio")), 1),
    }


def test_every_field_and_metric_is_as_it_is_known_otherwise(world: World) -> None:
    pairs: dict[str, tuple[Any, Any]] = {}
    for part in (answers, models, status, inference, statistics, gauges):
        pairs |= part(world)
    fields_match(pairs)
    registry = CollectorRegistry()
    metrics = {family.name for _ in [Metrics(registry)] for family in registry.collect()}
    reported = fields_of(*pb.DESCRIPTOR.services_by_name.values(), *oip.DESCRIPTOR.services_by_name.values())
    assert pairs.keys() | ELSEWHERE.keys() == reported | metrics, "each needs a comparison, here or elsewhere"
    assert not pairs.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("metric", ELSEWHERE)
def test_what_is_compared_elsewhere_is_asked_for_there(metric: str) -> None:
    place = Path(ELSEWHERE[metric])
    files = [place] if place.is_file() else list(place.rglob("*.py"))
    assert any(metric.removeprefix("digits_") in path.read_text() for path in files)
