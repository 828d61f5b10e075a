"""An ONNX Runtime session and its runs: arrays in, arrays out. Knows neither the queue nor a transport.

Export's parity check runs through this class too, so it checks exactly what is served. ``Manifest.inputs`` and
``Manifest.outputs`` have the names, types and shapes of the arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.golden import batch_difference, golden_difference, golden_samples
from serve.engine.graph import check_graph
from serve.engine.onnx_runtime import ort
from serve.engine.provider import CPU_PROVIDER, CUDA_PROVIDER, PROVIDER_NAMES, EngineOptions, described
from serve.errors import BundleError, GoldenError, ProviderError
from serve.latents import LatentReader, Span
from serve.manifest import Manifest, TensorSpec

Array = NDArray[Any]
Arrays = Mapping[str, Array]

SAMPLE_SEED = 3
PIXELS = ("pixels",)
PIXELS_AND_IMAGES = ("pixels", "images")
ODD = 7  # a batch's size that no kernel is made for

# TF32 is off because parity is proven without it. It is no guarantee: where no plan of cuDNN's builds without, ONNX Runtime tries
# again with TF32 (conv_transpose.cc, conv.cc), which moves 1 % of the pixels by a level; the golden check, of every bucket,
# allows a tenth of that.
# The arena grows by what is asked for, not by doubling: buckets are warmed from the largest down, so it grows once.
DEFAULT_CUDA_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


class Engine:
    """A loaded model on the CPU. Raises ProviderError or BundleError when it cannot be loaded.

    Any number of threads may run it at once: they share one session, and so its weights and its arena. ``largest`` is the
    most rows that ``compute`` puts into one run. Batches are not padded unless ``pad_to_powers`` is set, because on a CPU
    padding costs what computing costs.
    """

    launches_ahead = False  # a run on a CPU is the calling thread's own work

    def __init__(self, model: bytes, manifest: Manifest, options: EngineOptions, largest: int) -> None:
        self.manifest = manifest
        self.options = options
        self.largest = largest
        self._session = open_session(model, manifest, options)

    @property
    def draws_latents(self) -> bool:
        """Whether the device draws what ``assemble`` asks for."""
        return False

    def allocate(self, count: int) -> dict[str, Array]:
        """Arrays for the inputs of a run of ``count`` rows, to be filled and given to ``run``."""
        return {spec.name: np.empty((count, *spec.shape), spec.dtype) for spec in self.manifest.inputs}

    def assemble(self, reader: LatentReader, spans: Sequence[Span], count: int) -> dict[str, Array]:
        """What ``run`` takes for the spans' rows, ``count`` in all, with their labels."""
        feeds = self.allocate(count)
        reader.fill(feeds["latents"], spans, feeds.get("labels"))
        return feeds

    def run(self, feeds: Arrays, outputs: Sequence[str] = PIXELS) -> dict[str, Array]:
        """Run once. ``feeds`` holds every input, (n, ...); returns the ``outputs`` asked for, (n, ...), as new arrays.

        Labels must be in range: nothing checks them after this.
        """
        count = len(feeds["latents"])
        bucket = self.bucket(count)
        if bucket != count:
            feeds = {name: _padded(array, bucket) for name, array in feeds.items()}
        arrays = self._session.run(outputs, feeds)
        return {name: array[:count] for name, array in zip(outputs, arrays, strict=True)}

    def launch(self, feeds: Arrays, outputs: Sequence[str] = PIXELS) -> Callable[[], Arrays]:
        """As ``run``, in two: launched here, and waited for by what is returned, in this thread and before the next launch."""
        return partial(self.run, feeds, outputs)

    def compute(
        self, latents: NDArray[np.float32], labels: NDArray[np.int64] | None = None, outputs: Sequence[str] = PIXELS
    ) -> dict[str, Array]:
        """Run any number of rows (n, z), in pieces if they are more than ``largest``.

        ``labels`` (n,) are a conditional model's, which must have them. Raises ValueError otherwise.
        """
        if (labels is not None) != bool(self.manifest.labels):
            raise ValueError(f"model {self.manifest.name} takes {self.manifest.labels} labels")
        return self._in_pieces(self.largest, latents, labels, outputs)

    def _in_pieces(
        self, size: int, latents: NDArray[np.float32], labels: NDArray[np.int64] | None, outputs: Sequence[str]
    ) -> dict[str, Array]:
        given: dict[str, Array] = {"latents": latents} if labels is None else {"latents": latents, "labels": labels}
        pieces = []
        for first in range(0, len(latents), size):
            pieces.append(self.run({name: array[first : first + size] for name, array in given.items()}, outputs))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in outputs}

    def bucket(self, count: int) -> int:
        """The rows that are computed for a batch of ``count``."""
        return self.options.bucket(count, self.largest, self.manifest.cuda_buckets)

    @property
    def pads(self) -> bool:
        """Whether batches are padded to buckets."""
        return self.options.provider == "cuda" or self.options.pad_to_powers

    def buckets(self) -> list[int]:
        """The buckets that ``warm`` runs, the largest first: where batches are not padded, powers of two and the largest."""
        powers = [1 << power for power in range(self.largest.bit_length())]
        counts = range(1, self.largest + 1) if self.pads else (*powers, self.largest)
        return sorted({self.bucket(count) for count in counts}, reverse=True)

    def nodes_by_provider(self) -> dict[str, int]:
        """How many of the graph's nodes each execution provider has; of an engine that was made with ``record_assignment``."""
        return dict(
            Counter(part.ep_name for part in self._session.get_provider_graph_assignment_info() for _ in part.get_nodes())
        )

    def close(self) -> None:
        """Release what the engine holds, in the thread that made it. It is not used after that."""

    @contextmanager
    def closed_if_it_fails(self) -> Iterator[None]:
        """Close the engine when the block raises: the traceback holds it, and so what it holds on the device, for long."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def check_golden(self) -> None:
        """Run the manifest's golden samples; where batches are padded in every bucket, for each has kernels of its own. Raises
        GoldenError naming the model, the provider, the batch and the row that is off."""
        manifest, samples = self.manifest, golden_samples(self.manifest)
        count = len(samples.latents)
        for size in self.buckets() if self.pads else [min(count, self.largest)]:
            rows = np.arange(max(size, count)) % count
            labels = None if samples.labels is None else samples.labels[rows]
            got = self._in_pieces(size, samples.latents[rows], labels, PIXELS)["pixels"]
            if problem := golden_difference(manifest, samples.pixels[rows], got):
                where = f"model {manifest.name}/{manifest.version} on {self.options.provider}, batches of {size}"
                raise GoldenError(f"{where}: {problem}")

    def batch_difference(self) -> str | None:
        """How a digit's float32 bits depend on its batch; None when they do not: alone, in an odd batch and in the largest.

        Where batches are padded every bucket has kernels of its own, and is tried.
        """
        odd = min(ODD, self.largest)
        sizes = {1, odd, self.largest}
        if self.pads:
            sizes.update(self.buckets())

        def images(latents: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.float32]:
            return self.compute(latents, labels, PIXELS_AND_IMAGES)["images"]

        return batch_difference(self.manifest, images, sizes)

    def blank(self, count: int) -> dict[str, Array]:
        """As ``allocate``, filled with zeros: something to run when it does not matter what."""
        feeds = self.allocate(count)
        for array in feeds.values():
            array[:] = 0
        return feeds

    def sample(self, count: int) -> dict[str, Array]:
        """As ``allocate``, filled with drawn latents: what a run is timed with. Zeros leave units and pages untouched."""
        feeds = self.allocate(count)
        reader = LatentReader(self.manifest.latent_size, self.manifest.labels)
        reader.fill(feeds["latents"], [Span(SAMPLE_SEED, 0, count)], feeds.get("labels"))
        return feeds

    def warm(self) -> dict[int, bool]:
        """Run every bucket once, the largest first. Returns which graphs were captured, by bucket: none on a CPU."""
        for bucket in self.buckets():
            for outputs in (PIXELS_AND_IMAGES, PIXELS):
                self.run(self.blank(bucket), outputs)
        return {}


def open_session(model: bytes, manifest: Manifest, chosen: EngineOptions) -> ort.InferenceSession:
    """A session whose signature is the manifest's. Raises ProviderError, or BundleError for an unusable graph."""
    provider = chosen.provider
    options = ort.SessionOptions()
    options.intra_op_num_threads = chosen.intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning workers fight the event loop for the cores, and cost a whole one at no traffic.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if chosen.record_assignment:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers: list[Any] = [CPU_PROVIDER]
    if provider == "cuda":
        # A node that cannot run on CUDA must fail here, not move to the CPU in silence (onnxruntime #23372).
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        # Half precision is inexact already, and without it might run beside the matrix units; tf32x3 is made for them.
        tf32 = {"use_tf32": "0" if manifest.precision == "fp32" else "1"}
        own = {**DEFAULT_CUDA_OPTIONS, **tf32, **chosen.cuda_options, "enable_cuda_graph": "1" if chosen.cuda_graphs else "0"}
        own["device_id"] = str(chosen.device)
        if chosen.compute_stream:
            own["user_compute_stream"] = str(chosen.compute_stream)
        providers = [(CUDA_PROVIDER, own)]
    name = f"model {manifest.name}/{manifest.version}"
    check_graph(model, name)
    try:
        # Without its fallback: it would try the CPU by itself, and complain of that instead of what went wrong.
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises a dozen kinds with no common base
        if provider == "cuda":
            raise ProviderError(f"{name} cannot run whole on CUDA: {described(error)}") from None
        raise BundleError(f"{name}: ONNX Runtime cannot load it ({described(error)}); export the model again") from None
    taken = session.get_providers()[0]
    if taken != PROVIDER_NAMES[provider]:
        raise ProviderError(f"{name}: asked for {provider}, but ONNX Runtime took {taken}; use --provider cpu or mend CUDA")
    _check_signature(session, manifest)
    return session


_ONNX_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)", "uint8": "tensor(uint8)"}


def _check_signature(session: ort.InferenceSession, manifest: Manifest) -> None:
    where = f"model {manifest.name}/{manifest.version}"
    axes = []
    for kind, specs, nodes in (
        ("inputs", manifest.inputs, session.get_inputs()),
        ("outputs", manifest.outputs, session.get_outputs()),
    ):
        found = {node.name: (node.type, list(node.shape[1:])) for node in nodes}
        if found != {spec.name: (_ONNX_TYPES[spec.dtype], list(spec.shape)) for spec in specs}:
            wanted = ", ".join(_described(spec) for spec in specs)
            raise BundleError(f"{where} has {kind} {found}, not {wanted} as the manifest says; export again")
        axes += [node.shape[0] for node in nodes]
    if any(isinstance(axis, int) for axis in axes):
        raise BundleError(f"{where} has a fixed batch axis {axes}; export it with a symbolic one")


def _described(spec: TensorSpec) -> str:
    return f"{spec.name} {spec.dtype} [{', '.join(['batch', *map(str, spec.shape)])}]"


def _padded(array: Array, rows: int) -> Array:
    padding = np.zeros((rows - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, padding])
