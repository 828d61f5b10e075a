"""Digits as a training set, made as they are read: a map-style data set for PyTorch's DataLoader, without files or torch.

    digits = DigitSet("localhost:50051", seed=7, count=60_000)
    for epoch in range(5):
        digits.set_epoch(epoch)  # fresh digits
        for images, labels in DataLoader(digits, batch_size=64, num_workers=2):
            ...  # images: uint8 (64, 1, 28, 28); labels: int64 (64,)

Item i of epoch e is the digit at index ``start + e * count + i`` of the seed's stream, whichever process asks for it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from ctypes import c_int64
from multiprocessing import RawValue
from multiprocessing.context import get_spawning_popen
from os import getpid
from pathlib import Path
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.client.calls import Labels, as_numbers, checked_truncation
from serve.client.channel import PLAIN, Access
from serve.client.client import DEFAULT_TIMEOUT_S, DigitClient
from serve.client.errors import mistake, whole
from serve.latents import INDEX_LIMIT, LatentReader, Span

MOST_REQUEST_BYTES = 2 << 20  # of latents in a request; a server takes 4 MiB
NO_LABEL = -1  # of an unconditional model's digits: no loss takes it for a class
EXTRA = "a folder's digits are made in this process, which needs more than the client: pip install '.[serve]'"

Item: TypeAlias = tuple[NDArray[np.uint8], int]  # pixels (1, 28, 28), and the label


class About(NamedTuple):
    """The model that generates the digits, and the most in one request."""

    name: str
    version: int
    digest: str
    latent_size: int
    labels: int
    most: int


class Maker(Protocol):
    """Generates digits in one process: by a server, or by an engine."""

    about: About

    def make(self, latents: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        """Digits (n, 28, 28) of latents (n, z) and, for a conditional model, labels (n,)."""
        ...

    def close(self) -> None: ...


class Server:
    """Generates digits by a server, with the priority bulk."""

    def __init__(self, client: DigitClient, model: str, version: int) -> None:
        self._client = client
        told = client.get_model(model, version)
        name, number, size = told.summary.name, told.summary.version, told.latent_size
        most = max(1, min(told.limits.max_count, MOST_REQUEST_BYTES // (4 * size)))
        self.about = About(name, number, told.digest, size, told.labels, most)

    def make(self, latents: NDArray[np.float32], labels: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        given = () if labels is None else labels
        about = self.about
        return self._client.generate(latents=latents, labels=given, model=about.name, version=about.version, bulk=True).pixels

    def close(self) -> None:
        self._client.close()


class DigitSet:
    """A map-style data set. It may be pickled, and used in many processes: each has a connection, or an engine, of its own."""

    def __init__(
        self,
        source: str | Path,
        *,
        seed: SupportsIndex,
        count: SupportsIndex,
        start: SupportsIndex = 0,
        labels: Labels = (),
        truncation: float = 0.0,
        model: str = "",
        version: SupportsIndex = 0,
        access: Access = PLAIN,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """``source``: a server's target, or a bundle's folder, whose model runs in this process on the CPU (the extra ``serve``).

        ``labels``: the digit at index i of the stream is ``labels[i % n]``; without, the addresses' own. Model and version are
        settled here, and their file too: a process that meets another one raises. Raises DigitError.
        """
        self._source, self._access, self._timeout_s = source, access, timeout_s
        self._seed, self._truncation = whole("seed", seed, 64), checked_truncation(truncation)
        self._start, self._count = whole("start", start, 63), whole("count", count, 63)
        if not self._count:
            raise mistake("count must be 1 or more, got 0")
        self._labels = np.array(as_numbers(labels), np.int64)
        self._epoch = RawValue(c_int64, 0)  # shared with workers that stay
        self._maker: tuple[int, Maker] | None = None  # and the process that it belongs to
        self.set_epoch(0)
        maker = self._open(model, whole("version", version, 63))
        maker.close()  # a process that will fork should have no connection
        self._about = maker.about
        if len(self._labels) and not self._labels.max() < self._about.labels:
            has = f"has labels 0 to {self._about.labels - 1}" if self._about.labels else "is unconditional"
            raise mistake(f"labels: {int(self._labels.max())} cannot be asked for, {self._about.name} {has}")

    def set_epoch(self, epoch: SupportsIndex) -> None:
        """Begin at index ``start + epoch * count``: also in a DataLoader's workers that stay from epoch to epoch."""
        number = whole("epoch", epoch, 63)
        if self._start + (number + 1) * self._count > INDEX_LIMIT:
            raise mistake(f"epoch {number} ends beyond the last index, 2^63 - 1")
        self._epoch.value = number

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: SupportsIndex) -> Item:
        """Raises IndexError, and DigitError when the server does not answer."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[Item]:
        """Many at once: what DataLoader asks for. They go into as few requests as the server takes."""
        maker = self._opened()
        first = self._start + self._epoch.value * self._count
        wanted = np.array([first + self._checked(index) for index in indices], np.int64)
        items: list[Item] = []
        for begin in range(0, len(wanted), self._about.most):
            items += self._items(wanted[begin : begin + self._about.most], maker)
        return items

    def __getstate__(self) -> dict[str, Any]:
        # The shared number itself goes to a process that is being started, and its value into a file.
        epoch = self._epoch if get_spawning_popen() is not None else self._epoch.value
        return self.__dict__ | {"_maker": None, "_epoch": epoch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if isinstance(self._epoch, int):
            self._epoch = RawValue(c_int64, self._epoch)

    def _checked(self, index: SupportsIndex) -> int:
        number = operator.index(index)
        if not -self._count <= number < self._count:
            raise IndexError(f"index {number} of {self._count} digits")
        return number % self._count

    def _items(self, indices: NDArray[np.int64], maker: Maker) -> list[Item]:
        """Their latents are drawn here, by the address rule: so indices in any order are one request."""
        count, size, classes = len(indices), self._about.latent_size, self._about.labels
        runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        spans = [Span(self._seed, int(run[0]), len(run), truncation=self._truncation) for run in runs]
        latents, labels = np.empty((count, size), np.float32), np.empty(count, np.int64) if classes else None
        LatentReader(size, classes).fill(latents, spans, labels)
        if len(self._labels):
            labels = self._labels[indices % len(self._labels)]
        pixels = maker.make(latents, labels)
        told = [NO_LABEL] * count if labels is None else labels.tolist()
        return list(zip(pixels[:, None], told, strict=True))

    def _opened(self) -> Maker:
        """This process's own."""
        if self._maker is None or self._maker[0] != getpid():
            maker = self._open(self._about.name, self._about.version)
            if maker.about != self._about:
                raise mistake(
                    f"{self._source} has another {self._about.name}/{self._about.version} now than when the set was made"
                )
            self._maker = getpid(), maker
        return self._maker[1]

    def _open(self, model: str, version: int) -> Maker:
        source = str(self._source)
        if not Path(source).is_dir():
            if isinstance(self._source, Path) or ":" not in source:
                raise mistake(f"{source} is neither a bundle's folder nor a server's host:port")
            return Server(DigitClient(source, self._timeout_s, self._access), model, version)
        try:
            from serve.client.training.in_process import open_bundle  # noqa: PLC0415  # an extra
        except ImportError:
            raise mistake(EXTRA) from None
        return open_bundle(Path(source), model, version)
