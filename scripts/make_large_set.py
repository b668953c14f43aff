"""Writes a store of many images made of a few: the originals first, then changed copies of them.

    scripts/make_large_set SOURCE OUT --count 1000000 --seed 0 [--index]

A copy is its original mirrored or not, shifted by up to 4 pixels each way (the edge filled by
reflection), and with another contrast, brightness and gain of each channel. Copy number c of image i is row
c n + i. Labels are left out: rows of one class would have to stand together.

For benchmarks of cost at large n, and said to be what it is: n images of this kind are more alike than n
photographs. Two rows count as near-duplicates when their root mean square difference is below 4 of 255 grey
levels; how many of a random sample have one is counted and printed.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nnflow import ImageStore, NeighbourIndex, NNFlowError, hdf5file
from nnflow.errors import InputError, StoreError
from nnflow.files import disk_errors, folder_lock, shown, sync_folder, write_at
from nnflow.ingest import IMAGES
from nnflow.texts import Texts
from nnflow.unsealed import seal

BLOCK = 2048  # rows made at once, 25 MB of float32 each at d = 3,072; the random numbers depend on it
SHIFT = 4  # pixels
CONTRAST, GAIN, BRIGHTNESS = 0.2, 0.1, 20.0  # at most so far from 1, from 1, and from 0 grey levels
NEAR = 4.0  # grey levels, root mean square
SAMPLE = 256


@dataclass(frozen=True)
class Nearness:
    """Distances of some rows to the nearest other row, in grey levels (root mean square)."""

    rows: Tensor
    levels: Tensor

    @property
    def duplicated(self) -> int:
        """Rows that have a near-duplicate."""
        return int((self.levels < NEAR).sum())


def changed(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Copies of uint8 images (b, C, H, W), each mirrored, shifted and coloured at random."""
    count, channels, height, width = pixels.shape
    rows, columns = (_places(side, count, generator) for side in (height, width))
    mirror = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirror, columns.flip(1), columns)
    flat = (rows[:, :, None] * width + columns[:, None]).flatten(1)
    images = pixels.flatten(2).gather(2, flat[:, None].expand(-1, channels, -1)).float()

    def spread(most: float, *size: int) -> Tensor:
        return torch.empty(count, *size, 1).uniform_(-most, most, generator=generator)

    middle = images.mean((1, 2), keepdim=True)
    images.sub_(middle).mul_(1 + spread(CONTRAST, 1)).add_(middle)
    images.mul_(1 + spread(GAIN, channels)).add_(spread(BRIGHTNESS, 1))
    return images.round_().clamp_(0, 255).byte().view_as(pixels)


def _places(side: int, count: int, generator: torch.Generator) -> Tensor:
    """0 ... side - 1 moved by up to SHIFT and reflected at both ends, (count, side)."""
    start = torch.randint(-SHIFT, SHIFT + 1, (count, 1), generator=generator)
    moved = (torch.arange(side) + start).abs()
    return torch.where(moved < side, moved, 2 * (side - 1) - moved)


def blocks(store: ImageStore, count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """All rows (b, D), the originals first; no block holds two copies of one image."""
    n = len(store)
    for start in range(0, count, n):
        for first in range(0, min(n, count - start), BLOCK):
            here = store.pixels[first : min(first + BLOCK, n, count - start)]
            images = here.view(-1, *store.shape[1:])
            yield here if start == 0 else changed(images, generator).flatten(1)


def write(store: ImageStore, out: Path, count: int, seed: int) -> None:
    """OUT/images.h5, whole or not at all; one that stands there must be of the same command.

    Raises:
        InputError: fewer rows than originals, or images too small to shift.
        StoreError: `out` holds other images, or the disk refuses.
    """
    _, _, height, width = store.shape
    if count < len(store) or min(height, width) <= SHIFT:
        raise InputError(
            f"{count} rows of {len(store)} images {height} x {width}: wanted at least the originals, each "
            f"wider than the shift of {SHIFT} pixels"
        )
    source = hashlib.blake2b(f"{store.fingerprint} {seed} {BLOCK}".encode(), digest_size=16).hexdigest()
    recipe = hdf5file.Recipe(
        size=height, grey=store.shape[1] == 1, background="none", source=source, listed=count
    )
    whole, partial = out / IMAGES, out / f"{IMAGES}.partial"
    if whole.exists():
        if hdf5file.read_header(whole).recipe != recipe:
            raise StoreError(f"{shown(out)}: holds other images; name another OUT, or remove this one")
        return
    names = [store.paths[i] for i in range(len(store))]
    paths = [f"{names[row % len(store)]} {row // len(store)}" for row in range(count)]
    with disk_errors(out, "writing in"):
        hdf5file.create(
            partial,
            (count, *store.shape[1:]),
            recipe,
            labels=torch.full((count,), -1).numpy(),
            classes=(),
            paths=Texts.of(paths),
        )
        at = hdf5file.read_header(partial).pixels_at
        generator = torch.Generator().manual_seed(seed)
        with partial.open("r+b") as file, tqdm(total=count, desc="making images", unit="image") as bar:
            for block in blocks(store, count, generator):
                at += write_at(file.fileno(), block.numpy().data.cast("B"), at)
                bar.update(len(block))
        seal(partial)
        partial.replace(whole)
        sync_folder(out)


def near_duplicates(path: Path, seed: int) -> Nearness:
    """The nearest other row of a random sample, by comparing with all; one block of rows at a time.

    Read from the file, not from its map: pages of a map count as this process' memory.
    """
    header = hdf5file.read_header(path)
    count, dim = header.shape[0], header.row_bytes
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:SAMPLE].sort().values
    mapped = ImageStore.open(path).pixels
    sample = mapped[rows].float().sub_(127.5)
    best = torch.full((len(rows),), torch.inf)
    with path.open("rb") as file:
        file.seek(header.pixels_at)
        for start in tqdm(range(0, count, BLOCK), "near-duplicates", unit="block"):
            content = bytearray(file.read(min(BLOCK, count - start) * dim))
            block = torch.frombuffer(content, dtype=torch.uint8).view(-1, dim).float().sub_(127.5)
            squares = torch.addmm(block.square().sum(1), sample, block.T, alpha=-2)
            inside = (rows >= start) & (rows < start + len(block))
            squares[inside, rows[inside] - start] = torch.inf
            best = torch.minimum(best, squares.amin(1))
    squared = best + sample.square().sum(1)
    return Nearness(rows, squared.clamp_min(0).div(dim).sqrt())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="a store or index: OUT of nnflow index")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=1_000_000, help="images in OUT, originals included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--index", action="store_true", help="build PCA embedding and index there too")
    options = parser.parse_args()
    try:
        source = ImageStore.open(options.source)
        with folder_lock(options.out):
            write(source, options.out, options.count, options.seed)
        near = near_duplicates(options.out / IMAGES, options.seed)
        if options.index:
            NeighbourIndex.build(ImageStore.open(options.out), options.out, progress=True)
    except NNFlowError as error:
        print(f"make_large_set: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.count:,} images, the first {len(source):,} the originals")
    print(f"{near.duplicated} of {len(near.rows)} sampled have another within {NEAR:g} grey levels (RMS)")
    low, median = near.levels.quantile(0.01), near.levels.median()
    print(f"nearest other image: 1st percentile {low:.1f}, median {median:.1f} grey levels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
