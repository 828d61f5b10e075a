"""The engine on CUDA: fixed buffers, batches padded to buckets, one captured graph per bucket, all in one stream.

The copies and the run of a batch are put into the engine's own stream, in order, with one wait at the end. So two
engines on a device keep it busy without waiting for each other. An engine belongs to the thread that made it: CUDA graphs
cannot be replayed from several threads (onnxruntime #18806).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.cuda import Device
from serve.engine.device_buffers import NO_GRAPH, Binding, DeviceBuffers
from serve.engine.device_latents import DeviceLatents
from serve.engine.golden import golden_difference
from serve.engine.provider import CUDA_FAILURE, OUT_OF_MEMORY, EngineOptions, described
from serve.engine.session import PIXELS, PIXELS_AND_IMAGES, Arrays, Engine
from serve.errors import DeviceLostError, EngineError, OutOfMemoryError, ProviderError
from serve.latents import INDEX_LIMIT, SEED_LIMIT, LatentReader, Span, draw_span
from serve.manifest import Manifest

log = logging.getLogger(__name__)

OUTPUT_SETS = (PIXELS_AND_IMAGES, PIXELS)
# Of the rows that drawing on the device is tried with.
TRUNCATION_TRIED = 0.7
INDEX_STEP = 0x1F2E3D4C5B6A7989
Rows = tuple[NDArray[np.float32], NDArray[np.int64] | None]  # latents, and labels of a conditional model


class CudaEngine(Engine):
    """A loaded model for batches of up to ``largest`` rows. Raises ProviderError or BundleError when it cannot be loaded.

    A batch is run in the smallest bucket that holds it, each with a fixed binding and, if asked for, a captured graph.
    ``device`` is where the buffers are; tests put them into host memory, beside a session on the CPU.
    """

    launches_ahead = True

    def __init__(
        self, model: bytes, manifest: Manifest, options: EngineOptions, largest: int, device: Device | None = None
    ) -> None:
        self._device = device or Device(options.device)
        self.waits_after_run = True  # after the run as well, until ``warm`` has seen that the stream's order is enough
        self._stream = self._device.open_stream()
        try:
            super().__init__(model, manifest, replace(options, compute_stream=self._stream), largest)
            self._buffers = _buffers(manifest, largest, self._device, self._stream)
        except BaseException:
            self.__dict__.pop("_session", None)  # before its stream
            with suppress(EngineError):  # a lost device's: what is to be told is why it was lost
                self._device.close_stream(self._stream)
            raise
        # Bucket → whether its graphs, with and without the float32 images, were captured and replay rightly.
        self.captures: dict[int, bool] = {}
        self.drawing: DeviceLatents | None = None  # until ``warm`` has seen that it draws the host's bits
        self._drawn: Arrays | None = None  # feeds whose latents the device is to draw
        self._bindings: dict[tuple[int, tuple[str, ...]], Binding] = {}

    @property
    def draws_latents(self) -> bool:
        return self.drawing is not None

    def allocate(self, count: int) -> dict[str, NDArray[Any]]:
        """The page-locked input buffers themselves: what is filled in place need not be copied on the host."""
        return {name: self._buffers.host[name][:count] for name in self._buffers.inputs}

    def assemble(self, reader: LatentReader, spans: Sequence[Span], count: int) -> dict[str, NDArray[Any]]:
        """As ``Engine.assemble``. What the device draws has its labels after ``run``, and its latents never."""
        if self.drawing is None or any(span.explicit is not None for span in spans):
            return super().assemble(reader, spans, count)
        self.drawing.fill(spans)
        self._drawn = self.allocate(count)
        return self._drawn

    def run(self, feeds: Arrays, outputs: Sequence[str] = PIXELS) -> dict[str, NDArray[Any]]:
        """As ``Engine.run``, for at most ``largest`` rows. The arrays returned are never written again."""
        return self.launch(feeds, outputs)()

    def launch(self, feeds: Arrays, outputs: Sequence[str] = PIXELS) -> Callable[[], dict[str, NDArray[Any]]]:
        """As ``Engine.launch``. What an earlier run returned may be read meanwhile; its feeds may not."""
        count = len(feeds["latents"])
        bucket = self.bucket(count)
        drawing = self.drawing if feeds is self._drawn else None
        self._drawn = None
        inputs = self._buffers.inputs if drawing is None else ()
        for name in inputs:
            host = self._buffers.host[name]
            if feeds[name].ctypes.data != host.ctypes.data:
                host[:count] = feeds[name]
            host[count:bucket] = 0
        wanted = PIXELS_AND_IMAGES if "images" in outputs else PIXELS
        graph = _graph_id(bucket, wanted) if self.captures.get(bucket) else NO_GRAPH
        try:
            self._buffers.upload(inputs, bucket)
            if drawing is not None:
                self._draw(drawing, bucket)
            self._binding(bucket, wanted).run(graph, wait=self.waits_after_run)
            taken = self._buffers.download(outputs, count)
        except Exception as error:  # ONNX Runtime raises a dozen kinds with no common base
            raise self._meant(error) from None
        return partial(self._answers, taken, count)

    def _answers(self, taken: Arrays, count: int) -> dict[str, NDArray[Any]]:
        try:
            return self._buffers.answers(taken, count)
        except EngineError as error:
            raise self._meant(error) from None

    def _meant(self, error: Exception) -> Exception:
        """What a run's error is: memory that lacked, a lost device, or itself."""
        where = f"{self.manifest.name}/{self.manifest.version}"
        if isinstance(error, OutOfMemoryError) or OUT_OF_MEMORY.search(str(error)):
            return OutOfMemoryError(f"{where}: {described(error)}")
        if isinstance(error, EngineError):  # a copy
            return DeviceLostError(f"{where} on CUDA: {error}")
        if CUDA_FAILURE.search(str(error)):
            return DeviceLostError(f"{where}: {described(error)}")
        return error

    def _draw(self, drawing: DeviceLatents, rows: int) -> None:
        """Put the drawing of latents into the stream, and the way back of the labels that come of it."""
        labelled = "labels" in self._buffers.inputs
        labels = self._buffers.address("labels") if labelled else 0
        drawing.launch(rows, self._buffers.address("latents"), labels)
        if labelled:
            self._buffers.fetch("labels", rows)

    def close(self) -> None:
        """As ``Engine.close``. A lost device takes nothing back: its process ends."""
        self._bindings.clear()
        self._buffers.release()
        if self.drawing is not None:
            self.drawing.release()
        del self._session
        with suppress(EngineError):
            self._device.close_stream(self._stream)

    def warm(self) -> dict[int, bool]:
        """Run every bucket, the largest first, so that the device's memory is taken once; capture graphs if asked for."""
        for bucket in self.buckets():
            feeds = self.blank(bucket)
            for outputs in OUTPUT_SETS:
                self.run(feeds, outputs)
        self._stop_waiting()
        if self.options.device_latents:
            self._begin_drawing()
        for bucket in self.buckets():
            if self.options.cuda_graphs:
                self._capture(bucket)
        return self.captures

    def _stop_waiting(self) -> None:
        """Leave out the wait after a run if every bucket answers two different inputs without it as it does with it."""
        for bucket in self.buckets():
            self.waits_after_run = True
            samples = self._samples(bucket)
            self.waits_after_run = False
            # In turn and twice: what is too early is the answer before.
            if problem := self._problem(samples) or self._problem(samples):
                where = f"{self.manifest.name}/{self.manifest.version}, batch of {bucket}"
                log.warning("%s: every run is waited for (%s)", where, problem)
                self.waits_after_run = True
                return

    def _begin_drawing(self) -> None:
        """Have the device draw latents from here on, if it draws the very bits that the host does."""
        shape = (self.manifest.latent_size, self.manifest.labels)
        drawing = None
        try:
            drawing = DeviceLatents(self._device, self.largest, *shape, self._stream)
            problem = self._drawing_problem(drawing, LatentReader(*shape))
        except Exception as error:  # ONNX Runtime raises a dozen kinds with no common base
            problem = described(error)
        if problem is None:
            self.drawing = drawing
            return
        if drawing is not None:
            drawing.release()
        self._check_device(problem)
        log.warning("%s/%s: the host draws latents (%s)", self.manifest.name, self.manifest.version, problem)

    def _check_device(self, problem: str) -> None:
        """Raises DeviceLostError when what failed took the device with it: such an error stays, and waiting raises it again."""
        try:
            self._device.wait(self._stream)
        except EngineError as error:
            raise DeviceLostError(f"{self.manifest.name}/{self.manifest.version} on CUDA: {error}, after {problem}") from None

    def _drawing_problem(self, drawing: DeviceLatents, reader: LatentReader) -> str | None:
        """How the device's latents and labels differ from the host's: of seeds and indices of every size, truncated and not."""
        highest = self.manifest.labels - 1
        for bucket in self.buckets():
            for truncation in (0.0, TRUNCATION_TRIED):
                spans = [
                    Span(SEED_LIMIT - 1 - row, (row * INDEX_STEP) % INDEX_LIMIT, 1, None, None, truncation)
                    for row in range(bucket)
                ]
                if self.manifest.labels:
                    spans[0] = Span(1, 0, 1, None, np.array([highest]), truncation)
                expected = {name: array.copy() for name, array in self.assemble(reader, spans, bucket).items()}
                got = self.blank(bucket)
                drawing.fill(spans)
                self._draw(drawing, bucket)
                self._buffers.fetch("latents", bucket)
                self._device.wait(self._stream)
                for name, array in expected.items():
                    if array.tobytes() != got[name].tobytes():
                        return f"in a batch of {bucket} the device draws other {name}"
        return None

    def _samples(self, bucket: int) -> list[tuple[Rows, NDArray[Any]]]:
        """Two different inputs of a bucket's size, and the pixels that the engine as it is now makes of each."""
        shape = (self.manifest.latent_size, self.manifest.labels)
        inputs = [draw_span(Span(seed, 0, bucket), *shape) for seed in (1, 2)]
        return [(rows, self.compute(*rows)["pixels"]) for rows in inputs]

    def _problem(self, samples: list[tuple[Rows, NDArray[Any]]]) -> str | None:
        """How the engine's answers, with and without the float32 images, differ from the samples'. Raises DeviceLostError."""
        try:
            for rows, pixels in samples:
                for wanted in OUTPUT_SETS:
                    if problem := golden_difference(self.manifest, pixels, self.compute(*rows, wanted)["pixels"]):
                        return problem
        except DeviceLostError:
            raise
        except Exception as error:  # ONNX Runtime raises a dozen kinds with no common base
            return described(error)
        return None

    def _capture(self, bucket: int) -> None:
        """Capture a bucket's graphs and use them only if they answer two different inputs as plain runs do.

        A replay once returned the first result for ever (onnxruntime #20050).
        """
        samples = self._samples(bucket)
        where = f"{self.manifest.name}/{self.manifest.version}, batch of {bucket}"
        try:
            for wanted in OUTPUT_SETS:
                self._binding(bucket, wanted).run(_graph_id(bucket, wanted))
            self.captures[bucket] = True
            problem = self._problem(samples)
        except DeviceLostError:
            raise
        except Exception as error:  # ONNX Runtime raises a dozen kinds with no common base
            problem = described(error)
        self.captures[bucket] = problem is None
        if problem is not None:
            self._check_device(problem)
            log.warning("%s: runs without a CUDA graph (%s)", where, problem)

    def _binding(self, bucket: int, outputs: tuple[str, ...]) -> Binding:
        binding = self._bindings.get((bucket, outputs))
        if binding is None:
            binding = self._bindings[bucket, outputs] = Binding(self._session, self._buffers, bucket, outputs)
        return binding


def _graph_id(bucket: int, outputs: tuple[str, ...]) -> int:
    """A number of its own for each graph of a session: two for each bucket."""
    return 2 * bucket + ("images" in outputs)


def _buffers(manifest: Manifest, largest: int, device: Device, stream: int) -> DeviceBuffers:
    try:
        return DeviceBuffers(manifest, largest, device, stream)
    except Exception as error:  # ONNX Runtime and the driver raise a dozen kinds with no common base
        raise ProviderError(
            f"model {manifest.name}/{manifest.version}: no memory on {device.name} for batches of {largest} "
            f"({described(error)}); name a smaller --max-batch-size"
        ) from None


def make_engine(model: bytes, manifest: Manifest, options: EngineOptions, largest: int) -> Engine:
    """A loaded model where ``options`` say, for batches of up to ``largest`` rows. Raises ProviderError or BundleError."""
    kind = CudaEngine if options.provider == "cuda" else Engine
    return kind(model, manifest, options, largest)


def make_checked_engine(model: bytes, manifest: Manifest, options: EngineOptions, largest: int) -> Engine:
    """As ``make_engine``, past its golden check; closed if that fails. Raises ProviderError or BundleError."""
    engine = make_engine(model, manifest, options, largest)
    with engine.closed_if_it_fails():
        engine.check_golden()
    return engine
