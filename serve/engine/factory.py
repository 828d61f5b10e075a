"""Creates the engine for a provider."""

from __future__ import annotations

from serve.engine.cuda_engine import CudaEngine
from serve.engine.provider import EngineOptions
from serve.engine.session import Engine
from serve.manifest import Manifest


def make_engine(model: bytes, manifest: Manifest, options: EngineOptions, largest: int) -> Engine:
    """A loaded model, for batches of up to ``largest`` rows. Raises ProviderError or BundleError."""
    kind = CudaEngine if options.provider == "cuda" else Engine
    return kind(model, manifest, options, largest)
