"""Where models run: the execution provider, settled for this machine, and how a session runs on it."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from serve.engine.onnx_runtime import ort
from serve.errors import ProviderError

log = logging.getLogger(__name__)

Provider = Literal["cpu", "cuda"]

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
PROVIDER_NAMES = {"cpu": CPU_PROVIDER, "cuda": CUDA_PROVIDER}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a session runs. ``cuda_options`` are the CUDA provider's own, over the engine's defaults."""

    provider: Provider = "cpu"
    intra_op_threads: int = 1
    pad_to_powers: bool = False  # pad batches to powers of two; always so on CUDA
    cuda_graphs: bool = False
    cuda_options: Mapping[str, str] = field(default_factory=dict)

    @property
    def padded(self) -> bool:
        return self.pad_to_powers or self.provider == "cuda"


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
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed here (libcuda.so.1 is missing)"
    ort.preload_dlls()  # finds CUDA and cuDNN in the pip packages
    return None
