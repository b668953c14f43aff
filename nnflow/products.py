"""Products of queries with the coordinates of images: logits, the largest of them, weighted sums.

All n images at once are taken in blocks whose logits stay in the cache of a core while what follows reads
them again, and land in a buffer that is kept: 96 queries and 1,000,000 images in 32 coordinates take 69 ms
so, 145 ms into fresh memory (one core).

Axes:  B queries   n images   K images of one query   A columns of a row of coordinates
"""

import threading
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnflow.coordinates import bfloat16_is_fast
from nnflow.weighted import WeightedMean

_BLOCK_ROWS = 1 << 13  # a multiple of the next
_STRIDE = 16  # images that share a maximum while the largest logits are sought
_FAINTEST = -80.0  # exp(-80) is 1e-35; below exp(-87) weights are denormal, and products with them slow


class Buffer(threading.local):
    """Memory for the logits of one call after another, one for each thread."""

    def __init__(self) -> None:
        self._held = torch.empty(0)

    def take(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        """A tensor of `shape`, of the type and on the device of `like`, with whatever was there before."""
        size = shape[0] * shape[1]
        if self._held.dtype != like.dtype or self._held.device != like.device or len(self._held) < size:
            self._held = like.new_empty(size)
        return self._held[:size].view(shape)


@dataclass(frozen=True)
class Scores:
    """Logits of B queries, and the largest of every few.

    Attributes:
        values: all of them.
        maxima: largest of those at `first` + j * `step`, j = 0 ... 15; None where there are few.
        first: the first of each group.
        step: how far the next of a group is.
        tail: places at the end that are in no group.
    """

    values: Float[Tensor, "B n"]
    maxima: Float[Tensor, "B g"] | None
    first: Int[Tensor, " g"]
    step: Int[Tensor, " g"]
    tail: Int[Tensor, " m"]

    def highest(self, k: int) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
        """The k largest of each query, descending, and their places.

        The k largest lie in the k groups of largest maximum: a sixteenth of the logits is searched.
        """
        if self.maxima is None or _STRIDE * k > self.maxima.shape[1]:
            return self.values.topk(k, dim=1)
        groups = self.maxima.topk(k, dim=1).indices
        within = torch.arange(_STRIDE, device=groups.device)
        places = (self.first[groups][:, :, None] + self.step[groups][:, :, None] * within).flatten(1)
        places = torch.cat([places, self.tail.expand(len(places), -1)], 1)
        values, order = self.values.gather(1, places).topk(k, dim=1)
        return values, places.gather(1, order)


def scores_of(row: Float[Tensor, "B a"], rows: Tensor, buffer: Buffer) -> Scores:
    """Products of each query's row with all images' (n, a), or with its own images' (B, K, a)."""
    none = torch.empty(0, dtype=torch.int64, device=row.device)
    if rows.ndim == 3:
        return Scores(torch.bmm(row[:, None], rows.transpose(1, 2))[:, 0], None, none, none, none)
    fast, count = bfloat16_is_fast(row.device.type), len(rows)
    row = row if fast else row.float()
    values = buffer.take((len(row), count), row)
    maxima, first, step = [], [], []
    for start in range(0, count, _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        some = row @ (block if fast else block.float()).T
        values[:, start : start + len(block)] = some
        width = len(block) // _STRIDE
        maxima.append(some[:, : _STRIDE * width].unflatten(1, (_STRIDE, width)).amax(1))
        first.append(torch.arange(start, start + width, device=row.device))
        step.append(torch.full_like(first[-1], width))
    tail = torch.arange(count - count % _STRIDE, count, device=row.device)
    return Scores(values, torch.cat(maxima, 1), torch.cat(first), torch.cat(step), tail)


def weighted(scores: Float[Tensor, "B n"], top: Float[Tensor, " B"], rows: Tensor) -> WeightedMean:
    """Sums of exp(scores - top) and of its square over images, and the mean of their rows under it."""
    total = torch.zeros(len(scores), rows.shape[-1], device=scores.device)
    mass, square = torch.zeros_like(top), torch.zeros_like(top)
    fast = bfloat16_is_fast(scores.device.type)
    blocks = [rows] if rows.ndim == 3 else rows.split(_BLOCK_ROWS)
    size = scores.shape[1] if rows.ndim == 3 else _BLOCK_ROWS
    for some, block in zip(scores.split(size, 1), blocks, strict=True):
        # subtracted after the change of type: before it, the difference takes ten times as long
        weights = some.to(torch.float32, copy=True).sub_(top[:, None]).clamp_min_(_FAINTEST).exp_()
        mass += weights.sum(1)
        square += torch.linalg.vector_norm(weights, dim=1).square()
        if block.ndim == 3:
            total += torch.bmm(weights.to(block.dtype)[:, None], block)[:, 0]
        else:
            total += weights.bfloat16() @ block if fast else weights @ block.float()
    return WeightedMean(mass.double().log(), square.double().log(), total.div_(mass[:, None]))
