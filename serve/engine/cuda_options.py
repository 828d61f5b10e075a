"""The options of ONNX Runtime's CUDA provider that ``--cuda-options`` may set."""

from __future__ import annotations

from serve.errors import SettingsError

# What --cuda-options may set, and to what. Not cuDNN's DEFAULT algorithm: an H100 made a third of the digits by it, for every
# model with convolutions.
CUDA_OPTIONS = {
    "use_tf32": ("0", "1"),
    "prefer_nhwc": ("0", "1"),
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC"),
    "cudnn_conv_use_max_workspace": ("0", "1"),
    "tunable_op_enable": ("0", "1"),
    "tunable_op_tuning_enable": ("0", "1"),
}


def parse_cuda_options(text: str) -> dict[str, str]:
    """Read ``name=value,name=value``. Raises SettingsError naming the option and what it takes."""
    options = {}
    for entry in filter(None, text.split(",")):
        name, _, value = entry.strip().partition("=")
        if name not in CUDA_OPTIONS:
            raise SettingsError(f"--cuda-options: {name[:64]!r} is unknown; there are {', '.join(CUDA_OPTIONS)}")
        if value not in CUDA_OPTIONS[name]:
            raise SettingsError(f"--cuda-options: {name} must be one of {', '.join(CUDA_OPTIONS[name])}, got {value[:64]!r}")
        options[name] = value
    return options
