"""Image stores made of given pixels, for the tests."""

from pathlib import Path

import numpy as np
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
