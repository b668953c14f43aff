"""Each query by the way that a calibration chose for its time, or by two in turn.

Around the collapse some queries of one time have settled on one image and others have not. "64/32 alone else
512/100" asks the cheap way of all of them; where one image holds 99 % of what it summed, its sum is taken,
and the others are asked again, the dear way (docs/field.md, section 12).
"""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnflow.calibration import EXACT, Calibration, Plan, ways_of
from nnflow.farfield import NearAndFar
from nnflow.index import NeighbourIndex
from nnflow.ladder import Ladder
from nnflow.nearfield import NearestImages
from nnflow.pixels import PixelRows
from nnflow.scan import AllImages
from nnflow.support import Part, Support

_NONE = -1  # no way left to be asked
_SETTLED = 1.02  # ESS of two images that hold 99 % and 1 %


def settled(part: Part) -> Bool[Tensor, " B"]:
    """Which queries' sums are, but for 1 %, one image."""
    return part.weighted.ess <= _SETTLED


class Calibrated(Support):
    """Each query by the ladder that a plan names for its time."""

    def __init__(self, rows: PixelRows, plan: Plan, ways: Mapping[str, Support], *, budget: int) -> None:
        super().__init__(rows, budget=budget)
        self.plan, self.ways = plan, ways
        self._edges = torch.tensor(plan.times, device=rows.device)
        self._errors = torch.tensor(plan.errors, dtype=torch.float64, device=rows.device)
        # The ways' numbers; those that others follow come first, so that each is called once.
        turns = [ways_of(name) for name in plan.ladders]
        firsts = {turn[0] for turn in turns if len(turn) > 1}
        self._order = sorted(ways, key=lambda way: (way not in firsts, way))
        number = {way: place for place, way in enumerate(self._order)}
        last = [[number[turn[0]], number[turn[1]] if len(turn) > 1 else _NONE] for turn in turns]
        self._turns = torch.tensor(last, device=rows.device)

    @classmethod
    def within(cls, tolerance: float, index: NeighbourIndex, rows: PixelRows, *, budget: int) -> "Calibrated":
        """The cheapest that the calibration of `index` allows.

        Raises:
            StoreError: the index has not been calibrated.
        """
        plan = Calibration.open(index).plan(tolerance)
        names = {way for ladder in plan.ladders for way in ways_of(ladder)}
        ways = {name: support_of(name, index, rows, budget) for name in names}
        return cls(rows, plan, ways, budget=budget)

    def without_far(self) -> "Calibrated":
        """The same images in pixels, and nothing of the others."""
        ways = {name: way.without_far() for name, way in self.ways.items()}
        return Calibrated(self.rows, self.plan, ways, budget=self.budget)

    def reach(self, mean: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """As any of the ways it takes."""
        return next(iter(self.ways.values())).reach(mean)

    def part(self, x: Float[Tensor, "B D"], t: Float[Tensor, " B"], images: slice) -> Part:
        """The sum for queries `x` at times `t`, those of one way together."""
        stretch = torch.bucketize(t, self._edges, right=True)
        now, then = self._turns[stretch].unbind(1)
        now = now.clone()
        parts, rows = [], []
        while len(waiting := now[now != _NONE]):
            way = int(waiting.min())
            mine = (now == way).nonzero()[:, 0]
            found = self.ways[self._order[way]].part(x[mine], t[mine], images)
            again = (then[mine] != _NONE) & (then[mine] != way) & ~settled(found)
            now[mine] = torch.where(again, then[mine], _NONE)
            parts.append(found.take(~again))
            rows.append(mine[~again])
        joined = Part.joined(parts, rows)
        return joined.with_errors(self._errors[stretch].masked_fill(joined.errors == 0, 0.0))


def support_of(name: str, index: NeighbourIndex, rows: PixelRows, budget: int) -> Support:
    """The way to sum that a calibration calls `name`: "exact", "index/32" or what a `Ladder` is called.

    Raises:
        InputError: no such name.
    """
    if name == EXACT:
        return AllImages(rows, budget=budget)
    if searched := re.fullmatch(r"index/(\d{1,6})", name):
        return NearestImages(index, rows, k=int(searched[1]), budget=budget)
    return NearAndFar(index, rows, ladder=Ladder.parse(name), budget=budget)
