"""The seam: which stored images enter the sum of docs/field.md, eq. 1, and what is known of the others.

A support answers for a batch of queries with a `Part`: the soft-max mean of the images it summed, and an
upper bound on the log-mass of those it left out. All images (`scan`), the k nearest (`nearfield`) and any
other way to split the sum differ in nothing else.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from nnflow.pixels import PixelRows
from nnflow.weighted import WeightedMean


@dataclass(frozen=True)
class Part:
    """A summed part of the images.

    Attributes:
        weighted: its log-mass, with logits -|x - t x_i|^2 / (2 (1-t)^2), and its mean.
        log_tail: upper bound on the log-mass of the images left out; -inf for none, inf for unknown.
        ids: the images summed, -1 for none; None when all of them were.
    """

    weighted: WeightedMean
    log_tail: Float[Tensor, " B"]
    ids: Int[Tensor, "B K"] | None


class Support(ABC):
    """A way to sum over the stored images; build once, query many times."""

    def __init__(self, rows: PixelRows, *, budget: int) -> None:
        self.rows = rows
        self.budget = budget

    @abstractmethod
    def part(self, x: Float[Tensor, "B D"], t: Float[Tensor, " B"], images: slice) -> Part:
        """The sum for queries `x` at times `t` in [0, 1), over the stored images `images`."""

    @abstractmethod
    def reach(self, mean: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """Upper bound on the distance from `mean` to the furthest stored image, float64."""
