"""Chooses the execution provider for this machine, and holds the options with which sessions run on it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from serve.engine import driver
from serve.engine.cuda import load_libraries, memory_total_bytes
from serve.engine.onnx_runtime import ort
from serve.errors import EngineError, ProviderError

log = logging.getLogger(__name__)

Provider = Literal["cpu", "cuda"]

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
# As ONNX Runtime's CUDA provider writes it: "CUDA failure 100: no CUDA-capable device is detected ; GPU=0 ; hostname=...".
CUDA_FAILURE = re.compile(r"CUDA failure (\d+): ([^;\n]+)")
FILLS_A_GPU = 512  # rows from which on a run takes as long as it has rows
PROVIDER_NAMES = {"cpu": CPU_PROVIDER, "cuda": CUDA_PROVIDER}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a session runs. ``cuda_options`` are the CUDA provider's own, over the engine's defaults."""

    provider: Provider = "cpu"
    intra_op_threads: int = 1
    pad_to_powers: bool = False  # pad batches to powers of two; always so on CUDA
    cuda_graphs: bool = False
    device_latents: bool = False  # draw latents on the device
    compute_stream: int = 0  # a CUDA stream that all runs go into; 0: the session's own
    record_assignment: bool = False  # keep which provider has which node, for checks
    cuda_options: Mapping[str, str] = field(default_factory=dict)

    def bucket(self, count: int, largest: int) -> int:
        """The rows that are computed for a batch of ``count``, at most ``largest``: on CUDA 1, 8, 64, 512, 1024, 2048, 4096.

        There a bucket costs memory, time to capture and a convolution plan of its own, which is made anew whenever the size
        changes outside a graph (onnxruntime #23006), and a few hundred rows more cost a GPU next to nothing.
        """
        on_cuda = self.provider == "cuda"
        if not (on_cuda or self.pad_to_powers):
            return count
        bits = 3 if on_cuda and count <= FILLS_A_GPU else 1
        return min(largest, 1 << -(-(count - 1).bit_length() // bits) * bits)


def choose_provider(wanted: str) -> Provider:
    """Settle ``auto|cpu|cuda`` for this machine. Raises ProviderError when CUDA was asked for and is not there."""
    if wanted == "cpu":
        return "cpu"
    reason = _cuda_missing()
    if reason is None:
        return "cuda"
    if wanted == "cuda":
        raise ProviderError(f"--provider cuda: {reason}; install the CUDA extra and a driver, or use --provider cpu")
    log.info("provider auto: on the CPU, because %s", reason)
    return "cpu"


def _cuda_missing() -> str | None:
    """Why CUDA cannot be used here, as far as that shows before a session is made; None when nothing speaks against it."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        return "this ONNX Runtime is built without CUDA"
    if reason := driver.why_unusable():
        return reason
    try:
        memory_total_bytes()
        load_libraries()
    except (EngineError, ProviderError) as error:
        return f"its device cannot be used: {error}"
    return None


def described(error: Exception) -> str:
    """What ONNX Runtime raised, in one line: CUDA's own failure where its text holds one."""
    if found := CUDA_FAILURE.search(str(error)):
        return f"CUDA failure {found[1]}: {found[2].strip()}"
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__
