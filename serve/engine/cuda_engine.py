"""The engine on CUDA: fixed buffers, batches padded to buckets, one captured graph for each bucket.

An engine belongs to the thread that made it: CUDA graphs cannot be replayed from several threads (onnxruntime #18806).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from serve.engine.cuda import CAPTURE_GATE, Device
from serve.engine.device_buffers import NO_GRAPH, Binding, DeviceBuffers
from serve.engine.golden import golden_difference
from serve.engine.provider import EngineOptions
from serve.engine.session import PIXELS, PIXELS_AND_IMAGES, Arrays, Engine
from serve.errors import ProviderError
from serve.latents import Span, draw_span
from serve.manifest import Manifest

log = logging.getLogger(__name__)


class CudaEngine(Engine):
    """A loaded model for batches of up to ``largest`` rows. Raises ProviderError or BundleError when it cannot be loaded.

    A batch is run in the smallest bucket that holds it, each with a fixed binding and, if asked for, a captured graph.
    ``device`` is where the buffers are; tests put them into host memory, beside a session on the CPU.
    """

    def __init__(
        self, model: bytes, manifest: Manifest, options: EngineOptions, largest: int, device: Device | None = None
    ) -> None:
        with CAPTURE_GATE.run():
            super().__init__(model, manifest, options, largest)
            self._buffers = _buffers(manifest, largest, device or Device())
        self.captures: dict[int, bool] = {}  # bucket → whether its graph was captured and replays rightly
        self._bindings: dict[tuple[int, tuple[str, ...]], Binding] = {}

    def allocate(self, count: int) -> dict[str, NDArray[Any]]:
        """The page-locked input buffers themselves: what is filled in place need not be copied on the host."""
        return {name: self._buffers.host[name][:count] for name in self._buffers.inputs}

    def run(self, feeds: Arrays, outputs: Sequence[str] = PIXELS) -> dict[str, NDArray[Any]]:
        """As ``Engine.run``, for at most ``largest`` rows. The arrays returned are never written again."""
        count = len(feeds["latents"])
        bucket = self.bucket(count)
        for name in self._buffers.inputs:
            host = self._buffers.host[name]
            if feeds[name].ctypes.data != host.ctypes.data:
                host[:count] = feeds[name]
            host[count:bucket] = 0
        replay = self.captures.get(bucket, False) and "images" not in outputs
        with CAPTURE_GATE.run():  # the copies as well: a synchronous one elsewhere breaks a capture
            self._buffers.upload(bucket)
            self._binding(bucket, PIXELS_AND_IMAGES if "images" in outputs else PIXELS).run(bucket if replay else NO_GRAPH)
            return {name: self._buffers.download(name, count) for name in outputs}

    def warm(self) -> dict[int, bool]:
        """Run every bucket, the largest first, so that the device's memory is taken once; capture graphs if asked for."""
        for bucket in self.buckets():
            feeds = self.blank(bucket)
            for outputs in (PIXELS_AND_IMAGES, PIXELS):
                self.run(feeds, outputs)
            if self.options.cuda_graphs:
                self._capture(bucket)
        return self.captures

    def _capture(self, bucket: int) -> None:
        """Capture a bucket's graph and use it only if it answers two different inputs as a plain run does.

        A replay once returned the first result for ever (onnxruntime #20050).
        """
        binding = self._binding(bucket, PIXELS)
        shape = (self.manifest.latent_size, self.manifest.labels)
        inputs = [draw_span(Span(seed, 0, bucket), *shape) for seed in (1, 2)]
        expected = [self.compute(*rows)["pixels"] for rows in inputs]
        where = f"{self.manifest.name}/{self.manifest.version}, batch of {bucket}"
        problem = None
        try:
            with CAPTURE_GATE.capture():
                binding.run(graph_id=bucket)
            self.captures[bucket] = True
            for rows, pixels in zip(inputs, expected, strict=True):
                problem = problem or golden_difference(self.manifest, pixels, self.compute(*rows)["pixels"])
        except Exception as error:  # ONNX Runtime raises a dozen kinds with no common base
            problem = str(error).partition("\n")[0][:300] or type(error).__name__
        if problem is not None:
            log.warning("%s: runs without a CUDA graph (%s)", where, problem)
        self.captures[bucket] = problem is None

    def _binding(self, bucket: int, outputs: tuple[str, ...]) -> Binding:
        binding = self._bindings.get((bucket, outputs))
        if binding is None:
            binding = self._bindings[bucket, outputs] = Binding(self._session, self._buffers, bucket, outputs)
        return binding


def _buffers(manifest: Manifest, largest: int, device: Device) -> DeviceBuffers:
    try:
        return DeviceBuffers(manifest, largest, device)
    except Exception as error:  # ONNX Runtime and the driver raise a dozen kinds with no common base
        first_line = str(error).partition("\n")[0][:300] or type(error).__name__
        raise ProviderError(
            f"model {manifest.name}/{manifest.version}: no memory on {device.name} for batches of {largest} ({first_line}); "
            "name a smaller --max-batch-size"
        ) from None
