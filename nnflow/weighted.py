"""The streamed soft-max mean: the one currency in which parts of the sum over images are merged.

A part S of the images is, to a query, three sums over its logits l_i (docs/field.md, eq. 4):

    log_mass = log sum_S exp(l_i),   log_square = log sum_S exp(2 l_i),
    mean     = sum_S exp(l_i - log_mass) x_i

Two parts merge to the part of their union; the merge is associative, commutative, and `empty` is its
neutral element. Averaging the means of two parts, or adding their log-masses, is not this: both are
right for one block only.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class WeightedMean:
    """Log-mass and mean of some images, for each of B queries.

    Attributes:
        log_mass: float64, because logits reach 1e6 at t = .99 and float32 would round their
            difference to 0.06; -inf for no images at all.
        log_square: float64, the same of the squared weights: `ess` needs it.
        mean: float32; zero where there are no images.
    """

    log_mass: Float[Tensor, " B"]
    log_square: Float[Tensor, " B"]
    mean: Float[Tensor, "B D"]

    @classmethod
    def empty(cls, like: Float[Tensor, "B D"]) -> "WeightedMean":
        """No images: merging it changes nothing."""
        nothing = like.new_full((like.shape[0],), -torch.inf, dtype=torch.float64)
        return cls(nothing, nothing, torch.zeros_like(like))

    def merge(self, other: "WeightedMean") -> "WeightedMean":
        """The part made of both parts' images."""
        log_mass = torch.logaddexp(self.log_mass, other.log_mass)
        # Of two empty parts the union is empty: exp(-inf - 0) = 0, not exp(-inf - -inf) = nan.
        safe = log_mass.masked_fill(log_mass.isneginf(), 0.0)
        mine = (self.log_mass - safe).exp().to(self.mean.dtype)
        theirs = (other.log_mass - safe).exp().to(self.mean.dtype)
        return WeightedMean(
            log_mass,
            torch.logaddexp(self.log_square, other.log_square),
            mine[:, None] * self.mean + theirs[:, None] * other.mean,
        )

    @property
    def ess(self) -> Float[Tensor, " B"]:
        """Effective sample size 1 / sum w^2, from 1 (one image) to the number of images."""
        return (2 * self.log_mass - self.log_square).exp()
