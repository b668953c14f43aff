"""A set of images to measure: a store, or a tensor of samples. Both are asked for rows by number."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnflow.errors import InputError
from nnflow.store import ImageStore

ImageSet = ImageStore | Tensor  # float (S, C, H, W) in [-1, 1]


def image_shape(images: ImageSet) -> tuple[int, int, int]:
    """(C, H, W)."""
    _, channels, height, width = images.shape
    return int(channels), int(height), int(width)


def check_images(images: ImageSet, what: str, wanted: tuple[int, int, int]) -> None:
    """Refuses what cannot be compared with images of shape `wanted`.

    Raises:
        InputError: no images, of another shape or type, or not finite.
    """
    if isinstance(images, Tensor) and (images.ndim != 4 or not images.is_floating_point()):
        raise InputError(
            f"{what} of shape {tuple(images.shape)} and {images.dtype}: "
            "wanted float images (S, C, H, W) in [-1, 1]"
        )
    if len(images) == 0:
        raise InputError(f"no {what}: pass at least one image, or none at all")
    if image_shape(images) != wanted:
        raise InputError(
            f"{what} are {image_shape(images)} (C, H, W) and the training images {wanted}: "
            "index or sample them at the same size and colours"
        )
    if isinstance(images, Tensor) and not bool(images.isfinite().all()):
        row = int((~images.isfinite()).flatten(1).any(1).nonzero()[0, 0])
        raise InputError(f"{what}: image {row} holds NaN or infinity; wanted numbers in [-1, 1]")


def take(images: ImageSet, ids: Int[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
    """float32 of the images named, on the CPU."""
    return images[ids].float().cpu() if isinstance(images, Tensor) else images.images(ids)


def draw(images: ImageSet, count: int | None, *, seed: int) -> Int[Tensor, " S"]:
    """Rows of `count` different images in an order that `seed` draws; all of them when None.

    Raises:
        InputError: more than there are, or none.
    """
    if count is not None and not 1 <= count <= len(images):
        raise InputError(f"{count} images wanted of a set of {len(images)}: name 1 to {len(images)}")
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
