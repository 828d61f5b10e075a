"""The served generator as frozen TorchScript: for users of libtorch, and as a second implementation for the parity check."""

from __future__ import annotations

import io
import warnings

import torch

from export.errors import ExportError
from export.generator import ServedGenerator


def to_torchscript(served: ServedGenerator) -> bytes:
    """Script, freeze and save. The generator goes in unfolded: freezing folds it by its own means."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torch.export, but libtorch reads nothing else
        frozen = torch.jit.freeze(torch.jit.script(served.eval()))
        buffer = io.BytesIO()
        torch.jit.save(frozen, buffer)
    return buffer.getvalue()


def load_torchscript(content: bytes) -> torch.jit.ScriptModule:
    """The module back from its bytes, on the CPU. Raises ExportError when it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(content), map_location="cpu")
        except RuntimeError:
            raise ExportError("model.ts is no TorchScript module; export the model again") from None
    return module
