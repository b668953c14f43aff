"""The straight path from noise to data, and the four names of what a field says about it.

    x_t = (1 - t) x0 + t x1,   x0 ~ N(0, I) noise at t = 0,   x1 data at t = 1              (1)

With m = E[x1 | x_t = x] the posterior mean:

    velocity   u(x, t)     = (m - x) / (1 - t)                                              (2)
    score      grad log p  = (t m - x) / (1 - t)^2                                          (3)
    denoiser   D(y, sigma) = m(x, t)   at   y = x / t,  sigma = (1 - t) / t                 (4)

(1) is eq. 2 of docs/field.md, (2) its eq. 1; (3) is Tweedie's formula; (4) is the variance-exploding
convention of Karras et al. 2022 (arXiv 2206.00364), y = x1 + sigma * noise.

Every function takes x of shape (B, ...) and t of shape (B,) or a float.
"""

import torch
from torch import Tensor


def along(t: Tensor | float, x: Tensor) -> Tensor:
    """`t` as a tensor that multiplies `x` row by row: (B, 1, ..., 1), or a scalar for a float."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


def interpolate(x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
    """x_t of eq. 1."""
    t = along(t, x1)
    return (1 - t) * x0 + t * x1


def velocity_from_mean(mean: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
    """Eq. 2; t in [0, 1)."""
    return (mean - x) / (1 - along(t, x))


def mean_from_velocity(velocity: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
    """Eq. 2 solved for the mean; t in [0, 1]."""
    return x + (1 - along(t, x)) * velocity


def score_from_mean(mean: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
    """Eq. 3; t in [0, 1)."""
    t = along(t, x)
    return (t * mean - x) / (1 - t).square()


def mean_from_score(score: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
    """Eq. 3 solved for the mean; t in (0, 1]: at t = 0 the score does not know the data."""
    t = along(t, x)
    return (x + (1 - t).square() * score) / t


def score_from_velocity(velocity: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
    """Eqs. 2 and 3 without the mean; t in [0, 1)."""
    t = along(t, x)
    return (t * velocity - x) / (1 - t)


def velocity_from_score(score: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
    """Eqs. 2 and 3 without the mean; t in (0, 1]."""
    t = along(t, x)
    return (x + (1 - t) * score) / t


def time_of_sigma(sigma: Tensor | float) -> Tensor:
    """The time t = 1 / (1 + sigma) of eq. 4; sigma in (0, inf)."""
    return 1 / (1 + torch.as_tensor(sigma, dtype=torch.float32))


def sigma_of_time(t: Tensor | float) -> Tensor:
    """Sigma = (1 - t) / t of eq. 4; t in (0, 1)."""
    t = torch.as_tensor(t, dtype=torch.float32)
    return (1 - t) / t
