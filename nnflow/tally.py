"""What the estimates behind a batch of targets were worth: sums that no step waits for, and their means.

tail mass   share of the soft-max mass left out or only estimated, mean
ESS         1 / sum w^2, the number of images that matter: geometric mean, as it runs from 1 to n
certified   share of the estimates whose bound is at most `tolerance` |velocity|
error       99th percentile of the relative error that calibration measured for the way taken, mean
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nnflow.velocity import Estimate

_SUMS = 6  # asked, tail mass, log ESS, certified, error, how many have one


class Tally:
    """Sums over the estimates of one batch, on their device."""

    def __init__(self, device: torch.device, *, tolerance: float) -> None:
        self.tolerance = tolerance
        self.sums = torch.zeros(_SUMS, dtype=torch.float64, device=device)

    def add(self, estimate: Estimate) -> None:
        """Adds every query of `estimate`."""
        size = estimate.velocity.flatten(1).norm(dim=1)
        known = ~estimate.error.isnan()
        of_each = torch.stack(
            [
                torch.ones_like(size),
                estimate.tail_mass,
                estimate.ess.log(),
                (estimate.bound <= self.tolerance * size).float(),
                estimate.error.nan_to_num(0.0),
                known.float(),
            ]
        )
        self.sums += of_each.sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class TargetFigures:
    """Means over the estimates behind the targets of some pairs.

    Attributes:
        asked: share of the pairs that the field was asked about, in [0, 1]; of the others u* is x1 - x0.
        tail_mass: mean share of the soft-max mass that was left out or only estimated, in [0, 1].
        ess: geometric mean of the effective sample size, at least 1.
        certified: share of the estimates whose `bound` is at most `tolerance` |velocity|, in [0, 1].
        tolerance: that relative error.
        error: mean of the 99th percentiles of the relative error that calibration measured; nan without.
    """

    asked: float
    tail_mass: float
    ess: float
    certified: float
    tolerance: float
    error: float

    @classmethod
    def of(cls, sums: Tensor, pairs: int, *, tolerance: float) -> "TargetFigures | None":
        """The means of the `sums` of tallies over so many pairs; None where no field was asked."""
        asked, tail, log_ess, certified, error, known = sums.tolist()
        if not asked:
            return None
        return cls(
            asked=asked / pairs,
            tail_mass=tail / asked,
            ess=math.exp(log_ess / asked),
            certified=certified / asked,
            tolerance=tolerance,
            error=error / known if known else math.nan,
        )

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f", calibrated p99 error {100 * self.error:.2g} %"
        return (
            f"the field was asked about {100 * self.asked:.0f} % of the pairs: {self.ess:.3g} images matter "
            f"(geometric mean), tail mass {self.tail_mass:.2g}, {100 * self.certified:.0f} % certified to "
            f"{100 * self.tolerance:g} %{error}"
        )
