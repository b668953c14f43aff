"""Sets of points in the plane, as stores of images of two pixels: every field takes them as they are.

A point (a, b) in [-1, 1]^2 is an image of shape (C, H, W) = (1, 1, 2), its values on the grid of stored
pixels, 1/127.5 apart. So the plane is measured by the code that measures images, by no formula of its
own.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from nnflow.errors import InputError
from nnflow.files import shown
from nnflow.store import ImageStore, to_float, to_uint8

SHAPE = (1, 1, 2)


def two_moons(count: int, draw: torch.Generator) -> Float[Tensor, "n 2"]:
    """Two interleaved half circles, blurred by noise of a standard deviation of 0.05 radii."""
    angle = math.pi * torch.rand(count, generator=draw)
    lower = torch.arange(count) % 2 == 1
    x = torch.where(lower, 1 - angle.cos(), angle.cos())
    y = torch.where(lower, 0.5 - angle.sin(), angle.sin())
    points = torch.stack([x, y], 1) + 0.05 * torch.randn(count, 2, generator=draw)
    return (points - torch.tensor([0.5, 0.25])) / 1.7


def eight_gaussians(count: int, draw: torch.Generator) -> Float[Tensor, "n 2"]:
    """Eight clusters of a standard deviation of 0.06, on a circle of radius 0.8."""
    angle = (torch.arange(count) % 8) * (math.pi / 4)
    centres = 0.8 * torch.stack([angle.cos(), angle.sin()], 1)
    return centres + 0.06 * torch.randn(count, 2, generator=draw)


def checkerboard(count: int, draw: torch.Generator) -> Float[Tensor, "n 2"]:
    """Uniform on every other square of four by four."""
    squares = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0])
    chosen = squares[torch.arange(count) % len(squares)]
    return (chosen + torch.rand(count, 2, generator=draw)) * 0.45 - 0.9


def three_points(count: int, _: torch.Generator) -> Float[Tensor, "n 2"]:
    """The corners of a triangle, whatever the count."""
    del count
    return torch.tensor([[-0.7, -0.5], [0.8, -0.35], [0.05, 0.8]])


SETS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "three points": three_points,
    "two moons": two_moons,
    "eight Gaussians": eight_gaussians,
    "checkerboard": checkerboard,
}


def points_store(name: str, count: int, seed: int) -> ImageStore:
    """The set called `name` of `count` points, held in memory.

    Args:
        name: one of `SETS`.
        count: of points; three points are three.
        seed: of their places.

    Raises:
        InputError: no such set, or no points.
    """
    if name not in SETS:
        raise InputError(f"point set {shown(name)!r}: wanted one of {', '.join(SETS)}")
    if count < 1:
        raise InputError(f"{count} points: wanted at least one")
    return store_of_points(SETS[name](count, torch.Generator().manual_seed(seed)))


def store_of_points(points: Float[Tensor, "n 2"]) -> ImageStore:
    """Points in [-1, 1]^2, each moved to the grid of stored pixels, as a store in memory."""
    pixels = to_uint8(points)
    digest = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).hexdigest()
    return ImageStore(
        folder=Path(),
        shape=(len(pixels), *SHAPE),
        labels=torch.full((len(pixels),), -1),
        classes=(),
        paths=[str(i) for i in range(len(pixels))],
        fingerprint=digest,
        pixels=pixels,
    )


def places(store: ImageStore) -> Float[Tensor, "n 2"]:
    """The points of a store of points."""
    return to_float(store.pixels)
