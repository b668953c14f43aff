"""Image stores made of given pixels, for the tests."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nnflow.store import ImageStore


def store_of(pixels: Tensor, folder: Path, *, classes: list[str] | None = None) -> ImageStore:
    """A store of uint8 `pixels` (n, C, H, H), in this order when all are of one class."""
    source = folder / "source"
    for number, image in enumerate(pixels):
        name = source / (classes[number] if classes else "") / f"{number:05d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        array = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(array.numpy()).save(name)
    return ImageStore.build(
        source, folder / "out", size=pixels.shape[-1], grey=pixels.shape[1] == 1, workers=1
    )


def latents_of(
    latents: Tensor, folder: Path, *, classes: list[str] | None = None, scaling: float | None = None
) -> ImageStore:
    """A store of float16 or float32 `latents` (n, C, H, W), in this order when all are of one class."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {} if classes is None else {"labels": np.array(classes)}
    np.savez(folder / "source.npz", latents=latents.numpy(), **named)
    return ImageStore.build(folder / "source.npz", folder / "out", scaling=scaling, workers=1)


def striped(count: int, seed: int) -> Tensor:
    """Noise with a bright row for one class, a bright column for the other, somewhere."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(120, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    for number, place in enumerate(torch.randint(8, (count,), generator=generator).tolist()):
        line = images[number, 0, place] if number < count // 2 else images[number, 0, :, place]
        line += 100
    return images


def stripes(count: int, folder: Path, seed: int, names: tuple[str, str] = ("column", "row")) -> ImageStore:
    """A store of `striped` images under these names."""
    half = count // 2
    return store_of(striped(count, seed), folder, classes=[names[1]] * half + [names[0]] * half)
