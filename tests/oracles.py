"""float64 answers that share no formula with nnflow: slow, small, obvious."""

import torch
from torch import Tensor


def velocity_from_score(images: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """u = x / t + (1 - t) / t * grad log p_t(x), the score by autograd of the mixture's log-density.

    No posterior weight and no mean appears. images (n, D), x (B, D), t (B,) in (0, 1).
    """
    x, t = x.double().requires_grad_(), t.double()
    spread = (1 - t)[:, None]
    squares = (x[:, None] - t[:, None, None] * images.double()).square().sum(-1)
    log_density = torch.logsumexp(-squares / (2 * spread**2), dim=1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    return ((x + spread * score) / t[:, None]).detach()


def log_density(images: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """log sum_i exp(-|x - t x_i|^2 / (2 (1 - t)^2)), term by term in Python's own floats."""
    import math

    found = []
    for query, time in zip(x.double().tolist(), t.double().tolist(), strict=True):
        logits = [
            -math.fsum((q - time * v) ** 2 for q, v in zip(query, image, strict=True)) / (2 * (1 - time) ** 2)
            for image in images.double().tolist()
        ]
        top = max(logits)
        found.append(top + math.log(math.fsum(math.exp(v - top) for v in logits)))
    return torch.tensor(found, dtype=torch.float64)
