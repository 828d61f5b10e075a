"""Latents drawn on the device: the kernel's source compiled for the host and by NVRTC, and the engine that launches it."""

from __future__ import annotations

import ctypes
import logging
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from serve.engine.cuda import compiled as to_image
from serve.engine.cuda_engine import CudaEngine
from serve.engine.device_latents import FUNCTION, SOURCE, DeviceLatents, definitions
from serve.engine.provider import EngineOptions
from serve.errors import EngineError
from serve.latents import INDEX_LIMIT, SEED_LIMIT, LatentReader, Span, draw, draw_span
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle
from tests.host_device import COMPILER, HostDevice

compiled = pytest.mark.skipif(COMPILER is None, reason="no C compiler")
DRAWING = EngineOptions(pad_to_powers=True, device_latents=True)
SHAPES = ((100, 10), (64, 0), (8, 3), (7, 1), (1, 0))


def make_engine(name: str, device: HostDevice) -> CudaEngine:
    bundle = read_bundle(BUNDLED_DIR / name / "1")
    engine = CudaEngine(bundle.model, bundle.manifest, DRAWING, 16, device)
    engine.warm()
    return engine


def mixed(chance: random.Random, rows: int, labels: int) -> list[Span]:
    """Spans of all kinds: the highest seeds and indices, truncated, with labels of their own."""
    spans = []
    while rows:
        count = chance.randint(1, min(rows, 5))
        start = chance.choice([0, INDEX_LIMIT - count, chance.randrange(INDEX_LIMIT - count), chance.randrange(1000)])
        seed = chance.choice([0, SEED_LIMIT - 1, chance.randrange(SEED_LIMIT)])
        own = np.array([chance.randrange(labels) for _ in range(count)]) if labels and chance.random() < 0.3 else None
        spans.append(Span(seed, start, count, None, own, chance.choice([0.0, 0.01, 0.7, 1.5, 8.0])))
        rows -= count
    return spans


@compiled
@pytest.mark.parametrize(("latent_size", "labels"), SHAPES)
def test_the_kernels_source_draws_the_hosts_bits(latent_size: int, labels: int) -> None:
    device = HostDevice()
    chance = random.Random(latent_size)
    drawing = DeviceLatents(device, 300, latent_size, labels, device.open_stream())
    for rows in (1, 257, 300):
        spans = mixed(chance, rows, labels)
        expected, expected_labels = np.empty((rows, latent_size), np.float32), np.empty(rows, np.int64)
        LatentReader(latent_size, labels).fill(expected, spans, expected_labels if labels else None)
        latents, chosen = np.full((rows, latent_size), np.nan, np.float32), np.full(rows, -7, np.int64)
        drawing.fill(spans)
        drawing.launch(rows, latents.ctypes.data, chosen.ctypes.data if labels else 0)
        assert latents.tobytes() == expected.tobytes()
        if labels:
            assert chosen.tolist() == expected_labels.tolist()
    drawing.release()
    assert not device.locked


@compiled
def test_every_tail_of_the_table_is_looked_up_as_on_the_host() -> None:
    """Enough rows for the rare words near 0 and near the middle, where an octave has few of them."""
    device = HostDevice()
    drawing = DeviceLatents(device, 1 << 16, 64, 0, device.open_stream())
    latents = np.empty((1 << 16, 64), np.float32)
    drawing.fill([Span(9, 0, 1 << 16)])
    drawing.launch(1 << 16, latents.ctypes.data, 0)
    assert np.array_equal(latents.view(np.uint32), draw(9, 0, 1 << 16, 64).view(np.uint32))
    assert np.abs(latents).max() > 5


def test_nvrtc_compiles_the_source_without_fused_arithmetic() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    ptx = to_image(SOURCE.read_text(), "compute_90", definitions()).decode()
    assert f".visible .entry {FUNCTION}(" in ptx
    assert set(re.findall(r"\b((?:add|mul|fma|mad)\.\S*f32)", ptx)) == {"add.rn.f32", "mul.rn.f32"}
    with pytest.raises(EngineError, match="nvrtcCompileProgram failed: NVRTC_ERROR_COMPILATION"):
        to_image("no C", "compute_90", [])


def test_nvrtc_compiles_the_source_to_machine_code() -> None:
    """What the driver of CUDA 13.0 takes from any NVRTC 13: it refuses the PTX of 13.2 (`.version 9.2`)."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    image = to_image(SOURCE.read_text(), "sm_90", definitions())
    assert image.startswith(b"\x7fELF")
    assert FUNCTION.encode() in image
    with pytest.raises(EngineError, match="nvrtcCompileProgram failed: NVRTC_ERROR_INVALID_OPTION"):
        to_image(SOURCE.read_text(), "sm_999", definitions())


@compiled
@pytest.mark.parametrize("name", ["mlp", "rpgan"])
def test_an_engine_that_draws_answers_as_one_that_does_not(name: str) -> None:
    device = HostDevice()
    engine = make_engine(name, device)
    assert engine.drawing is not None
    size, labels = engine.manifest.latent_size, engine.manifest.labels
    reader, chance = LatentReader(size, labels), random.Random(4)
    for rows in (1, 7, 16, 3):
        spans = mixed(chance, rows, labels)
        feeds = engine.assemble(reader, spans, rows)
        feeds["latents"][:] = np.nan  # of no use: the device's are
        pixels = engine.run(feeds)["pixels"]
        latents, chosen = np.empty((rows, size), np.float32), np.empty(rows, np.int64)
        reader.fill(latents, spans, chosen if labels else None)
        assert np.array_equal(pixels, engine.compute(latents, chosen if labels else None)["pixels"])
        if labels:
            assert feeds["labels"].tolist() == chosen.tolist(), "for the caller, who is told them"
    own = draw(99, 0, 2, size)
    given = [Span(0, 0, 2, own), Span(5, 1, 1)]
    feeds = engine.assemble(reader, given, 3)
    assert np.array_equal(feeds["latents"][:2], own), "latents of a caller's own are the host's affair"
    engine.run(feeds)
    engine.close()
    assert not device.locked


class Wrong(HostDevice):
    """Whose kernel leaves one bit wrong in the last row."""

    def launch(self, kernel: Any, threads: int, arguments: Sequence[int], stream: int) -> None:
        super().launch(kernel, threads, arguments, stream)
        rows, size = arguments[:2]
        last = ctypes.c_uint32.from_address(arguments[-2] + 4 * (rows * size - 1))
        last.value ^= 1


class WithoutNvrtc(HostDevice):
    def compile(self, source: str, function: str, definitions: Sequence[str]) -> Any:
        raise EngineError("nvrtcCompileProgram failed: NVRTC_ERROR_COMPILATION")


@pytest.mark.parametrize(
    ("device", "why"),
    [
        pytest.param(Wrong, "in a batch of 16 the device draws other latents", marks=compiled),
        (WithoutNvrtc, "nvrtcCompileProgram failed: NVRTC_ERROR_COMPILATION"),
    ],
)
def test_the_host_draws_where_the_device_does_not_draw_the_same(
    device: type[HostDevice], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = make_engine("mlp", device())
    assert [record.getMessage() for record in caplog.records] == [f"mlp/1: the host draws latents ({why})"]
    assert engine.drawing is None
    spans = [Span(3, 0, 4)]
    feeds = engine.assemble(LatentReader(64), spans, 4)
    assert np.array_equal(feeds["latents"], draw_span(spans[0], 64, 0)[0])
