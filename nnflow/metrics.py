"""How near generated images lie to the training set, and how far a network lies from u*.

    memorised:      d1 <= ratio * d2                                                        (1)
    squared error:  |v - u*|^2 / D                                                          (2)
    relative error: |v - u*| / |u*|                                                         (3)
    cosine:         v . u* / (|v| |u*|)                                                     (4)

d1 <= d2 are the L2 distances of one image to its two nearest training images, pixels in [-1, 1].
Axes: S images, B pairs of noise and image, D = C*H*W values of one image.

All but `memorised_fraction` are pure functions of numbers: they read no file and search nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnflow.errors import InputError
from nnflow.index import NeighbourIndex
from nnflow.scan import nearest_images

MEMORISED_RATIO = 1 / 3
Z_95 = 1.959964  # 97.5 % quantile of the standard normal: a two-sided interval of 95 %

# A zero vector has no direction and no size to be relative to. Dividing by this instead leaves
# every result finite in float64, and a wrong answer to a zero vector visibly huge.
_TINY = 1e-38


@dataclass(frozen=True, kw_only=True)
class MemorisedFraction:
    """Share of images that count as copies of a training image by eq. 1.

    Attributes:
        fraction: in [0, 1].
        low: lower end of the 95 % Wilson interval.
        high: upper end.
        memorised: images that count.
        images: images looked at.
        ratio: the threshold of eq. 1 they were counted at.
    """

    fraction: float
    low: float
    high: float
    memorised: int
    images: int
    ratio: float


@dataclass(frozen=True, kw_only=True)
class DistanceHistogram:
    """Counts of distances in the bins between `edges`, the last bin closed at both ends."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PairErrors:
    """Eqs. 2 to 4 for each pair, float64."""

    squared: Float[Tensor, " B"]
    relative: Float[Tensor, " B"]
    cosine: Float[Tensor, " B"]


@dataclass(frozen=True, kw_only=True)
class VelocityError:
    """Eqs. 2 to 4 over the same `pairs` at each of `times`.

    Attributes:
        times: 0 = noise, 1 = data.
        mean_squared: mean of eq. 2, per dimension.
        relative_p50: median of eq. 3.
        relative_p90: its 90th percentile.
        cosine: mean of eq. 4, in [-1, 1].
        pairs: pairs behind every number.
    """

    times: tuple[float, ...]
    mean_squared: tuple[float, ...]
    relative_p50: tuple[float, ...]
    relative_p90: tuple[float, ...]
    cosine: tuple[float, ...]
    pairs: int


def wilson_interval(successes: int, trials: int, *, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), by default at 95 %.

    It keeps a width at 0 and at 1, where the textbook interval has none.

    Raises:
        InputError: no trials, or successes outside 0 ... trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise InputError(
            f"{successes} of {trials}: an interval needs at least one trial and 0 to all successes"
        )
    fraction = successes / trials
    shrink = 1 + z * z / trials
    middle = (fraction + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(fraction * (1 - fraction) / trials + (z / (2 * trials)) ** 2)
    # At 0 and 1 the end is exactly that; rounding alone would move it inwards past the fraction.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == trials else middle + half
    return low, high


def count_memorised(distances: Tensor, *, ratio: float = MEMORISED_RATIO) -> MemorisedFraction:
    """Share of images far nearer to one training image than to any other (eq. 1).

    `<=` and not `<`, so that a copy of an image stored twice (d1 = d2 = 0) counts.

    Args:
        distances: (S, 2) L2 distances (not squared) to the two nearest training images, nearest
            first, computed by difference.
        ratio: in (0, 1); 1/3 by default, as is usual for CIFAR-10.

    Raises:
        InputError: no images, a ratio outside (0, 1), or a row that is not ascending and finite.
    """
    if distances.ndim != 2 or distances.shape[1] != 2:
        raise InputError(
            f"distances of shape {tuple(distances.shape)}: wanted (S, 2), the two nearest of each"
        )
    images = distances.shape[0]
    if images == 0:
        raise InputError("no images: the memorised fraction of nothing is undefined; pass at least one")
    if not 0 < ratio < 1:
        raise InputError(f"ratio {ratio:g}: wanted a number between 0 and 1, such as 1/3")
    first, second = distances.double().unbind(1)
    wrong = ~((first >= 0) & (first <= second) & second.isfinite())
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise InputError(
            f"distances of row {row} are {first[row]:g}, {second[row]:g}: wanted finite numbers "
            "from 0, the nearest first"
        )
    memorised = int((first <= ratio * second).sum())
    low, high = wilson_interval(memorised, images)
    return MemorisedFraction(
        fraction=memorised / images,
        low=low,
        high=high,
        memorised=memorised,
        images=images,
        ratio=ratio,
    )


def memorised_fraction(
    samples: Tensor, index: NeighbourIndex, *, flip: bool = False, ratio: float = MEMORISED_RATIO
) -> MemorisedFraction:
    """Memorised share of `samples` against all images behind `index`, by an exact scan of them.

    Args:
        samples: float32 (S, C, H, W) in [-1, 1].
        index: only its store is used; an approximate search would miss neighbours.
        flip: mirror images count as their image, as they must of what was trained or sampled with flips.
        ratio: the threshold of eq. 1.

    Raises:
        InputError: samples of another shape than the stored images, none at all, or fewer than two
            images stored.
    """
    need_two(len(index.store))
    if samples.shape[0] == 0:
        raise InputError("no samples: the memorised fraction of nothing is undefined; pass at least one")
    near = nearest_images(index.store, samples.cpu(), 2, flip=flip)
    return count_memorised(near.distances, ratio=ratio)


def need_two(stored: int) -> None:
    """Refuses a store in which eq. 1 has no d2.

    Raises:
        InputError: fewer than two images stored.
    """
    if stored < 2:
        raise InputError(
            f"{stored} image stored: 'memorised' compares the two nearest training images; index at least two"
        )


def histogram_edges(distances: Sequence[Tensor], *, bins: int = 40) -> tuple[float, ...]:
    """Edges of `bins` equal bins from 0 to the largest of `distances`, for histograms to share."""
    largest = max((float(d.max()) for d in distances if d.numel()), default=0.0)
    top = largest if largest > 0 else 1.0  # all of them copies: any width will do
    return (*(top * i / bins for i in range(bins)), top)


def count_distances(distances: Float[Tensor, " S"], edges: tuple[float, ...]) -> DistanceHistogram:
    """Histogram of `distances` over ascending `edges`.

    Raises:
        InputError: a distance outside the edges, which would vanish silently.
    """
    bounds = torch.tensor(edges, dtype=torch.float64)
    values = distances.double().cpu()
    inside = (values >= bounds[0]) & (values <= bounds[-1])
    if not bool(inside.all()):
        outside = float(values[~inside][0])
        raise InputError(
            f"distance {outside:g} lies outside the histogram's edges {edges[0]:g} to {edges[-1]:g}"
        )
    bins: Int[Tensor, " S"] = torch.bucketize(values, bounds[1:-1], right=True)
    counts = torch.bincount(bins, minlength=len(edges) - 1)
    return DistanceHistogram(edges=edges, counts=tuple(counts.tolist()))


def pair_errors(velocity: Float[Tensor, "B C H W"], reference: Float[Tensor, "B C H W"]) -> PairErrors:
    """Eqs. 2 to 4 of each pair; `reference` is u*.

    In float64: float32 takes every cosine above 1 - 3e-8 for 1.
    """
    ours = velocity.flatten(1).double()
    theirs = reference.flatten(1).double()
    difference = (ours - theirs).norm(dim=1)
    size, wanted = ours.norm(dim=1), theirs.norm(dim=1)
    return PairErrors(
        squared=difference.square() / ours.shape[1],
        relative=difference / wanted.clamp_min(_TINY),
        cosine=(ours * theirs).sum(1) / (size * wanted).clamp_min(_TINY),
    )


def summarise(times: Sequence[float], errors: Sequence[PairErrors]) -> VelocityError:
    """The errors of all pairs at each time, `errors[i]` at `times[i]`, as means and percentiles."""
    counts = {len(error.squared) for error in errors}
    assert len(errors) == len(times), "one set of errors for each time"
    assert len(counts) == 1, "the same pairs at every time"
    return VelocityError(
        times=tuple(times),
        mean_squared=tuple(float(e.squared.mean()) for e in errors),
        relative_p50=tuple(float(e.relative.quantile(0.5)) for e in errors),
        relative_p90=tuple(float(e.relative.quantile(0.9)) for e in errors),
        cosine=tuple(float(e.cosine.mean()) for e in errors),
        pairs=counts.pop(),
    )
