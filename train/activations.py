"""Inside a DCGAN generator, conditional or not: what each layer makes of 36 latents, and one sample's filters as mosaics."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from train.checkpoint import Run, latest_checkpoint, write_atomically
from train.errors import CheckpointError, ConfigError
from train.models import trained_generator
from train.report import save_grid

SAMPLES = 36
MOSAIC_SIDE = 8  # 64 filters: all of the last hidden layer, the first 64 of the others


def record(generator: nn.Module, latents: Tensor, *labels: Tensor) -> list[Tensor]:
    """The outputs after each ReLU and the tanh, shallow to deep, for ``latents`` (n, z), and ``labels`` (n,) of a cdcgan.

    For the preset's widths and 36 latents: (36,256,4,4), (36,128,8,8), (36,64,16,16), (36,1,28,28).
    """
    taken: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: taken.append(output.detach().clone()))
        for module in generator.modules()
        if isinstance(module, nn.ReLU | nn.Tanh)
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
    for a run of an mlp or without a checkpoint.
    """
    if not 0 <= sample < SAMPLES:
        raise ConfigError(f"--sample must be from 0 to {SAMPLES - 1}, got {sample}")
    if run.config.architecture == "mlp":
        raise CheckpointError(f"{run.folder} is a {run.config.preset} run; activations are drawn for dcgan and cdcgan runs")
    generator = trained_generator(run.config, latest_checkpoint(run))
    latents = torch.randn(SAMPLES, run.config.latent_size, generator=torch.Generator().manual_seed(run.config.seed))
    labels = [torch.arange(SAMPLES) % run.config.labels] if run.config.conditional else []
    layers = record(generator, latents, *labels)
    folder = run.folder / "activations"
    folder.mkdir(exist_ok=True)
    arrays = {"latents": latents.numpy()} | {f"layer{number}": layer.numpy() for number, layer in enumerate(layers, start=1)}
    write_atomically(folder / "activations.npz", lambda stream: np.savez_compressed(stream, allow_pickle=False, **arrays))
    written = [f"{folder / 'activations.npz'}: {', '.join(str(tuple(layer.shape)) for layer in layers)}"]
    for number, layer in enumerate(layers[:-1], start=1):
        path = folder / f"sample-{sample:02d}-layer{number}.png"
        filters = layer[sample, : MOSAIC_SIDE * MOSAIC_SIDE, None]  # (64, 1, side, side)
        brightest = filters.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
        enlarged = (filters / brightest).repeat_interleave(64 // filters.shape[-1], -1)
        enlarged = enlarged.repeat_interleave(64 // filters.shape[-1], -2)
        save_grid(enlarged, MOSAIC_SIDE, path, separator=0.35, scale=1)
        written.append(str(path))
    path = folder / f"sample-{sample:02d}-image.png"
    save_grid((layers[-1][sample : sample + 1] + 1) / 2, 1, path)
    return "\n".join([*written, str(path)])
