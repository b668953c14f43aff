"""What check_gpu measures, and on what: synthetic images, every way to sum, one line for each finding."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nnflow import EmpiricalVelocity, ImageStore, NeighbourIndex
from nnflow.calibration import FILE as CALIBRATION
from nnflow.config import PRESETS
from nnflow.farfield import NearAndFar
from nnflow.ladder import Ladder
from nnflow.memory import DEFAULT_BUDGET
from nnflow.nearfield import NearestImages
from nnflow.pixels import PixelRows
from nnflow.planned import Calibrated
from nnflow.scan import AllImages
from nnflow.support import Support

TESTS = ("velocity", "farfield", "products", "integers", "targets", "sampling")
K = 100
# ADM at 64 x 64 (Dhariwal & Nichol 2021, arXiv 2105.05233), as near as UNet2DModel comes.
ADM = {name: getattr(PRESETS["imagenet64"], name) for name in ("channels", "blocks", "attention", "head_dim")}

Supports: TypeAlias = dict[str, Callable[[PixelRows], Support]]


@dataclass(frozen=True)
class Sizes:
    """How much is asked."""

    queries: int
    images: tuple[int, int]  # of the agreement: number and side
    timed: tuple[int, int]  # of the benches
    batch: int
    repeats: int
    unet: dict[str, object]
    tests: tuple[str, ...]  # arguments of pytest


FULL = Sizes(64, (4_000, 16), (20_000, 64), 128, 7, ADM, tuple(f"tests/test_{name}.py" for name in TESTS))
SMALL = {"channels": (8, 16), "blocks": 1, "attention": (4,), "head_dim": 8}
TINY = Sizes(8, (400, 8), (400, 8), 4, 2, SMALL, ("tests/test_integers.py", "-k", "largest_bytes"))


@dataclass(frozen=True)
class Line:
    """One line of the table: what was done, what came, what was asked, and whether it holds."""

    part: str
    what: str
    found: str
    asked: str
    fine: bool


@dataclass(frozen=True)
class Bench:
    """Where and how much is measured."""

    device: torch.device
    sizes: Sizes
    folder: Path  # for synthetic images
    data: NeighbourIndex | None


def synthetic(bench: Bench, count: int, side: int, rank: int) -> NeighbourIndex:
    """Images whose variance falls with the frequency, as that of photographs does, indexed."""
    folder = bench.folder / f"{count}-{side}"
    if not (folder / "out" / "manifest.json").exists():
        folder.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(side)
        levels = torch.zeros(count, 3, side, side)
        for scale in (1, 2, 4, 8, 16, 32):
            noise = torch.randn(count, 3, min(scale, side), min(scale, side), generator=generator)
            levels += 50 / scale**0.5 * functional.interpolate(noise, side, mode="bilinear")
        pixels = (levels + 128).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1)
        np.save(folder / "images.npy", pixels.contiguous().numpy())
        ImageStore.build(folder / "images.npy", folder / "out", size=side)
    return NeighbourIndex.build(ImageStore.open(folder / "out"), folder / "out", rank=rank)


def pairs(index: NeighbourIndex, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, stored images and their numbers, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(index), (count,), generator=generator)
    x1 = index.store.images(ids)
    return torch.randn(x1.shape, generator=generator), x1, ids


def supports(index: NeighbourIndex, ladders: Sequence[str]) -> Supports:
    """Every way to sum, made of pixels wherever they are; by tolerance where the index is calibrated."""
    budget = DEFAULT_BUDGET

    def climbed(name: str, rows: PixelRows) -> Support:
        return NearAndFar(index, rows, ladder=Ladder.parse(name), budget=budget)

    ways: Supports = {
        "exact": partial(AllImages, budget=budget),
        f"nearest {K}": partial(NearestImages, index, k=K, budget=budget),
        **{f"near + far {name}": partial(climbed, name) for name in ladders},
    }
    if (index.folder / CALIBRATION).exists():
        ways["tolerance 0.01"] = partial(Calibrated.within, 0.01, index, budget=budget)
    return ways


def placed(
    make: Callable[[PixelRows], Support], index: NeighbourIndex, bench: Bench
) -> Iterator[tuple[str, EmpiricalVelocity]]:
    """The field on the device, its pixels there too, then streamed from the CPU's memory."""
    for place, share in (("pixels on the device", 0.6), ("pixels streamed", 0.0)):
        rows = PixelRows(index.store.pixels, bench.device, share=share)
        yield place, EmpiricalVelocity(make(rows), index.store)
