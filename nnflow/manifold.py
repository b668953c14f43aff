"""Precision and recall of samples: how many lie where the references do, and the other way round.

    precision = share of samples within a ball of some reference                             (1)
    recall    = share of references within a ball of some sample                             (2)

The ball of an image reaches to its k-th nearest neighbour in its own set, itself not counted: improved
precision and recall of Kynkaanniemi et al. 2019 (arXiv 1904.06991), k = 3. A copy of a reference lies in
its ball: a field that only recalls training images has precision 1 against them. Both rise and fall
with the numbers of images, so compare only equal ones.

Axes:  S samples   R references   F values of a feature (G = F, or it is refused)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnflow.errors import InputError
from nnflow.memory import DEFAULT_BUDGET, rows_within
from nnflow.metrics import wilson_interval

NEIGHBOURS = 3
# |x - y|^2 by expansion in float64 errs by about 1e-15 of |x|^2 + |y|^2. Less this share, below which x and
# y are one point; otherwise a copy at distance 1e-8 would fall out of a ball of radius 0.
_SAME = 1e-12
_BLOCK_ROWS = 128  # 10 MB against 10,000 images: several passes over a block that the cache holds


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Eqs. 1 and 2.

    Attributes:
        precision: in [0, 1].
        recall: in [0, 1].
        precision_interval: 95 % Wilson interval, over the samples while the balls stay.
        recall_interval: likewise, over the references.
        k: neighbour that a ball reaches to.
        count: S.
        reference_count: R.
    """

    precision: float
    recall: float
    precision_interval: tuple[float, float]
    recall_interval: tuple[float, float]
    k: int
    count: int
    reference_count: int


def precision_recall(
    samples: Float[Tensor, "S F"],
    reference: Float[Tensor, "R G"],
    *,
    k: int = NEIGHBOURS,
    memory: int = DEFAULT_BUDGET,
) -> PrecisionRecall:
    """Improved precision and recall, by comparing all with all.

    Args:
        samples: features of one set.
        reference: of the other; best as many.
        k: neighbour that a ball reaches to.
        memory: bytes to work in.

    Raises:
        InputError: k below 1, k images or fewer on a side, or other features than the reference's.
    """
    if k < 1 or min(len(samples), len(reference)) <= k:
        raise InputError(
            f"k = {k} with {len(samples)} samples and {len(reference)} references: wanted k from 1, and "
            "more images than k on each side"
        )
    if samples.shape[1] != reference.shape[1]:
        raise InputError(
            f"features of {samples.shape[1]} values and a reference of {reference.shape[1]}: "
            "take both from the same extractor"
        )
    # about the references' centre: the expansion's error is a share of |x|^2 + |y|^2
    theirs = reference.double()
    centre = theirs.mean(0)
    theirs, ours = theirs - centre, samples.double() - centre
    inside = int(_covered(ours, theirs, k, memory).sum())
    reached = int(_covered(theirs, ours, k, memory).sum())
    return PrecisionRecall(
        precision=inside / len(ours),
        recall=reached / len(theirs),
        precision_interval=wilson_interval(inside, len(ours)),
        recall_interval=wilson_interval(reached, len(theirs)),
        k=k,
        count=len(ours),
        reference_count=len(theirs),
    )


def _covered(points: Tensor, centres: Tensor, k: int, memory: int) -> Bool[Tensor, " P"]:
    """Which points lie in the ball of at least one centre."""
    # k + 1, for each centre is its own nearest
    radii = torch.cat(
        [d.topk(k + 1, dim=1, largest=False).values[:, k] for d in _squares(centres, centres, memory)]
    )
    return torch.cat([(d <= radii).any(1) for d in _squares(points, centres, memory)])


def _squares(x: Tensor, y: Tensor, memory: int) -> Iterator[Float[Tensor, "B Y"]]:
    """|x_i - y_j|^2 in blocks of x."""
    sizes = y.square().sum(1)
    rows = rows_within(memory, 2 * 8 * len(y), at_most=_BLOCK_ROWS, what="distances")
    for block in x.split(rows):
        total = block.square().sum(1)[:, None] + sizes
        yield total.addmm_(block, y.T, beta=1 - _SAME, alpha=-2).clamp_min_(0)
