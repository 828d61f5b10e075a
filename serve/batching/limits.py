"""The settings and limits of a batcher."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The batcher's bounds; images, seconds."""

    latent_size: int
    labels: int  # how many there are to choose from; 0 for an unconditional model
    max_batch_size: int
    max_queue_images: int
    linger_s: float
    slots: int
    watchdog_s: float
