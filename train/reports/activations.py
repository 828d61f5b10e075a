"""The activations inside a generator: of each layer for 36 latents, and of one sample as mosaics."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from train.checkpoint import Run, latest_checkpoint, write_atomically
from train.errors import ConfigError
from train.models import IMAGE_SIZE, trained_generator
from train.pictures import save_grid

SAMPLES = 36
MOSAIC_SIDE = 8  # 64 filters: all of a DCGAN's last hidden layer, the first 64 of the others
FILTER_SIDE = 64  # pixels of a filter's picture
UNIT_SIDE = 8  # pixels of the picture of one unit of an MLP


def record(generator: nn.Module, latents: Tensor, *labels: Tensor) -> list[Tensor]:
    """The outputs after each ReLU and the last layer, shallow to deep, for ``latents`` (n, z) and ``labels`` (n,) or none.

    For the presets' widths and 36 latents: (36,256,4,4), (36,128,8,8), (36,64,16,16), (36,1,28,28) of a DCGAN, and
    (36,128), (36,256), (36,512), (36,1024), (36,784) of the MLP.
    """
    taken: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: taken.append(output.detach().clone()))
        for module in generator.modules()
        if isinstance(module, nn.ReLU | nn.Tanh | nn.Sigmoid)
    ]
    generator.eval()
    with torch.no_grad():
        generator(latents, *labels)
    for hook in hooks:
        hook.remove()
    return taken


def draw(run: Run, sample: int) -> str:
    """Write the activations of the run's newest weights and the mosaics of ``sample``; says what was written.

    A conditional generator is asked for the digits in turn. Raises ConfigError for a sample outside 0–35, CheckpointError
    for a run without a checkpoint.
    """
    if not 0 <= sample < SAMPLES:
        raise ConfigError(f"--sample must be from 0 to {SAMPLES - 1}, got {sample}")
    generator = trained_generator(run.config, latest_checkpoint(run))
    latents = torch.randn(SAMPLES, run.config.latent_size, generator=torch.Generator().manual_seed(run.config.seed))
    labels = [torch.arange(SAMPLES) % run.config.labels] if run.config.conditional else []
    layers = record(generator, latents, *labels)
    folder = run.folder / "activations"
    folder.mkdir(exist_ok=True)
    arrays = {"latents": latents.numpy()} | {f"layer{number}": layer.numpy() for number, layer in enumerate(layers, start=1)}
    write_atomically(folder / "activations.npz", lambda stream: np.savez_compressed(stream, allow_pickle=False, **arrays))
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    written = [f"{folder / 'activations.npz'}: {shapes}"]
    for number, layer in enumerate(layers[:-1], start=1):
        path = folder / f"sample-{sample:02d}-layer{number}.png"
        tiles, columns = _filters(layer[sample]) if layer.dim() == 4 else _units(layer[sample])
        save_grid(tiles, columns, path, separator=0.35, scale=1)
        written.append(str(path))
    path = folder / f"sample-{sample:02d}-image.png"
    low, high = run.config.pixel_range
    save_grid((layers[-1][sample].view(1, 1, IMAGE_SIZE, IMAGE_SIZE) - low) / (high - low), 1, path)
    return "\n".join([*written, str(path)])


def _filters(layer: Tensor) -> tuple[Tensor, int]:
    """Of a layer's (channels, side, side) the first 64 as tiles (64, 1, 64, 64), each as bright as it can be; 8 in a row."""
    filters = layer[: MOSAIC_SIDE * MOSAIC_SIDE, None]
    brightest = filters.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
    return _enlarged(filters / brightest, FILTER_SIDE // filters.shape[-1]), MOSAIC_SIDE


def _units(layer: Tensor) -> tuple[Tensor, int]:
    """A layer's (units,) as tiles (units, 1, 8, 8), the strongest of all in white; in about as many rows as columns."""
    tiles = (layer / layer.max().clamp_min(1e-12)).view(-1, 1, 1, 1)
    return _enlarged(tiles, UNIT_SIDE), 1 << ((len(layer) - 1).bit_length() + 1) // 2


def _enlarged(tiles: Tensor, times: int) -> Tensor:
    return tiles.repeat_interleave(times, -1).repeat_interleave(times, -2)
