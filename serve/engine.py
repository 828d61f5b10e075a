"""One ONNX Runtime session and the runs through it. Knows neither the queue nor gRPC.

Export's parity check runs through this very class, so what is proven there is what serves here.
A session belongs to the thread that made it: CUDA graphs cannot be replayed from several threads.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.binding import NO_GRAPH, Binding, Buffers
from serve.cuda import CAPTURE_GATE
from serve.errors import BundleError, GoldenError, ProviderError
from serve.latents import Span, draw_span
from serve.manifest import Manifest
from serve.onnx_runtime import ort

log = logging.getLogger(__name__)

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
PROVIDER_NAMES = {"cpu": CPU_PROVIDER, "cuda": CUDA_PROVIDER}

Provider = Literal["cpu", "cuda"]

PIXELS = ("pixels",)
PIXELS_AND_IMAGES = ("pixels", "images")

# TF32 is off because parity is proven without it. The arena grows by what is asked for, not by doubling: buckets are
# warmed from the largest down, so it grows once.
DEFAULT_CUDA_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


@dataclass(frozen=True)
class Outputs:
    """What one run gives: ``pixels`` uint8 (n, 28, 28), and ``images`` float32 (n, 1, 28, 28) if asked for."""

    pixels: NDArray[np.uint8]
    images: NDArray[np.float32] | None
    labels: NDArray[np.int64] | None  # a conditional model's, as they were given: (n,)
    bucket: int  # rows that were computed, padding included


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a session runs. ``cuda_options`` are the CUDA provider's own, over ``DEFAULT_CUDA_OPTIONS``."""

    provider: Provider = "cpu"
    intra_op_threads: int = 1
    powers: bool = False  # pad batches to powers of two; always so on CUDA
    cuda_graphs: bool = False
    cuda_options: Mapping[str, str] = field(default_factory=dict)

    @property
    def padded(self) -> bool:
        return self.powers or self.provider == "cuda"


class Engine:
    """A loaded model for batches of up to ``largest`` rows. Raises ProviderError or BundleError when it cannot be loaded.

    A batch is run in the smallest bucket that holds it: on CUDA a power of two, each with a fixed binding and, if asked
    for, a captured graph; on the CPU, unless ``powers`` is set, one for every size, because padding costs there what it
    costs to compute.
    """

    def __init__(self, model: bytes, manifest: Manifest, options: EngineOptions, largest: int) -> None:
        self.manifest = manifest
        self.options = options
        self.largest = largest
        self.captures: dict[int, bool] = {}  # bucket → whether its graph was captured and replays rightly
        with self._not_during_a_capture():
            self._session = _open_session(model, manifest, options)
            _check_signature(self._session, manifest)
            self._buffers = _buffers(manifest, largest, options.provider)
        self._bindings: dict[tuple[int, tuple[str, ...]], Binding] = {}

    @property
    def provider(self) -> Provider:
        return self.options.provider

    def latents(self, count: int) -> NDArray[np.float32]:
        """Where the next run's latents (count, z) are to be written."""
        return self._buffers.latents[:count]

    def labels(self, count: int) -> NDArray[np.int64] | None:
        """Where the next run's labels (count,) are to be written; None for an unconditional model."""
        return self._buffers.labels[:count] if self.manifest.labels else None

    def run(self, count: int, want_images: bool = False) -> Outputs:
        """Run the first ``count`` rows of ``latents`` and ``labels``. The arrays returned are new ones, never written again.

        Labels must be in range: nothing checks them after this.
        """
        bucket = self.bucket(count)
        self._buffers.latents[count:bucket] = 0
        self._buffers.labels[count:bucket] = 0
        replay = self.captures.get(bucket, False) and not want_images
        with self._not_during_a_capture():  # the copies as well: a synchronous one elsewhere breaks a capture
            self._buffers.upload(bucket)
            self._binding(bucket, PIXELS_AND_IMAGES if want_images else PIXELS).run(bucket if replay else NO_GRAPH)
            images = self._buffers.download("images", count) if want_images else None
            pixels = self._buffers.download("pixels", count)
        own_labels = self.labels(count)
        return Outputs(pixels, images, None if own_labels is None else own_labels.copy(), bucket)

    def compute(
        self, latents: NDArray[np.float32], labels: NDArray[np.int64] | None = None, *, want_images: bool = False
    ) -> Outputs:
        """Run any number of rows (n, z), in pieces if they are more than ``largest``.

        ``labels`` (n,) are a conditional model's, which must have them. Raises ValueError otherwise.
        """
        if (labels is not None) != bool(self.manifest.labels):
            raise ValueError(f"model {self.manifest.name} takes {self.manifest.labels} labels")
        pieces = []
        for first in range(0, len(latents), self.largest):
            rows = slice(first, min(first + self.largest, len(latents)))
            count = rows.stop - first
            self.latents(count)[:] = latents[rows]
            if labels is not None:
                self._buffers.labels[:count] = labels[rows]
            pieces.append(self.run(count, want_images))
        pixels = np.concatenate([piece.pixels for piece in pieces])
        images = [piece.images for piece in pieces if piece.images is not None]
        return Outputs(pixels, np.concatenate(images) if images else None, labels, sum(piece.bucket for piece in pieces))

    def bucket(self, count: int) -> int:
        """The rows that are computed for a batch of ``count``."""
        return min(self.largest, 1 << (count - 1).bit_length()) if self.options.padded else count

    def buckets(self) -> list[int]:
        """The buckets that ``warm`` runs: powers of two and the largest, the largest first."""
        return sorted({min(1 << power, self.largest) for power in range(self.largest.bit_length() + 1)}, reverse=True)

    def check_golden(self) -> None:
        """Run the manifest's golden samples. Raises GoldenError naming the row that is off."""
        samples = golden_samples(self.manifest)
        if problem := golden_difference(self.manifest, samples.pixels, self.compute(samples.latents, samples.labels).pixels):
            raise GoldenError(f"model {self.manifest.name}/{self.manifest.version} on {self.provider}: {problem}")

    def warm(self) -> None:
        """Run every bucket, the largest first, so that the device's memory is taken once; capture graphs if asked for."""
        for bucket in self.buckets():
            for want_images in (True, False):
                self.latents(bucket)[:] = 0
                self.run(bucket, want_images)
            if self.options.cuda_graphs and self.provider == "cuda":
                self._capture(bucket)

    def _capture(self, bucket: int) -> None:
        """Capture a bucket's graph and believe in it only if it answers two different inputs as a plain run does."""
        binding = self._binding(bucket, PIXELS)
        shape = (self.manifest.latent_size, self.manifest.labels)
        inputs = [draw_span(Span(seed, 0, bucket), *shape) for seed in (1, 2)]
        expected = [self.compute(*rows).pixels for rows in inputs]
        where = f"{self.manifest.name}/{self.manifest.version}, batch of {bucket}"
        problem = None
        try:
            with CAPTURE_GATE.capture():
                binding.run(graph_id=bucket)
            self.captures[bucket] = True
            for rows, pixels in zip(inputs, expected, strict=True):
                problem = problem or golden_difference(self.manifest, pixels, self.compute(*rows).pixels)
        except Exception as error:  # ONNX Runtime raises a dozen kinds with no common base
            problem = str(error).partition("\n")[0][:300] or type(error).__name__
        if problem is not None:
            log.warning("%s: runs without a CUDA graph (%s)", where, problem)
        self.captures[bucket] = problem is None

    def _not_during_a_capture(self) -> AbstractContextManager[None]:
        """A block that uses the device; on the CPU there is nothing to keep apart."""
        return CAPTURE_GATE.run() if self.provider == "cuda" else nullcontext()

    def _binding(self, bucket: int, outputs: tuple[str, ...]) -> Binding:
        binding = self._bindings.get((bucket, outputs))
        if binding is None:
            binding = self._bindings[bucket, outputs] = Binding(self._session, self._buffers, bucket, outputs)
        return binding


def choose_provider(wanted: str) -> Provider:
    """Settle ``auto|cpu|cuda`` for this machine. Raises ProviderError when CUDA was asked for and is not there."""
    if wanted == "cpu":
        return "cpu"
    reason = _cuda_missing()
    if reason is None:
        return "cuda"
    if wanted == "cuda":
        raise ProviderError(f"--provider cuda: {reason}; install the CUDA extra and a driver, or use --provider cpu")
    log.warning("provider auto: serving on the CPU, because %s", reason)
    return "cpu"


class GoldenSamples(NamedTuple):
    """The golden latents (n, z), a conditional model's labels (n,), and the pixels (n, 28, 28) that eager PyTorch made."""

    latents: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    pixels: NDArray[np.uint8]


def golden_samples(manifest: Manifest) -> GoldenSamples:
    """The manifest's golden samples as arrays."""
    golden = manifest.golden
    return GoldenSamples(
        np.frombuffer(golden.latents, "<f4").astype(np.float32).reshape(golden.count, manifest.latent_size),
        np.frombuffer(golden.labels, "<i8").astype(np.int64) if manifest.labels else None,
        np.frombuffer(golden.pixels, np.uint8).reshape(golden.count, manifest.height, manifest.width),
    )


def golden_difference(manifest: Manifest, expected: NDArray[np.uint8], got: NDArray[np.uint8]) -> str | None:
    """What is wrong with ``got`` (n, 28, 28) beside ``expected``, in words; None when it is within tolerance."""
    if got.shape != expected.shape:
        return f"golden samples came out as {got.shape}, not {expected.shape}"
    tolerance = manifest.tolerance
    levels = np.abs(got.astype(np.int16) - expected.astype(np.int16))
    worst = int(levels.max())
    identical = float((levels == 0).mean())
    if worst > tolerance.pixel_levels or identical < tolerance.pixel_identical_share:
        row = int(levels.reshape(len(levels), -1).sum(axis=1).argmax())
        return (
            f"golden sample {row} differs by up to {worst} levels ({identical:.2%} of all pixels identical); "
            f"allowed are {tolerance.pixel_levels} and {tolerance.pixel_identical_share:.2%}"
        )
    return None


def _cuda_missing() -> str | None:
    """Why CUDA cannot be used here, as far as that shows before a session is made; None when nothing speaks against it."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        return "this ONNX Runtime is built without CUDA"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed here (libcuda.so.1 is missing)"
    ort.preload_dlls()  # finds CUDA and cuDNN in the pip packages
    return None


def _open_session(model: bytes, manifest: Manifest, chosen: EngineOptions) -> ort.InferenceSession:
    provider = chosen.provider
    options = ort.SessionOptions()
    options.intra_op_num_threads = chosen.intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning workers fight the event loop for the cores, and cost a whole one at no traffic.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [CPU_PROVIDER]
    if provider == "cuda":
        # A node that cannot run on CUDA must fail here, not move to the CPU in silence (onnxruntime #23372).
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        own = {**DEFAULT_CUDA_OPTIONS, **chosen.cuda_options, "enable_cuda_graph": "1" if chosen.cuda_graphs else "0"}
        providers = [(CUDA_PROVIDER, own)]
    name = f"model {manifest.name}/{manifest.version}"
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime raises a dozen kinds with no common base
        first_line = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        if provider == "cuda":
            raise ProviderError(f"{name} cannot run whole on CUDA: {first_line}") from None
        raise BundleError(f"{name}: ONNX Runtime cannot load it ({first_line}); export the model again") from None
    taken = session.get_providers()[0]
    if taken != PROVIDER_NAMES[provider]:
        raise ProviderError(f"{name}: asked for {provider}, but ONNX Runtime took {taken}; use --provider cpu or mend CUDA")
    return session


def _buffers(manifest: Manifest, largest: int, provider: Provider) -> Buffers:
    try:
        return Buffers(manifest, largest, provider == "cuda")
    except Exception as error:  # ONNX Runtime and the driver raise a dozen kinds with no common base
        first_line = str(error).partition("\n")[0][:300] or type(error).__name__
        raise ProviderError(
            f"model {manifest.name}/{manifest.version}: no memory on {provider} for batches of {largest} ({first_line}); "
            "name a smaller --max-batch-size"
        ) from None


def _check_signature(session: ort.InferenceSession, manifest: Manifest) -> None:
    inputs = {item.name: (item.type, item.shape) for item in session.get_inputs()}
    outputs = {item.name: (item.type, item.shape) for item in session.get_outputs()}
    where = f"model {manifest.name}/{manifest.version}"
    taken: dict[str, Any] = {"latents": ("tensor(float)", [manifest.latent_size])}
    if manifest.labels:
        taken["labels"] = ("tensor(int64)", [])
    if {name: (kind, shape[1:]) for name, (kind, shape) in inputs.items()} != taken:
        labels = " and labels int64 [batch]" if manifest.labels else ""
        raise BundleError(
            f"{where} has inputs {inputs}, not latents float32 [batch, {manifest.latent_size}]{labels}; export again"
        )
    wanted = {
        "images": ("tensor(float)", [1, manifest.height, manifest.width]),
        "pixels": ("tensor(uint8)", [manifest.height, manifest.width]),
    }
    if {name: (kind, shape[1:]) for name, (kind, shape) in outputs.items()} != wanted:
        raise BundleError(f"{where} has outputs {outputs}, not images and pixels as the manifest says; export again")
    batch_axes = [shape[0] for _, shape in (*inputs.values(), *outputs.values())]
    if any(isinstance(axis, int) for axis in batch_axes):
        raise BundleError(f"{where} has a fixed batch axis {batch_axes}; export it with a symbolic one")
