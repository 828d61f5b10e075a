"""Picture grids, loss curves and the time-lapse of a run. Knows no network and no loop.

Images are float tensors (n, 1, height, width) in [0, 1].
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from train.checkpoint import Losses, write_atomically

GRID_SCALE = 4  # a digit of 28 pixels is too small to look at
LAPSE_REDUCED = GRID_SCALE // 2
LAPSE_FRAME_MS = 40
LAPSE_LEAST_MS = 5000  # of a short lapse, its last frame not counted: its frames are slowed down
LAPSE_SLOWEST_FRAME_MS = 500
LAPSE_LAST_FRAME_MS = 3000
LAPSE_MAX_FRAMES = 1000  # more than any preset has log points


def grid_array(images: Tensor, columns: int, separator: float = 0.0) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Lay images out, ``columns`` a row, two pixels of grey ``separator`` apart: uint8 (rows, columns)."""
    tiled = make_grid(images.detach().cpu(), nrow=columns, padding=2, pad_value=separator)[0]
    levels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = (tiled.clamp(0, 1) * 255).round().byte().numpy()
    return levels


def save_grid(images: Tensor, columns: int, path: Path, separator: float = 0.0, scale: int = GRID_SCALE) -> None:
    """Write the grid as a grey PNG, every pixel ``scale`` × ``scale``."""
    grid = grid_array(images, columns, separator).repeat(scale, axis=0).repeat(scale, axis=1)
    _save_png(Image.fromarray(grid), path)


def save_losses(losses: Losses, folder: Path) -> None:
    """Write ``losses.npy``: (log points, 3): step, generator loss, discriminator loss."""
    write_atomically(folder / "losses.npy", lambda stream: np.save(stream, losses))


def plot_losses(losses: Losses, folder: Path) -> None:
    """Draw them as ``losses.png``, the two networks' one above the other, each on its own scale."""
    # What a notebook has set may name what is not installed here; nothing is shown. Imported where it is needed: it takes long.
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 6))
    axes = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.08, top=0.98, hspace=0.06)
    for column, (name, own) in enumerate(zip(("generator", "discriminator"), axes, strict=True), start=1):
        own.plot(losses[:, 0], losses[:, column], linewidth=1, color=f"C{column - 1}")
        own.set_ylabel(f"{name} loss")
        own.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(folder / "losses.png", lambda stream: stream.write(buffer.getvalue()))


def save_time_lapse(pictures: list[Path], path: Path) -> None:
    """Join PNG grids, oldest first, into an endless GIF: at most 1,000 frames, slower if they are few; the last stays for 3 s."""
    stride = max(1, -(-len(pictures) // LAPSE_MAX_FRAMES))
    chosen = [*pictures[:-1:stride], *pictures[-1:]]
    pictures_of = (Image.open(picture) for picture in chosen)
    # Half as large as the pictures: hundreds of whole ones would be tens of megabytes.
    frames = [each.reduce(LAPSE_REDUCED).convert("P") for each in pictures_of]
    frame_ms = max(LAPSE_FRAME_MS, min(LAPSE_SLOWEST_FRAME_MS, LAPSE_LEAST_MS // max(1, len(frames) - 1)))
    durations = [frame_ms] * (len(frames) - 1) + [LAPSE_LAST_FRAME_MS]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False)
    write_atomically(path, lambda stream: stream.write(buffer.getvalue()))


def _save_png(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")  # not optimized: that takes ten times as long, at every log point, for a tenth less
    write_atomically(path, lambda stream: stream.write(buffer.getvalue()))
