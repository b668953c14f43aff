"""Each query by the way that a calibration chose for its time."""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from nnflow.calibration import EXACT, Calibration, Plan
from nnflow.farfield import NearAndFar
from nnflow.index import NeighbourIndex
from nnflow.ladder import Ladder
from nnflow.nearfield import NearestImages
from nnflow.pixels import PixelRows
from nnflow.scan import AllImages
from nnflow.support import Part, Support


class Calibrated(Support):
    """Each query by the ladder that a plan names for its time."""

    def __init__(self, rows: PixelRows, plan: Plan, ways: Mapping[str, Support], *, budget: int) -> None:
        super().__init__(rows, budget=budget)
        self.plan, self.ways = plan, ways
        self._edges = torch.tensor(plan.times, device=rows.device)

    @classmethod
    def within(cls, tolerance: float, index: NeighbourIndex, rows: PixelRows, *, budget: int) -> "Calibrated":
        """The cheapest that the calibration of `index` allows.

        Raises:
            StoreError: the index has not been calibrated.
        """
        plan = Calibration.open(index).plan(tolerance)
        ways = {name: support_of(name, index, rows, budget) for name in set(plan.ladders)}
        return cls(rows, plan, ways, budget=budget)

    def without_far(self) -> "Calibrated":
        """The same images in pixels, and nothing of the others."""
        ways = {name: way.without_far() for name, way in self.ways.items()}
        return Calibrated(self.rows, self.plan, ways, budget=self.budget)

    def reach(self, mean: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """As any of the ways it takes."""
        return next(iter(self.ways.values())).reach(mean)

    def part(self, x: Float[Tensor, "B D"], t: Float[Tensor, " B"], images: slice) -> Part:
        """The sum for queries `x` at times `t`, those of one ladder together."""
        stretch = torch.bucketize(t, self._edges, right=True).tolist()
        names = [self.plan.ladders[place] for place in stretch]
        parts, rows = [], []
        for name in dict.fromkeys(names):
            mine = torch.tensor([row for row, other in enumerate(names) if other == name], device=x.device)
            parts.append(self.ways[name].part(x[mine], t[mine], images))
            rows.append(mine)
        joined = Part.joined(parts, rows)
        errors = torch.tensor([self.plan.errors[place] for place in stretch], device=x.device)
        exact = joined.errors == 0
        return joined.with_errors(errors.double().masked_fill(exact, 0.0))


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
