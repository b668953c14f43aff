"""Runs of several seeds: their spread, and differences between two of them, paired by seed.

    mean +- q s / sqrt(S),   s = standard deviation over the seeds, S - 1 below              (1)
    P(|T| <= q) = int_0^a cos^(f-1) / int_0^(pi/2) cos^(f-1),   q = sqrt(f) tan a,  f = S - 1     (2)

Eq. 1 is Student's interval; for differences it is that of the paired t test. With the same seed two runs
share weights at the start, batches and noise, so that most of the spread of either cancels in their
difference. It takes the differences for normal: with three seeds q is 4.30, and nobody can check that.
Intervals are of one comparison each: of twenty at 95 %, one is expected not to hold.

Axes:  S seeds
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nnflow.errors import InputError

_STEPS = 20_000  # of the integrals in eq. 2: q of 1 to 100 degrees of freedom to 1e-5


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over several seeds.

    Attributes:
        mean: over the seeds.
        low: lower end of eq. 1.
        high: upper end.
        values: of each seed.
        level: of the interval.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    level: float


def spread(values: Sequence[float], *, level: float = 0.95) -> Spread:
    """Mean and interval of `values`, one of each seed (eq. 1).

    Raises:
        InputError: fewer than two, or NaN.
    """
    count = len(values)
    if count < 2 or not all(math.isfinite(value) for value in values):
        raise InputError(f"{count} seeds: an interval needs finite figures of at least two")
    numbers = torch.tensor(values, dtype=torch.float64)
    half = student_quantile(count - 1, level=level) * float(numbers.std()) / math.sqrt(count)
    mean = float(numbers.mean())
    return Spread(mean=mean, low=mean - half, high=mean + half, values=tuple(values), level=level)


def difference(ours: Sequence[float], theirs: Sequence[float], *, level: float = 0.95) -> Spread:
    """Spread of ours - theirs, seed by seed.

    Raises:
        InputError: unequally many, fewer than two, or NaN.
    """
    if len(ours) != len(theirs):
        raise InputError(f"{len(ours)} and {len(theirs)} seeds: wanted the same seeds on both sides")
    return spread([a - b for a, b in zip(ours, theirs, strict=True)], level=level)


def student_quantile(freedom: int, *, level: float = 0.95) -> float:
    """The q with P(|T| <= q) = level, of Student's T with `freedom` degrees of freedom (eq. 2).

    Raises:
        InputError: no degree of freedom, or a level outside (0, 1).
    """
    if freedom < 1 or not 0 < level < 1:
        raise InputError(f"{freedom} degrees of freedom, level {level:g}: wanted 1 or more, and 0 to 1")
    step = math.pi / 2 / _STEPS
    middles = (torch.arange(_STEPS, dtype=torch.float64) + 0.5) * step
    mass = middles.cos().pow(freedom - 1).cumsum(0)
    mass /= mass[-1].clone()
    above = int(torch.searchsorted(mass, level))
    before = float(mass[above - 1]) if above else 0.0
    angle = (above + (level - before) / (float(mass[above]) - before)) * step
    return math.sqrt(freedom) * math.tan(angle)
