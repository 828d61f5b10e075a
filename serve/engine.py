"""One ONNX Runtime session and the runs through it. Knows neither the queue nor gRPC.

Export's parity check runs through this very class, so what is proven there is what serves here.
A session belongs to the thread that made it: CUDA graphs cannot be replayed from several threads.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from serve.errors import BundleError, GoldenError, ProviderError
from serve.manifest import Manifest

log = logging.getLogger(__name__)

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
PROVIDER_NAMES = {"cpu": CPU_PROVIDER, "cuda": CUDA_PROVIDER}

Provider = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Outputs:
    """What one run gives: ``pixels`` uint8 (n, 28, 28), and ``images`` float32 (n, 1, 28, 28) if asked for."""

    pixels: NDArray[np.uint8]
    images: NDArray[np.float32] | None


class Engine:
    """A loaded model on one provider. Raises ProviderError or BundleError when it cannot be loaded as asked."""

    def __init__(self, model: bytes, manifest: Manifest, provider: Provider, intra_op_threads: int) -> None:
        self.manifest = manifest
        self.provider = provider
        self._session = _open_session(model, manifest, provider, intra_op_threads)
        _check_signature(self._session, manifest)

    def run(self, latents: NDArray[np.float32], want_images: bool = False) -> Outputs:
        """Run ``latents`` (n, z) through the model. The arrays returned are new ones, never written again."""
        if want_images:
            pixels, images = self._session.run(["pixels", "images"], {"latents": latents})
            return Outputs(pixels, images)
        return Outputs(self._session.run(["pixels"], {"latents": latents})[0], None)

    def check_golden(self) -> None:
        """Run the manifest's golden samples. Raises GoldenError naming the row that is off."""
        latents, expected = golden_samples(self.manifest)
        if problem := golden_difference(self.manifest, expected, self.run(latents).pixels):
            raise GoldenError(f"model {self.manifest.name}/{self.manifest.version} on {self.provider}: {problem}")

    def warm(self, largest: int) -> None:
        """Run every power of two up to ``largest``, the largest first: what a size costs once is paid here."""
        size = largest
        while size:
            self.run(np.zeros((size, self.manifest.latent_size), np.float32))
            size = size // 2 if size & (size - 1) == 0 else 1 << (size.bit_length() - 1)


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


def golden_samples(manifest: Manifest) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The golden latents (n, z) and the pixels (n, 28, 28) that eager PyTorch made of them."""
    count = manifest.golden.count
    latents = np.frombuffer(manifest.golden.latents, "<f4").astype(np.float32).reshape(count, manifest.latent_size)
    pixels = np.frombuffer(manifest.golden.pixels, np.uint8).reshape(count, manifest.height, manifest.width)
    return latents, pixels


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


def _open_session(model: bytes, manifest: Manifest, provider: Provider, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning workers fight the event loop for the cores, and cost a whole one at no traffic.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [CPU_PROVIDER]
    if provider == "cuda":
        # A node that cannot run on CUDA must fail here, not move to the CPU in silence (onnxruntime #23372).
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        providers = [(CUDA_PROVIDER, {"use_tf32": "0"})]
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


def _check_signature(session: ort.InferenceSession, manifest: Manifest) -> None:
    inputs = [(item.name, item.type, item.shape) for item in session.get_inputs()]
    outputs = {item.name: (item.type, item.shape) for item in session.get_outputs()}
    where = f"model {manifest.name}/{manifest.version}"
    if [(name, kind, shape[1:]) for name, kind, shape in inputs] != [("latents", "tensor(float)", [manifest.latent_size])]:
        raise BundleError(f"{where} has inputs {inputs}, not latents float32 [batch, {manifest.latent_size}]; export again")
    wanted = {
        "images": ("tensor(float)", [1, manifest.height, manifest.width]),
        "pixels": ("tensor(uint8)", [manifest.height, manifest.width]),
    }
    if {name: (kind, shape[1:]) for name, (kind, shape) in outputs.items()} != wanted:
        raise BundleError(f"{where} has outputs {outputs}, not images and pixels as the manifest says; export again")
    batch_axes = [inputs[0][2][0], *(shape[0] for _, shape in outputs.values())]
    if any(isinstance(axis, int) for axis in batch_axes):
        raise BundleError(f"{where} has a fixed batch axis {batch_axes}; export it with a symbolic one")
