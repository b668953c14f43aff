"""How far u* is deterministic: cosines between it and the conditional velocities that it averages.

    cos(t) = cos( u*(x_t, t), x1 - x0 ),   x_t = (1 - t) x0 + t x1

over pairs of noise x0 and stored images x1; t = 0 is noise, t = 1 data. Where all but a rounding of the
softmax mass is on x1 itself, u* is x1 - x0, and stays so at every later t of that pair (docs/field.md,
section 7): from there on the field is not asked.

Axes:  P pairs   T times
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from nnflow.evaluation import draw_pairs
from nnflow.figures.parts import Parts
from nnflow.metrics import pair_errors, wilson_interval
from nnflow.path import interpolate
from nnflow.sampling import is_one_image
from nnflow.velocity import EmpiricalVelocity, Estimate

ALIGNED = 0.9  # the cosine above which the paper calls a pair aligned
COLLAPSED = 2.0  # effective images below which u* is more than half one image
RISE = (0.7, 0.95)  # shares between which a curve's rise is timed: on photographs all begin below the first
BINS = 50  # of cosines in [-1, 1]
_DIGITS = 7  # of a cosine in JSON
_BLOCK_BYTES = 1 << 26  # of the float32 images of one block of pairs ...
_MOST_PAIRS = 128  # ... and pairs of one part: a kill costs no more than these
_SAME = 1e-5  # of a mean and x1, where one image holds all but 1e-6 of the mass (sampling)


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Cosines of one set of images, over time.

    Attributes:
        name: of the set.
        shape: (n, C, H, W).
        times: 0 = noise, 1 = data.
        counts: for each time, of the pairs in `BINS` equal bins of the cosine from -1 to 1.
        share: of the pairs with a cosine above 0.9, with its 95 % Wilson interval.
        low: lower end of it.
        high: upper end of it.
        p10: 10th percentile of the cosine.
        median: of the cosine.
        p90: 90th percentile.
        ess: median of the effective number of images 1 / sum w^2.
        pairs: behind every number.
    """

    name: str
    shape: tuple[int, int, int, int]
    times: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]
    share: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    p10: tuple[float, ...]
    median: tuple[float, ...]
    p90: tuple[float, ...]
    ess: tuple[float, ...]
    pairs: int

    @property
    def aligned_from(self) -> float | None:
        """The first time from which on at least 90 % of the pairs are aligned; None where never."""
        return first_lasting([share >= ALIGNED for share in self.share], self.times)

    @property
    def collapsed_from(self) -> float | None:
        """The first time from which on u* is less than two images for half of the pairs; None where never."""
        return first_lasting([ess < COLLAPSED for ess in self.ess], self.times)

    @property
    def rise(self) -> float | None:
        """Time that the share takes from 70 to 95 %, for the last time; None where it does not reach that."""
        start, end = (crossed(self.share, self.times, level) for level in RISE)
        return None if start is None or end is None else end - start

    def to_dict(self) -> dict[str, Any]:
        """All of it, and what follows from it."""
        return {
            **asdict(self),
            "aligned_from": self.aligned_from,
            "collapsed_from": self.collapsed_from,
            "rise": self.rise,
        }


def first_lasting(holds: Sequence[bool], times: Sequence[float]) -> float | None:
    """The earliest of `times` from which on all hold."""
    found = None
    for held, t in zip(reversed(holds), reversed(times), strict=True):
        if not held:
            break
        found = t
    return found


def crossed(values: Sequence[float], times: Sequence[float], level: float) -> float | None:
    """Where `values` come to exceed `level` for good, linear between times; None where they do not."""
    if values[-1] < level:
        return None
    for i in range(len(values) - 1, 0, -1):
        if values[i - 1] < level:
            part = (level - values[i - 1]) / (values[i] - values[i - 1])
            return times[i - 1] + part * (times[i] - times[i - 1])
    return times[0]


def times_of(count: int) -> tuple[float, ...]:
    """`count` times 0, 1/count, ...: the paper's 0, .01, ... .99 for 100."""
    return tuple(i / count for i in range(count))


@dataclass(frozen=True)
class Paths:
    """What was measured along the paths of P pairs, float64.

    Attributes:
        cosines: of u* and x1 - x0.
        ess: effective number of images at x_t.
    """

    cosines: Float[Tensor, "P T"]
    ess: Float[Tensor, "P T"]


def measure_paths(
    field: EmpiricalVelocity,
    *,
    times: Sequence[float],
    pairs: int,
    seed: int,
    parts: Parts,
    key: Mapping[str, Any],
    name: str,
    progress: bool = False,
) -> Paths:
    """Every pair at each time; a block of pairs is a part.

    Args:
        field: u*; x1 is drawn from its images.
        times: ascending, in [0, 1).
        pairs: of noise and image.
        seed: of these.
        parts: where they are kept.
        key: what `field` depends on.
        name: of the set, in the parts' names and on the bar.
        progress: show a bar.
    """
    block = max(1, min(_MOST_PAIRS, pairs, _BLOCK_BYTES // (4 * math.prod(field.shape))))
    blocks = [slice(start, min(start + block, pairs)) for start in range(0, pairs, block)]
    found = []
    with tqdm(total=pairs, desc=f"pairs, {name}", unit="pair", disable=not progress) as bar:
        for rows in blocks:
            some = {"times": list(times), "pairs": [rows.start, rows.stop], "of": pairs, "seed": seed}
            measure = partial(_block, field, times, pairs, seed, rows)
            found.append(parts.get(f"{name}-{rows.start:05d}", dict(key) | some, measure))
            bar.update(rows.stop - rows.start)
    cosines, ess = (
        torch.cat([torch.tensor(part[what], dtype=torch.float64) for part in found])
        for what in ("cosines", "ess")
    )
    return Paths(cosines, ess)


def _block(
    field: EmpiricalVelocity, times: Sequence[float], pairs: int, seed: int, rows: slice
) -> dict[str, Any]:
    x0, x1, _ = draw_pairs(field.store, pairs, seed=seed, rows=rows)
    found = along_paths(field, x0.to(field.device), x1.to(field.device), times)
    return {
        "cosines": [[round(value, _DIGITS) for value in row] for row in found.cosines.tolist()],
        "ess": [[float(f"{value:.{_DIGITS}g}") for value in row] for row in found.ess.tolist()],
    }


def along_paths(
    field: EmpiricalVelocity,
    x0: Float[Tensor, "P C H W"],
    x1: Float[Tensor, "P C H W"],
    times: Sequence[float],
) -> Paths:
    """The pairs (x0, x1) at each of ascending `times`, on the CPU."""
    cosines = torch.ones(len(x0), len(times), dtype=torch.float64)
    ess = torch.ones_like(cosines)
    left = torch.arange(len(x0), device=x0.device)
    for column, t in enumerate(times):
        if not len(left):
            break
        ends = x1[left]
        estimate = field.estimate(interpolate(x0[left], ends, t), t)
        rows = left.cpu()
        cosines[rows, column] = pair_errors(estimate.velocity, ends - x0[left]).cosine.cpu()
        ess[rows, column] = estimate.ess.double().cpu()
        left = left[~_settled(estimate, ends)]
    return Paths(cosines, ess)


def _settled(estimate: Estimate, x1: Float[Tensor, "P C H W"]) -> Bool[Tensor, " P"]:
    """Whether the whole mass is on x1 (or on a copy of it)."""
    away = (estimate.mean - x1).abs().flatten(1).amax(1)
    return is_one_image(estimate) & (away <= _SAME)


def summary(paths: Paths, times: Sequence[float], *, name: str, shape: Sequence[int]) -> Alignment:
    """Histogram, share above 0.9 and percentiles at each time."""
    cosines, pairs = paths.cosines, len(paths.cosines)
    # The last bin takes 1 itself; rounding may put a cosine at 1 + 2e-16.
    bins = ((cosines.clamp(-1, 1) + 1) * (BINS / 2)).long().clamp_max(BINS - 1)
    above = (cosines > ALIGNED).sum(0).tolist()
    intervals = [wilson_interval(count, pairs) for count in above]
    count, channels, height, width = shape
    p10, median, p90 = (tuple(cosines.quantile(q, 0).tolist()) for q in (0.1, 0.5, 0.9))
    return Alignment(
        name=name,
        shape=(count, channels, height, width),
        times=tuple(times),
        counts=tuple(tuple(torch.bincount(column, minlength=BINS).tolist()) for column in bins.T),
        share=tuple(n / pairs for n in above),
        low=tuple(low for low, _ in intervals),
        high=tuple(high for _, high in intervals),
        p10=p10,
        median=median,
        p90=p90,
        ess=tuple(paths.ess.quantile(0.5, 0).tolist()),
        pairs=pairs,
    )
