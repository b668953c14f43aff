"""Logits that lie in blocks as one matrix, and the other way round, for the tests."""

import torch
from torch import Tensor

from nnflow.products import Scores


def logits_of(scores: Scores) -> Tensor:
    """All logits (B, n), float64."""
    return torch.cat([block for _, block in scores.blocks()], 1).double() * scores.unit.double()[:, None]


def as_scores(logits: Tensor, size: int) -> Scores:
    """Logits (B, n) in blocks of so many images, each query's in a unit of its own: a power of two, exact."""
    unit = 2.0 ** torch.arange(-1, len(logits) - 1, device=logits.device)
    held = torch.cat([block.flatten() for block in (logits / unit[:, None]).split(size, 1)])
    return Scores(held, logits.shape[1], size, None, unit)
