"""The seam: which stored images enter the sum of docs/field.md, eq. 1, and what is known of the others.

A support answers for a batch of queries with a `Part`: the soft-max mean of the images it summed, those it
only estimated among them, and an upper bound on the log-mass of those it left out. All images (`scan`), the
k nearest (`nearfield`), the nearest and an estimate of the rest (`farfield`), and a choice between these
(`planned`) differ in nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from nnflow.pixels import PixelRows
from nnflow.weighted import WeightedMean


@dataclass(frozen=True)
class Part:
    """A summed part of the images.

    Attributes:
        weighted: its log-mass, with logits -|x - t x_i|^2 / (2 (1-t)^2), and its mean.
        log_tail: upper bound on the log-mass of the images left out; -inf for none, inf for unknown.
        ids: the images summed in pixels, -1 for none; not filled in where `whole`.
        whole: whether every image was summed in pixels.
        candidates: how many were.
        log_far: log-mass, within `weighted`, of images that were estimated; -inf for none.
        ladders: the way each query's sum was taken.
        errors: relative velocity error that was measured for this way at this time, nan where none was.
    """

    weighted: WeightedMean
    log_tail: Float[Tensor, " B"]
    ids: Int[Tensor, "B K"]
    whole: Bool[Tensor, " B"]
    candidates: Int[Tensor, " B"]
    log_far: Float[Tensor, " B"]
    ladders: tuple[str, ...]
    errors: Float[Tensor, " B"]

    @classmethod
    def summed(
        cls,
        weighted: WeightedMean,
        ladder: str,
        *,
        ids: Int[Tensor, "B K"] | int,
        log_tail: Float[Tensor, " B"] | None = None,
        log_far: Float[Tensor, " B"] | None = None,
        error: float = torch.nan,
    ) -> "Part":
        """A part taken one way: from `ids`, or from all images, then their number; the rest is nothing."""
        none = torch.full_like(weighted.log_mass, -torch.inf)
        whole = isinstance(ids, int)
        given = (
            torch.empty(len(none), 0, dtype=torch.int64, device=none.device) if isinstance(ids, int) else ids
        )
        count = torch.full(none.shape, ids, device=none.device) if isinstance(ids, int) else (ids >= 0).sum(1)
        return cls(
            weighted,
            none if log_tail is None else log_tail,
            given,
            torch.full_like(none, whole, dtype=torch.bool),
            count,
            none if log_far is None else log_far,
            (ladder,) * len(none),
            torch.full_like(none, error),
        )

    @classmethod
    def joined(cls, parts: Sequence["Part"], rows: Sequence[Tensor]) -> "Part":
        """The parts of different queries as one; `rows` says which queries are whose."""
        order = torch.cat(list(rows)).argsort()

        def together(values: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(values))[order]

        width = max(part.ids.shape[1] for part in parts)
        names = [""] * len(order)
        for part, mine in zip(parts, rows, strict=True):
            for row, name in zip(mine.tolist(), part.ladders, strict=True):
                names[row] = name
        return cls(
            WeightedMean(
                together([part.weighted.log_mass for part in parts]),
                together([part.weighted.log_square for part in parts]),
                together([part.weighted.mean for part in parts]),
            ),
            together([part.log_tail for part in parts]),
            together([pad(part.ids, (0, width - part.ids.shape[1]), value=-1) for part in parts]),
            together([part.whole for part in parts]),
            together([part.candidates for part in parts]),
            together([part.log_far for part in parts]),
            tuple(names),
            together([part.errors for part in parts]),
        )

    def take(self, which: Bool[Tensor, " B"]) -> "Part":
        """Those of some queries."""
        if bool(which.all()):
            return self
        rows, weighted = which.nonzero()[:, 0], self.weighted
        return Part(
            WeightedMean(weighted.log_mass[rows], weighted.log_square[rows], weighted.mean[rows]),
            self.log_tail[rows],
            self.ids[rows],
            self.whole[rows],
            self.candidates[rows],
            self.log_far[rows],
            tuple(compress(self.ladders, which.tolist())),
            self.errors[rows],
        )

    def with_errors(self, errors: Float[Tensor, " B"]) -> "Part":
        """The same part with other measured errors."""
        return replace(self, errors=errors)


class Support(ABC):
    """A way to sum over the stored images; build once, query many times."""

    def __init__(self, rows: PixelRows, *, budget: int) -> None:
        self.rows = rows
        self.budget = budget

    @abstractmethod
    def part(self, x: Float[Tensor, "B D"], t: Float[Tensor, " B"], images: slice) -> Part:
        """The sum for queries `x` at times `t` in [0, 1), over the stored images `images`."""

    def pairs(
        self, x: Float[Tensor, "B D"], others: Float[Tensor, "B D"], t: Float[Tensor, " B"], images: slice
    ) -> Part:
        """As `part`, for `x` and then for `others`, each of which will be merged with its like in `x`."""
        return self.part(torch.cat([x, others]), t.repeat(2), images)

    @abstractmethod
    def reach(self, mean: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """Upper bound on the distance from `mean` to the furthest stored image, float64."""

    def without_far(self) -> "Support":
        """The same with nothing estimated: only the images it sums in pixels."""
        return self
