"""The filter of data sets for training: keeps the digits that a judge reads as their label with at least a given confidence.

A rejected digit is replaced by the one ``count`` indices later in the same stream, and so on, so that the data set has the
requested size. Which digits are kept is a function of the address alone: the judge reads whole blocks of the stream, whichever
shard a digit falls into.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.dataset.header import ATTEMPTS, Dataset
from serve.engine.onnx_runtime import ort
from serve.engine.session import Engine
from serve.errors import SettingsError
from serve.manifest import sha256

BUNDLED_JUDGE = Path(__file__).parent / "judge.onnx"
PIXELS, PROBABILITIES = "pixels", "probabilities"
TRAINED_ON = "train-images-idx3-ubyte"  # of a model's and of a judge's data: the file whose digest says which it is
ROWS_AT_ONCE = 64


class Judge:
    """A classifier as ``python -m export judge`` writes it: pixels uint8 (n, 28, 28) → probabilities float32 (n, classes)."""

    def __init__(self, path: Path = BUNDLED_JUDGE) -> None:
        """Raises SettingsError when the file is no judge."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # as many threads as write ask it, each about its own digits
        try:
            content = path.read_bytes()
            self._session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            [given], [answered] = self._session.get_inputs(), self._session.get_outputs()
            self.classes = int(answered.shape[1])
            self.trained_on = self._session.get_modelmeta().custom_metadata_map.get(TRAINED_ON)  # None: an older file's
            if (given.name, answered.name) != (PIXELS, PROBABILITIES):
                raise ValueError(path)
        except OSError as error:
            raise SettingsError(f"--judge {path}: {error.strerror}") from None
        except Exception:  # onnxruntime has a dozen kinds for a damaged file
            command = f"python -m export judge --out {shlex.quote(str(path))}"
            raise SettingsError(f"--judge {path} is no judge; write one with: {command}") from None
        self.digest = sha256(content)

    def read(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities of each class, (n, classes)."""
        parts = [
            self._session.run([PROBABILITIES], {PIXELS: pixels[first : first + ROWS_AT_ONCE]})[0]
            for first in range(0, len(pixels), ROWS_AT_ONCE)
        ]
        return np.concatenate(parts)

    def confidence(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """How sure it is that each digit is of its label, (n,)."""
        return self.read(pixels)[np.arange(len(pixels)), labels]


def filtered_digits(
    dataset: Dataset, engine: Engine, judge: Judge, block: range, rows_at_once: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The digits that stand at a block of stream indices of a filtered data set, and their own indices, each (size, …).

    What is outside the data set is not looked at. What takes others' places is made in runs of ``rows_at_once``. Raises
    SettingsError when a place finds no digit in ``ATTEMPTS`` addresses.
    """
    begin, indices = block.start, np.array(block)
    latents, labels = dataset.rows(begin, len(block))
    pixels: NDArray[np.uint8] = engine.compute(latents, labels)["pixels"]
    assert labels is not None
    within = (indices >= dataset.start) & (indices < dataset.start + dataset.count)
    open_places = np.flatnonzero(within & (judge.confidence(pixels, labels) < dataset.filter))
    for attempt in range(1, ATTEMPTS):
        if not len(open_places):
            break
        given = begin + open_places
        others = given + attempt * dataset.count
        # Whole runs, as everywhere: the last row again where some are missing.
        padded = np.pad(np.arange(len(others)), (0, -len(others) % rows_at_once), mode="edge")
        latents, labels = dataset.chosen_rows(others[padded], given[padded])
        made = engine.compute(latents, labels)["pixels"]
        assert labels is not None
        good = (judge.confidence(made, labels) >= dataset.filter)[: len(others)]
        pixels[open_places[good]], indices[open_places[good]] = made[: len(others)][good], others[good]
        open_places = open_places[~good]
    if len(open_places):
        raise SettingsError(
            f"--filter {dataset.filter:g}: none of {ATTEMPTS} digits, at index {begin + open_places[0]} + n × {dataset.count},"
            " is read so surely; lower it"
        )
    return pixels, indices
