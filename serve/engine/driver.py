"""Checks whether NVIDIA's driver has a device that CUDA 13 can use. Asks the driver itself and needs no CUDA package.

``cuDriverGetVersion``, ``cuInit``, ``cuDeviceGetCount`` and ``cuDeviceGetName`` of the CUDA driver API answer without a context.
"""

from __future__ import annotations

import contextlib
import ctypes

LIBRARY = "libcuda.so.1"
LEAST_VERSION = 13_000  # 1000 × major + 10 × minor: what the wheels of onnxruntime-gpu and CUDA here are built for
LEAST_DRIVER = "580"  # https://docs.nvidia.com/cuda/cuda-toolkit-release-notes: CUDA 13.0 and its driver


def why_unusable(device: int = 0) -> str | None:
    """Why there is no such device to use, in words; None when there is one."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return f"no NVIDIA driver is installed here ({LIBRARY} is missing)"
    version, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value < LEAST_VERSION:
        has = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return f"the NVIDIA driver is for CUDA {has}, and CUDA 13.0 needs driver {LEAST_DRIVER} or newer"
    if code := driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver has no usable device ({_name(driver, code)})"
    if not count.value:
        return "the NVIDIA driver shows no device (is CUDA_VISIBLE_DEVICES set?)"
    return None if device < count.value else f"the NVIDIA driver shows no device {device}, only {count.value}, from 0 on"


def device_names() -> list[str]:
    """What the devices are called, by number. Only after ``why_unusable`` has found one."""
    driver, count = ctypes.CDLL(LIBRARY), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for number in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        driver.cuDeviceGet(ctypes.byref(device), number)
        driver.cuDeviceGetName(name, len(name), device)
        names.append(name.value.decode(errors="replace"))
    return names


def _name(driver: ctypes.CDLL, code: int) -> str:
    """A result's own name, CUDA_ERROR_NO_DEVICE say, or its number where the driver has none for it."""
    name = ctypes.c_char_p()
    with contextlib.suppress(AttributeError):
        driver.cuGetErrorName(code, ctypes.byref(name))
    return f"{name.value.decode()}, {code}" if name.value else f"error {code}"
