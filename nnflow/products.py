"""Products of queries with the coordinates of images: logits, the largest of them, weighted sums.

All n images at once are taken in blocks whose logits stay in the cache of a core while what follows reads
them again, and land in a buffer that is kept: 96 queries and 1,000,000 images in 32 coordinates take 69 ms
so, 145 ms into fresh memory (one core).

Queries and weights enter as integers, so that each product is one of bytes (`integers`): of a query two
digits for the first 64 coordinates and one for the others, of a weight one.

Axes:  B queries   n images   K images of one query   r coordinates
"""

import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from nnflow import integers
from nnflow.laidout import MOST_ROWS, Products, Rows, block_rows
from nnflow.weighted import WeightedMean

_STRIDE = 16  # images that share a maximum while the largest logits are sought
FAINTEST = -115.0  # bits: 1e-35. From 2^-126 down weights are denormal, and products with them slow
BITS = 1 / math.log(2)  # exp2 takes 0.19 ms for 1,600,000 values, exp 0.49
_FINEST = integers.LEVELS  # steps of a weight
HEAD = (
    64  # coordinates for which a query has two digits: the others hold an eighth of the variance (CIFAR-10)
)


class Buffer(threading.local):
    """Memory for the logits of one call after another, one for each thread."""

    def __init__(self) -> None:
        self._held = torch.empty(0)

    def take(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        """A float32 tensor of `shape` on the device of `like`, with whatever was there before."""
        size = shape[0] * shape[1]
        if self._held.device != like.device or len(self._held) < size:
            self._held = torch.empty(size, device=like.device)
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
        units: of which coordinates, from the first to before the second, the query counts in what.
    """

    values: Float[Tensor, "B n"]
    maxima: Float[Tensor, "B g"] | None
    first: Int[Tensor, " g"]
    step: Int[Tensor, " g"]
    tail: Int[Tensor, " m"]
    units: tuple[tuple[int, int, Tensor], ...]

    def log_bound(self, top: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Upper bound on the log of the sum of exp(values), were none above `top`; float64.

        Each group counts as 16 times its largest.
        """
        if self.maxima is None:
            return top.double() + math.log(self.values.shape[1])
        groups = torch.minimum(self.maxima, top[:, None]).logsumexp(1).double() + math.log(_STRIDE)
        return torch.logaddexp(groups, top.double() + math.log(max(1, len(self.tail))))

    def highest(self, k: int) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
        """The k largest of each query, descending, and their places.

        The k largest lie in the k groups of largest maximum: a sixteenth of the logits is searched.
        """
        if self.maxima is None or _STRIDE * k > self.maxima.shape[1]:
            return self.values.topk(k, dim=1)
        groups = self.maxima.topk(k, dim=1, sorted=False).indices
        within = torch.arange(_STRIDE, device=groups.device)
        places = (self.first[groups][:, :, None] + self.step[groups][:, :, None] * within).flatten(1)
        places = torch.cat([places, self.tail.expand(len(places), -1)], 1)
        values, order = self.values.gather(1, places).topk(k, dim=1)
        return values, places.gather(1, order)


@dataclass(frozen=True)
class _Digits:
    """Some coordinates of B queries as bytes: a digit each, or all high ones and then all low ones."""

    start: int
    stop: int
    bytes: Int8[Tensor, "C k"]  # C = B or 2 B
    unit: Float[Tensor, " B"]  # what the last digit counts in

    @classmethod
    def of(cls, row: Float[Tensor, "B r"], levels: int, *, fine: bool) -> list["_Digits"]:
        """What sums of exponentials need; less where no more is asked than which images come first."""
        rank = row.shape[1]
        # below 2 HEAD a second product would not pay
        cut = 0 if not fine else HEAD if rank >= 2 * HEAD else rank
        parts = []
        if cut:
            parts.append(cls(0, cut, *integers.two_digits(row[:, :cut], levels)))
        if cut < rank:
            parts.append(cls(cut, rank, *integers.one_digit(row[:, cut:], levels)))
        return parts

    def products(self, rows: Rows) -> Products:
        """What multiplies images, (B, m) in units: int32, or float32 as `integers.product`."""
        multiplied = rows.products(self.bytes, self.start)
        if len(self.bytes) == len(self.unit):
            return multiplied

        def joined(images: slice) -> Tensor:
            high, low = multiplied(images).split(len(self.unit))
            return low.add_(high, alpha=2 * rows.levels)  # at most 5e8, of 2^31

        return joined


def scores_of(
    row: Float[Tensor, "B r"],
    fall: Float[Tensor, " B"],
    rows: Rows | Int8[Tensor, "B K r"],
    squares: Float[Tensor, "..."],
    buffer: Buffer,
    *,
    fine: bool = True,
) -> Scores:
    """Logits row . rows_i - fall squares_i.

    Args:
        row: of each query.
        fall: of each query.
        rows: all images', or each query's own.
        squares: theirs, (n,) or (B, K).
        buffer: where the logits of all images go; those of the call before are lost.
        fine: whether they are to be summed, or only to say which images come first.
    """
    none = torch.empty(0, dtype=torch.int64, device=row.device)
    if isinstance(rows, Tensor):
        values, unit = _own_scores(row, fall, rows, squares)
        return Scores(values, None, none, none, none, ((0, row.shape[1], unit),))
    count, fall = len(rows), -fall[:, None]
    digits = _Digits.of(row, rows.levels, fine=fine)
    values = buffer.take((len(row), count), row)
    products = [(part.products(rows), part.unit[:, None]) for part in digits]
    maxima, first, step = [], [], []
    for images in rows.blocks(len(row)):
        some = values[:, images]
        torch.mul(squares[images], fall, out=some)
        for multiplied, unit in products:
            some.addcmul_(multiplied(images), unit)
        width = some.shape[1] // _STRIDE
        maxima.append(some[:, : _STRIDE * width].unflatten(1, (_STRIDE, width)).amax(1))
        first.append(torch.arange(images.start, images.start + width, device=row.device))
        step.append(torch.full_like(first[-1], width))
    units = tuple((part.start, part.stop, part.unit) for part in digits)
    tail = torch.arange(count - count % _STRIDE, count, device=row.device)
    return Scores(values, torch.cat(maxima, 1), torch.cat(first), torch.cat(step), tail, units)


def _own_scores(row: Tensor, fall: Tensor, rows: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """As `scores_of`, of each query's own images, in two digits throughout; what the last counts in."""
    digits, unit = integers.two_digits(row)
    found = integers.own_products(digits.view(2, *row.shape).transpose(0, 1), rows)
    high = 2 * integers.LEVELS * unit[:, None]
    values = (found[:, 0] * high).addcmul_(found[:, 1], unit[:, None])
    return values.addcmul_(squares, fall[:, None], value=-1), unit


def masses(
    scores: Float[Tensor, "B n"], top: Float[Tensor, " B"], asked: Int[Tensor, " b"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Logarithms of the sums of exp(scores) and of its square, float64, of the queries `asked`.

    No score is above `top`, but by rounding.
    """
    top = top[asked]
    mass, square = torch.zeros_like(top), torch.zeros_like(top)
    for some in _blocks(scores, asked):
        weights = _weights(some, top)
        mass += weights.sum(1)
        square += torch.linalg.vector_norm(weights, dim=1).square()
    return _logs(mass, square, top)


def weighted(
    scores: Float[Tensor, "B n"],
    top: Float[Tensor, " B"],
    rows: Rows | Int8[Tensor, "B K r"],
    asked: Int[Tensor, " b"],
    rank: int,
) -> WeightedMean:
    """As `masses`, and the mean of the first `rank` coordinates, of all images' rows or each query's own.

    For the mean a weight is a whole number of 127ths of exp(top) (`_dithered`). What that adds to the mean
    is noise, of a variance of at most 1 / (127 sum exp(scores - top)) of that of the images.
    """
    top = top[asked]
    mass, square, count = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
    total = torch.zeros(len(asked), rank, device=scores.device)
    whole_row = [slice(0, scores.shape[1])]
    for images in whole_row if isinstance(rows, Tensor) else rows.blocks(len(asked)):
        weights = _weights(_of(scores[:, images], asked), top)
        mass += weights.sum(1)
        square += torch.linalg.vector_norm(weights, dim=1).square()
        whole = _dithered(weights, images.start)
        count += whole.sum(1, dtype=torch.int32)
        if isinstance(rows, Tensor):
            total += integers.own_sums(whole.view(torch.int8)[:, None], rows[asked, :, :rank])[:, 0]
        else:
            total += rows.sums(whole, images, rank)
    return WeightedMean(*_logs(mass, square, top), total / count.clamp_min(1)[:, None])


def _dithered(weights: Float[Tensor, "B m"], start: int) -> UInt8[Tensor, "B m"]:
    """Weights as whole numbers, up or down by their place from `start` on, right on average; overwrites them.

    Rounded to the nearest, all weights below 1/2 would be lost, and half of the mass may be of such ones. A
    place is an image's, whatever the block: a query's answer does not depend on those asked with it.
    """
    first = start % MOST_ROWS
    return weights.add_(_dither(weights.device)[first : first + weights.shape[1]]).to(torch.uint8)


@functools.cache
def _dither(device: torch.device) -> Float[Tensor, " m"]:
    """Multiples of the golden ratio, spread evenly over [0, 1), and the same again.

    The largest is 1 - 3e-5: 127 and it is still 127, and only weights below 2e-7 of the largest are lost.
    """
    steps = torch.arange(1, MOST_ROWS + 1, dtype=torch.float64, device=device)
    return (steps * ((math.sqrt(5) - 1) / 2)).frac().float().repeat(2)


def _blocks(scores: Float[Tensor, "B n"], asked: Int[Tensor, " b"]) -> Iterator[Float[Tensor, "b m"]]:
    """Blocks of the scores of some queries: never a copy of all."""
    for some in scores.split(block_rows(len(asked)), 1):
        yield _of(some, asked)


def _of(scores: Float[Tensor, "B m"], asked: Int[Tensor, " b"]) -> Float[Tensor, "b m"]:
    return scores if len(asked) == len(scores) else scores.index_select(0, asked)


def _logs(mass: Tensor, square: Tensor, top: Tensor) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Logarithms of sums of `_weights` and of their squares, in units of 1."""
    unit = top.double() - math.log(_FINEST)
    return unit + mass.double().log(), 2 * unit + square.double().log()


def _weights(scores: Float[Tensor, "B m"], top: Float[Tensor, " B"]) -> Float[Tensor, "B m"]:
    """127 exp(scores - top), at least 1e-35; no more than 127, lest a byte overflow."""
    most = math.log2(_FINEST)
    offset = most - BITS * top[:, None]
    return torch.add(offset, scores, alpha=BITS).clamp_(FAINTEST, most).exp2_()
