"""KID: the squared maximum mean discrepancy of two sets of features under a cubic kernel, unbiased.

    k(x, y) = (x . y / F + 1)^3                                                              (1)
    MMD^2 = sum_{i != j} k(x_i, x_j) / m(m - 1) + sum_{i != j} k(y_i, y_j) / m(m - 1)
            - 2 sum_{i, j} k(x_i, y_j) / m^2                                                 (2)

over subsets of m images from either side (Binkowski et al. 2018, arXiv 1801.01401). Its expectation is
the same for any number of images, 0 for two sets from one distribution, so single values may be
negative.

Axes:  S samples   R references   F values of a feature (G = F, or it is refused)   m images of a subset
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nnflow.errors import InputError

SUBSETS, SIZE = 100, 1000  # of the paper's experiments and of the usual implementations


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """Eq. 2, averaged over subsets.

    Attributes:
        value: the mean, what is reported as KID.
        spread: standard deviation over the subsets, which is what the literature prints after the
            +-. Not an error of `value`: the subsets share images.
        subsets: how many.
        size: m.
        count: S, drawn from.
        reference_count: R, drawn from.
        seed: of the draws.
    """

    value: float
    spread: float
    subsets: int
    size: int
    count: int
    reference_count: int
    seed: int


def kernel_distance(
    samples: Float[Tensor, "S F"],
    reference: Float[Tensor, "R G"],
    *,
    subsets: int = SUBSETS,
    size: int = SIZE,
    seed: int = 0,
) -> KernelDistance:
    """KID of two sets of features.

    Args:
        samples: of one set.
        reference: of the other.
        subsets: of `size` images from each side, drawn without replacement, each anew.
        size: m; of a smaller set all are taken.
        seed: of the subsets.

    Raises:
        InputError: fewer than two images on a side, no subsets, or other features than the reference's.
    """
    m = min(size, len(samples), len(reference))
    if m < 2 or subsets < 1:
        raise InputError(
            f"{subsets} subsets of {m} images: wanted at least one subset, and two images on each side"
        )
    if samples.shape[1] != reference.shape[1]:
        raise InputError(
            f"features of {samples.shape[1]} values and a reference of {reference.shape[1]}: "
            "take both from the same extractor"
        )
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(subsets, dtype=torch.float64)
    for subset in range(subsets):
        sides = []
        for features in (samples, reference):
            rows = torch.randperm(len(features), generator=generator)[:m]
            sides.append(features[rows.to(features.device)].double())
        found[subset] = squared_mmd(*sides)
    return KernelDistance(
        value=float(found.mean()),
        spread=float(found.std(unbiased=False)),
        subsets=subsets,
        size=m,
        count=len(samples),
        reference_count=len(reference),
        seed=seed,
    )


def squared_mmd(x: Float[Tensor, "m F"], y: Float[Tensor, "l F"]) -> float:
    """Eq. 2 of all of x and y, each at least two."""
    within = sum(
        (kernel.sum() - kernel.diagonal().sum()) / (len(kernel) * (len(kernel) - 1))
        for kernel in (_cubic(x, x), _cubic(y, y))
    )
    return float(within - 2 * _cubic(x, y).mean())


def _cubic(x: Tensor, y: Tensor) -> Float[Tensor, "m l"]:
    """Eq. 1."""
    return torch.mm(x, y.T).div_(x.shape[1]).add_(1).pow_(3)
