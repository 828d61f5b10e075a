"""Makes digits of a bundle's model in this process, without a server. Needs what serving needs: the extra ``serve``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.client.errors import mistake
from serve.client.training.digit_set import About
from serve.engine.cuda_engine import make_checked_engine
from serve.engine.provider import EngineOptions
from serve.engine.session import Engine
from serve.errors import StartError
from serve.models.repository import read_bundle

ROWS_A_RUN = 64  # of the CPU's


class InProcess:
    """An engine on the CPU. A process that was forked off makes its own."""

    def __init__(self, engine: Engine, about: About) -> None:
        self._engine, self.about = engine, about

    def make(self, latents: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        return self._engine.compute(latents, labels)["pixels"]

    def close(self) -> None:
        self._engine.close()


def open_bundle(folder: Path, model: str, version: int) -> InProcess:
    """Check ``<name>/<version>`` and load it: it must be of this ``model`` and ``version``, where given. Raises DigitError."""
    try:
        bundle = read_bundle(folder.resolve())
        manifest = bundle.manifest
        if (model or manifest.name, version or manifest.version) != (manifest.name, manifest.version):
            raise mistake(f"{folder} holds {manifest.name}/{manifest.version}, not {model or manifest.name}/{version or 'any'}")
        engine = make_checked_engine(bundle.model, manifest, EngineOptions(), ROWS_A_RUN)
    except StartError as error:
        raise mistake(str(error)) from None
    return InProcess(engine, About(manifest.name, manifest.version, bundle.digest, manifest.latent_size, manifest.labels, 1024))
