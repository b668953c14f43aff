"""Writes latents of a store's images by a fixed linear autoencoder, and its decoder.

    python scripts/make_latents.py SOURCE OUT --patch 4 --channels 12 --limit 10000

Patches of patch x patch pixels become their leading principal components: 32 x 32 RGB images become latents
of (12, 8, 8). No training, and what is lost is known (printed): a stand-in for a learned autoencoder, on
which everything that works on latents can be tried. OUT holds latents.npz (float16, with labels where there
are classes) and decoder.pt2, which `nnflow sample --decode` takes.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from nnflow import ImageStore, NNFlowError
from nnflow.errors import InputError

BLOCK = 1024  # images at once


@dataclass(frozen=True)
class Axes:
    """Mean patch (p,), directions (c, p) with orthonormal rows, and the share of variance they hold."""

    mean: Tensor
    directions: Tensor
    captured: float


def patches_of(images: Tensor, side: int) -> Tensor:
    """(n, h, w, p) of images (n, C, H, W)."""
    return rearrange(images, "n c (h a) (w b) -> n h w (c a b)", a=side, b=side)


def fitted(store: ImageStore, ids: Tensor, side: int, channels: int) -> Axes:
    """Principal components of all patches of the images `ids`."""
    _, colours, height, width = store.shape
    if height % side or width % side or channels > colours * side**2:
        raise InputError(f"patches of {side} x {side}, {channels} channels: not of {height} x {width} images")
    dim = colours * side**2
    total, gram, count = torch.zeros(dim).double(), torch.zeros(dim, dim).double(), 0
    for some in ids.split(BLOCK):
        patches = patches_of(store.images(some), side).flatten(0, 2).double()
        total, gram, count = total + patches.sum(0), gram + patches.T @ patches, count + len(patches)
    mean = total / count
    values, vectors = torch.linalg.eigh(gram / count - torch.outer(mean, mean))
    captured = (values[-channels:].sum() / values.sum()).item()
    return Axes(mean.float(), vectors.T.flip(0)[:channels].float().contiguous(), captured)


class Decoder(nn.Module):
    """Latents (B, c, h, w) to images (B, C, H, W)."""

    def __init__(self, axes: Axes, colours: int, side: int) -> None:
        super().__init__()
        self.register_buffer("mean", axes.mean.view(colours, 1, side, 1, side))
        self.back = nn.ConvTranspose2d(len(axes.directions), colours, side, stride=side, bias=False)
        self.back.weight.data = axes.directions.view(-1, colours, side, side)
        self.side = side

    mean: Tensor

    def forward(self, latents: Tensor) -> Tensor:  # noqa: D102
        height, width = latents.shape[2] * self.side, latents.shape[3] * self.side
        mean = self.mean.expand(-1, latents.shape[2], -1, latents.shape[3], -1)
        return self.back(latents) + mean.reshape(1, -1, height, width)


def write(store: ImageStore, out: Path, *, side: int, channels: int, ids: Tensor) -> Axes:
    axes = fitted(store, ids, side, channels)
    latents = []
    for some in ids.split(BLOCK):
        coordinates = (patches_of(store.images(some), side) - axes.mean) @ axes.directions.T
        latents.append(coordinates.permute(0, 3, 1, 2).half().numpy())
    arrays = {"latents": np.concatenate(latents)}
    if store.classes:
        arrays["labels"] = np.array(store.classes)[store.labels[ids].numpy()]
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "latents.npz", **arrays)  # type: ignore[arg-type]
    example = torch.zeros(2, *arrays["latents"].shape[1:])
    decoder = Decoder(axes, store.shape[1], side).eval().requires_grad_(False)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(decoder, (example,), dynamic_shapes={"latents": {0: batch}})
    torch.export.save(exported, out / "decoder.pt2")
    return axes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="a store or index of pixels: OUT of nnflow index")
    parser.add_argument("out", type=Path)
    parser.add_argument("--patch", type=int, default=4)
    parser.add_argument("--channels", type=int, default=12)
    parser.add_argument("--limit", type=int, default=None, help="images, drawn by --seed; all by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        store = ImageStore.open(options.source)
        draw = torch.randperm(len(store), generator=torch.Generator().manual_seed(options.seed))
        ids = draw[: options.limit].sort().values
        axes = write(store, options.out, side=options.patch, channels=options.channels, ids=ids)
    except NNFlowError as error:
        print(f"make_latents: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(ids):,} latents, {100 * axes.captured:.2f} % of the patches' variance")
    return 0


if __name__ == "__main__":
    sys.exit(main())
