"""What a person looks at: picture grids, the loss curves and the time-lapse. Knows no network and no loop.

Images arrive as float tensors (n, 1, height, width) in [0, 1].
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from train.checkpoint import write_atomically

LAPSE_FRAME_MS = 40
LAPSE_LAST_FRAME_MS = 3000
LAPSE_MAX_FRAMES = 250


def grid_array(images: Tensor, columns: int, separator: float = 0.0) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Lay images out, ``columns`` a row, two pixels of grey ``separator`` apart: uint8 (rows, columns)."""
    tiled = make_grid(images.detach().cpu(), nrow=columns, padding=2, pad_value=separator)[0]
    levels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = (tiled.clamp(0, 1) * 255).round().byte().numpy()
    return levels


def save_grid(images: Tensor, columns: int, path: Path, separator: float = 0.0) -> None:
    """Write the grid as a grey PNG."""
    _save_png(Image.fromarray(grid_array(images, columns, separator)), path)


def save_losses(losses: np.ndarray[tuple[int, ...], np.dtype[np.float64]], folder: Path) -> None:
    """Write ``losses.npy`` and its plot. ``losses`` is (log points, 3): step, generator loss, discriminator loss."""
    write_atomically(folder / "losses.npy", lambda stream: np.save(stream, losses))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(losses[:, 0], losses[:, 1], label="generator", linewidth=1)
    axes.plot(losses[:, 0], losses[:, 2], label="discriminator", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(folder / "losses.png", lambda stream: stream.write(buffer.getvalue()))


def save_time_lapse(pictures: list[Path], path: Path) -> None:
    """Join PNG grids, oldest first, into an endless GIF of at most 250 frames whose last frame stays for 3 s."""
    stride = max(1, -(-len(pictures) // LAPSE_MAX_FRAMES))
    chosen = [*pictures[:-1:stride], *pictures[-1:]]
    frames = [Image.open(picture).convert("P") for picture in chosen]
    durations = [LAPSE_FRAME_MS] * (len(frames) - 1) + [LAPSE_LAST_FRAME_MS]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False)
    write_atomically(path, lambda stream: stream.write(buffer.getvalue()))


def _save_png(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    write_atomically(path, lambda stream: stream.write(buffer.getvalue()))
