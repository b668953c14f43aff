"""Each query by the way that a calibration chose for its time, or by two in turn.

Around the collapse some queries of one time have settled on one image and others have not. "64/32 alone else
512/100" asks the cheap way of all of them; where one image holds 99 % of what it summed, and what it leaves
of the query looks like noise, its sum is taken, and the others are asked again, the dear way (docs/field.md,
section 12). Ways that differ only in how many images they read in pixels scan the others together.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnflow.calibration import Calibration
from nnflow.farfield import NearAndFar
from nnflow.index import NeighbourIndex
from nnflow.ladder import Ladder
from nnflow.nearfield import NearestImages
from nnflow.pixels import PixelRows
from nnflow.planning import EXACT, Plan, calls_of, kept_by, ways_of
from nnflow.scan import AllImages
from nnflow.support import Part, Support

_NONE = -1  # no way left to be asked
_SETTLED = 1.02  # ESS of two images that hold 99 % and 1 %
_LOOKED_AT = 64  # principal directions in which the noise is looked at: most of the images' variance
_OUTWEIGHED = 20.0  # logarithm of a mass that is 2e-9 of the other's
_LIKELY = 3.09  # standard deviations, of a normal variable: one query of the path in 1,000 is asked again


def settled(
    part: Part, x: Float[Tensor, "B D"], t: Float[Tensor, " B"], directions: Float[Tensor, "r D"]
) -> Bool[Tensor, " B"]:
    """Which queries' sums are, but for 1 %, one image, and that the one whose path they lie on.

    Were it, (x - t mean) / (1 - t) would be the noise x0, and |P x0|^2 chi-squared of r degrees of freedom.
    An image that is not stored lies far from the one found, in the leading directions most of all.

    Args:
        part: what a way found.
        x: the queries.
        t: their times, in [0, 1).
        directions: orthonormal, P.
    """
    noise = (x - t[:, None] * part.weighted.mean.to(x.dtype)) / (1 - t[:, None])
    likely = (noise @ directions.T).square().sum(1) <= _most_noise(len(directions))
    return (part.weighted.ess <= _SETTLED) & likely


def _most_noise(rank: int) -> float:
    """The 99.9th percentile of the chi-squared distribution of `rank` degrees (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * rank)
    return rank * (1 - spread + _LIKELY * spread**0.5) ** 3


def looked_at(index: NeighbourIndex, device: torch.device) -> Float[Tensor, "r D"]:
    """The directions for `settled`."""
    return index.embedding.principal[:_LOOKED_AT].to(device)


@dataclass(frozen=True)
class _Call:
    """Ways that are called together: one alone, or those of one scan by the one that keeps most."""

    support: Support
    several: bool

    @classmethod
    def of(cls, names: Sequence[str], ways: Mapping[str, Support]) -> "_Call":
        """The call of the ways `names`."""
        return cls(ways[max(names, key=kept_by)], len(names) > 1)

    def part(self, x: Tensor, t: Tensor, images: slice, keep: Int[Tensor, " B"]) -> Part:
        """The sum for queries whose ways read so many images in pixels."""
        if self.several and isinstance(self.support, NearAndFar):
            return self.support.part(x, t, images, keep)
        return self.support.part(x, t, images)


class Calibrated(Support):
    """Each query by the ladder that a plan names for its time."""

    def __init__(
        self,
        rows: PixelRows,
        plan: Plan,
        ways: Mapping[str, Support],
        directions: Float[Tensor, "r D"],
        *,
        budget: int,
    ) -> None:
        super().__init__(rows, budget=budget)
        self.plan, self.ways, self.directions = plan, ways, directions
        self._edges = torch.tensor(plan.times, device=rows.device)
        self._errors = torch.tensor(plan.errors, dtype=torch.float64, device=rows.device)
        turns = [ways_of(name) for name in plan.ladders]
        together = calls_of(plan.ladders)
        # Those that others follow come first, so that each is made once.
        calls = sorted(set(together.values()), key=lambda call: (not call[1], call))
        self._calls = [_Call.of([way for way in ways if together[way] == call], ways) for call in calls]

        def by_turn(value: Callable[[str], int], none: int) -> Tensor:
            pairs = [[value(way) for way in turn] + [none] * (2 - len(turn)) for turn in turns]
            return torch.tensor(pairs, device=rows.device)

        self._turns = by_turn(lambda way: calls.index(together[way]), _NONE)
        self._keeps = by_turn(kept_by, 0)

    @classmethod
    def within(cls, tolerance: float, index: NeighbourIndex, rows: PixelRows, *, budget: int) -> "Calibrated":
        """The cheapest that the calibration of `index` allows.

        Raises:
            StoreError: the index has not been calibrated.
        """
        plan = Calibration.open(index).plan(tolerance)
        names = {way for ladder in plan.ladders for way in ways_of(ladder)}
        ways = {name: support_of(name, index, rows, budget) for name in names}
        return cls(rows, plan, ways, looked_at(index, rows.device), budget=budget)

    def without_far(self) -> "Calibrated":
        """The same images in pixels, and nothing of the others."""
        ways = {name: way.without_far() for name, way in self.ways.items()}
        return Calibrated(self.rows, self.plan, ways, self.directions, budget=self.budget)

    def reach(self, mean: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """As any of the ways it takes."""
        return next(iter(self.ways.values())).reach(mean)

    def part(self, x: Float[Tensor, "B D"], t: Float[Tensor, " B"], images: slice) -> Part:
        """The sum for queries `x` at times `t`, those of one way together."""
        return self._part(x, t, images, torch.arange(len(x), device=x.device))

    def pairs(
        self, x: Float[Tensor, "B D"], others: Float[Tensor, "B D"], t: Float[Tensor, " B"], images: slice
    ) -> Part:
        """As `part`; a query whose like has settled, and outweighs it, is not asked again.

        What outweighed the like in turn would explain its query as well, and stand out as clearly.
        """
        places = torch.arange(2 * len(x), device=x.device)
        return self._part(torch.cat([x, others]), t.repeat(2), images, places.roll(len(x)))

    def _part(self, x: Tensor, t: Tensor, images: slice, like: Int[Tensor, " B"]) -> Part:
        """The sums; the query at place `like` of each is merged with it."""
        stretch = torch.bucketize(t, self._edges, right=True)
        now, then = (turn.clone() for turn in self._turns[stretch].unbind(1))
        keep, keep_then = (turn.clone() for turn in self._keeps[stretch].unbind(1))
        parts, rows = [], []
        settled_mass, mass = (torch.full_like(t, -torch.inf, dtype=torch.float64) for _ in range(2))
        while len(waiting := now[now != _NONE]):
            call = int(waiting.min())
            mine = (now == call).nonzero()[:, 0]
            found = self._calls[call].part(x[mine], t[mine], images, keep[mine])
            again = then[mine] != _NONE
            if again.any():
                alone = settled(found, x[mine], t[mine], self.directions)
                mass[mine] = found.weighted.log_mass
                settled_mass[mine] = mass[mine].masked_fill(~alone, -torch.inf)
                again &= ~(alone | (mass[mine] < settled_mass[like[mine]] - _OUTWEIGHED))
            now[mine] = torch.where(again, then[mine], _NONE)
            keep[mine], then[mine] = keep_then[mine], _NONE
            parts.append(found.take(~again))
            rows.append(mine[~again])
        joined = Part.joined(parts, rows)
        return joined.with_errors(self._errors[stretch].masked_fill(joined.errors == 0, 0.0))


def support_of(name: str, index: NeighbourIndex, rows: PixelRows, budget: int) -> Support:
    """The way to sum of this name: "exact", "index/32", "index/8 in 2 lists" or what a `Ladder` is called.

    Raises:
        InputError: no such name.
    """
    if name == EXACT:
        return AllImages(rows, budget=budget)
    if searched := re.fullmatch(r"index/(\d{1,6})(?: in (\d{1,6}) lists)?", name):
        k, lists = (None if number is None else int(number) for number in searched.groups())
        assert k is not None
        return NearestImages(index, rows, k=k, lists=lists, budget=budget)
    return NearAndFar(index, rows, ladder=Ladder.parse(name), budget=budget)
