"""Chooses the execution provider for this machine, and holds the options with which sessions run on it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from serve.engine import driver
from serve.engine.cuda import Device, load_libraries
from serve.engine.onnx_runtime import ort
from serve.errors import EngineError, ProviderError

log = logging.getLogger(__name__)

Provider = Literal["cpu", "cuda"]

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
# As ONNX Runtime's CUDA provider writes it: "CUDA failure 100: no CUDA-capable device is detected ; GPU=0 ; hostname=...".
CUDA_FAILURE = re.compile(r"CUDA failure (\d+): ([^;\n]+)")
# As its arena writes it, and cuBLAS, and cuDNN before and since version 9; what was lacking is memory, and the device goes on.
OUT_OF_MEMORY = re.compile(
    r"CUDA failure 2:|Failed to allocate memory[^\n]*|is smaller than requested bytes|_ALLOC_FAILED|_ALLOCATION_FAILED"
)
# Rows of a run on CUDA, where a bundle names no others.
CUDA_BUCKETS = (1, 8, 64, 512, 1024, 2048, 4096)
PROVIDER_NAMES = {"cpu": CPU_PROVIDER, "cuda": CUDA_PROVIDER}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a session runs. ``cuda_options`` are the CUDA provider's own, over the engine's defaults."""

    provider: Provider = "cpu"
    device: int = 0  # which CUDA device, of those that the process sees
    intra_op_threads: int = 1
    pad_to_powers: bool = False  # pad batches to powers of two; always so on CUDA
    cuda_graphs: bool = False
    device_latents: bool = False  # draw latents on the device
    compute_stream: int = 0  # a CUDA stream that all runs go into; 0: the session's own
    record_assignment: bool = False  # keep which provider has which node, for checks
    cuda_options: Mapping[str, str] = field(default_factory=dict)

    def bucket(self, count: int, largest: int, on_cuda: Sequence[int] = ()) -> int:
        """The rows that are computed for a batch of ``count``, at most ``largest``; on CUDA one of ``on_cuda``, in their order.

        There a bucket costs memory, time to capture and a convolution plan of its own, which is made anew whenever the size
        changes outside a graph (onnxruntime #23006).
        """
        if self.provider == "cuda":
            return next((size for size in on_cuda or CUDA_BUCKETS if count <= size < largest), largest)
        return min(largest, 1 << (count - 1).bit_length()) if self.pad_to_powers else count


def choose_provider(wanted: str, device: int = 0) -> Provider:
    """Settle ``auto|cpu|cuda`` for this machine. Raises ProviderError when CUDA was asked for and is not there."""
    if wanted == "cpu":
        return "cpu"
    reason = _cuda_missing(device)
    if reason is None:
        return "cuda"
    if wanted == "cuda":
        raise ProviderError(f"--provider cuda: {reason}; install the CUDA extra and a driver, or use --provider cpu")
    log.info("provider auto: on the CPU, because %s", reason)
    return "cpu"


def _cuda_missing(device: int) -> str | None:
    """Why CUDA cannot be used here, as far as that shows before a session is made; None when nothing speaks against it."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        return "this ONNX Runtime is built without CUDA"
    if reason := driver.why_unusable(device):
        return reason
    try:
        Device(device).memory_total_bytes()
        load_libraries()
    except (EngineError, ProviderError) as error:
        return f"its device cannot be used: {error}"
    return None


def described(error: Exception) -> str:
    """What ONNX Runtime raised, in one line: CUDA's own failure where its text holds one."""
    if found := CUDA_FAILURE.search(str(error)):
        return f"CUDA failure {found[1]}: {found[2].strip()}"
    if (found := OUT_OF_MEMORY.search(str(error))) and found[0].startswith("Failed"):
        return found[0][:300]
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
