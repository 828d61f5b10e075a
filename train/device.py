"""Chooses the device of a run, and describes the machine and the versions that it runs on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

from serve.engine.resources import usable_cores
from train.errors import ConfigError, DeviceError

MOST_THREADS = 4096
BF16_OF_CPUS = ("avx512_bf16", "amx_bf16", "bf16")  # as torch.cpu.get_capabilities names them; the last one is ARM's


def choose_device(wanted: str) -> torch.device:
    """``auto`` takes CUDA when there is one. Raises DeviceError for ``cuda`` on a machine without it."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: PyTorch finds no usable CUDA device here; use --device cpu, or mend the driver")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def prepare_machine(device: str, threads: int) -> torch.device:
    """Set the CPU threads, 0 for what ``limit_threads`` leaves, and choose the device. Raises ConfigError or DeviceError."""
    if not 0 <= threads <= MOST_THREADS:
        raise ConfigError(f"--threads must be from 0 to {MOST_THREADS}, got {threads}")
    if threads:
        torch.set_num_threads(threads)
    else:
        limit_threads()
    return choose_device(device)


def limit_threads() -> None:
    """Use no more CPU threads than the container's quota has cores. PyTorch has one for each core that it sees.

    Threads that are throttled keep the others waiting, and those spin meanwhile.
    """
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def set_precision(precision: str, device: torch.device) -> None:
    """Let CUDA's matrix units round to TF32, or not. Raises DeviceError for ``tf32`` without CUDA."""
    if precision == "tf32" and device.type != "cuda":
        raise DeviceError("--precision tf32 is CUDA's; on the CPU there are fp32 and bf16")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16. Without them PyTorch emulates bf16: measured at 13 times the time of fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch cannot say: fp32 then
    return any(capabilities.get(name, False) for name in BF16_OF_CPUS)


def describe(device: torch.device) -> dict[str, Any]:
    """Device name, threads, whether it has bf16, and versions, for a run's records."""
    on_cuda = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "bf16": has_bf16(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
