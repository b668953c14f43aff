"""Products of queries with the coordinates of images: logits, the largest of them, weighted sums.

All n images at once are taken in blocks whose logits stay in the cache of a core while what follows reads
them again, and land in a buffer that is kept: 96 queries and 1,000,000 images in 32 coordinates take 69 ms
so, 145 ms into fresh memory (one core).

Queries and weights enter as integers, so that each product is one of bytes (`integers`): of a query two
digits for the first 64 coordinates and the low one for the others, of a weight one.

Axes:  B queries   n images   K images of one query   r coordinates
"""

import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from nnflow import integers
from nnflow.laidout import MOST_ROWS, Rows, block_rows
from nnflow.weighted import WeightedMean

_STRIDE = 16  # images that share a maximum while the largest logits are sought
_MOST_MADE = 1 << 20  # products of a block that are made at once: 4 MB
# Logits that one pass after another goes over, 1 MB: 8 queries of 32,768 images take 15 us to add to, 45 to
# take the exponential of; 29 take 140 and 279 (2 cores, 2 MB of cache each).
_IN_CACHE = 1 << 18
FAINTEST = -60.0  # bits: 1e-18. The square of less than 2^-63 is denormal, and sums with those slow
BITS = 1 / math.log(2)  # exp2 takes 0.19 ms for 1,600,000 values, exp 0.49
_FINEST = integers.LEVELS  # steps of a weight
HEAD = (
    64  # coordinates for which a query has two digits: the others hold an eighth of the variance (CIFAR-10)
)


class Buffer(threading.local):
    """Memory for the logits of one call after another, and for their maxima, one for each thread."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """A float32 tensor of `shape` on the device of `like`, with what was last there by that name."""
        size = shape[0] * shape[1]
        held = self._held.get(name)
        if held is None or held.device != like.device or len(held) < size:
            held = self._held[name] = torch.empty(size, device=like.device)
        return held[:size].view(shape)


@dataclass(frozen=True)
class Scores:
    """Logits of B queries, and the largest of every few.

    Attributes:
        values: all of them.
        maxima: largest of those at `first` + j * `step`, j = 0 ... 15; None where there are few.
        first: the first of each group.
        step: how far the next of a group is.
        tail: places at the end that are in no group.
        unit: what the query's coordinates are counted in.
    """

    values: Float[Tensor, "B n"]
    maxima: Float[Tensor, "B g"] | None
    first: Int[Tensor, " g"]
    step: Int[Tensor, " g"]
    tail: Int[Tensor, " m"]
    unit: Float[Tensor, " B"]

    def log_bound(self, top: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Upper bound on the log of the sum of exp(values), were none above `top`; float64.

        Each group counts as 16 times its largest.
        """
        if self.maxima is None:
            return top.double() + math.log(self.values.shape[1])
        # a few in the cache at a time: 64 queries of 1,281,167 images take 3.9 ms, as one logsumexp 41
        mass = torch.zeros_like(top)
        for some in self.maxima.split(block_rows(len(top)), 1):
            mass += _weights(some, top).sum(1)
        groups = _unit_of(top) + mass.double().log() + math.log(_STRIDE)
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
    """A digit of some coordinates of B queries, from the first on, and what it counts in."""

    bytes: Int8[Tensor, "B k"]
    unit: Float[Tensor, " B"]

    @classmethod
    def of(cls, row: Float[Tensor, "B r"], levels: int, *, fine: bool) -> list["_Digits"]:
        """What sums of exponentials need; less where no more is asked than which images come first.

        The last is of all coordinates. If `fine`, another holds what is too large for it of the first 64.
        """
        if not fine:
            return [cls(*integers.one_digit(row, levels))]
        head, tail = row[:, :HEAD], row[:, HEAD:]
        unit = integers.unit_of(head, levels=levels)
        if tail.shape[1]:
            unit = torch.maximum(unit, integers.unit_of(tail, digits=1, levels=levels))
        low = (row / unit[:, None]).round_()
        high = (low[:, :HEAD] / (2 * levels)).round_()
        low[:, :HEAD].sub_(high, alpha=2 * levels)
        return [cls(high.to(torch.int8), 2 * levels * unit), cls(low.to(torch.int8), unit)]


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
        return Scores(values, None, none, none, none, unit)
    count, fall = len(rows), -fall[:, None]
    digits = _Digits.of(row, rows.levels, fine=fine)
    blocks = list(rows.blocks(len(row)))
    widths = [(images.stop - images.start) // _STRIDE for images in blocks]
    values = buffer.take("logits", (len(row), count), row)
    maxima = buffer.take("maxima", (len(row), sum(widths)), row)
    size = rows.block_rows(len(row))
    groups = [
        (mine, [rows.products(part.bytes[mine]) for part in digits])
        for mine in _groups(len(row), size, _MOST_MADE)
    ]
    first, step = [], []
    for images, width, place in zip(blocks, widths, accumulate(widths, initial=0), strict=False):
        for mine, products in groups:
            made = [multiplied(images) for multiplied in products]
            for few in _groups(mine.stop - mine.start, size, _IN_CACHE):
                here = slice(mine.start + few.start, mine.start + few.stop)
                some = torch.mul(squares[images], fall[here], out=values[here, images])
                for part, multiplied in zip(digits, made, strict=True):
                    some.addcmul_(multiplied[few], part.unit[here, None])
                whole = some[:, : _STRIDE * width].unflatten(1, (_STRIDE, width))
                torch.amax(whole, 1, out=maxima[here, place : place + width])
        first.append(torch.arange(images.start, images.start + width, device=row.device))
        step.append(torch.full_like(first[-1], width))
    tail = torch.arange(count - count % _STRIDE, count, device=row.device)
    return Scores(values, maxima, torch.cat(first), torch.cat(step), tail, digits[-1].unit)


def _groups(queries: int, images: int, most: int) -> list[slice]:
    """Queries taken together, about as many in each: so few that with a block of images they make no more.

    Large products are memory that the system gives anew: 103 queries of one digit in 64 coordinates and
    131,072 images take 23 ms at once, 10 in four groups.
    """
    count = max(1, -(-queries * images // most))
    edges = [queries * place // count for place in range(count + 1)]
    return [slice(*pair) for pair in pairwise(edges) if pair[0] < pair[1]]


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
    buffer: Buffer,
) -> WeightedMean:
    """As `masses`, and the mean of the first `rank` coordinates, of all images' rows or each query's own.

    For the mean a weight is a whole number of 127ths of exp(top) (`_dithered`). What that adds to the mean
    is noise, of a variance of at most 1 / (127 sum exp(scores - top)) of that of the images. `buffer` is
    where the weights of a block go: into fresh memory they take 1.1 ms a query of 1,281,167 images, so 0.2.
    """
    top = top[asked]
    mass, square, count = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
    total = torch.zeros(len(asked), rank, device=scores.device)
    whole_row = [slice(0, scores.shape[1])]
    for images in whole_row if isinstance(rows, Tensor) else rows.blocks(len(asked)):
        width = images.stop - images.start
        whole = buffer.take("weights", (len(asked), width), scores)
        for few in _groups(len(asked), width, _IN_CACHE):
            weights = _weights(_of(scores[:, images], asked, few), top[few], out=whole[few])
            mass[few] += weights.sum(1)
            square[few] += torch.linalg.vector_norm(weights, dim=1).square()
            count[few] += _dithered(weights, images.start).sum(1)
        if isinstance(rows, Tensor):
            total += integers.own_sums(whole[:, None], rows[asked, :, :rank])[:, 0]
        else:
            total += rows.sums(whole, images, rank)
    return WeightedMean(*_logs(mass, square, top), total / count.clamp_min(1)[:, None])


def _dithered(weights: Float[Tensor, "B m"], start: int) -> Float[Tensor, "B m"]:
    """Weights as whole numbers, up or down by their place from `start` on, right on average; overwrites them.

    Rounded to the nearest, all weights below 1/2 would be lost, and half of the mass may be of such ones. A
    place is an image's, whatever the block: a query's answer does not depend on those asked with it.
    """
    first = start % MOST_ROWS
    return weights.add_(_dither(weights.device)[first : first + weights.shape[1]]).floor_()


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
        yield _of(some, asked, slice(None))


def _of(scores: Float[Tensor, "B m"], asked: Int[Tensor, " b"], few: slice) -> Float[Tensor, "f m"]:
    """Those of `few` of the queries asked; a view where all are asked."""
    return scores[few] if len(asked) == len(scores) else scores.index_select(0, asked[few])


def _logs(mass: Tensor, square: Tensor, top: Tensor) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Logarithms of sums of `_weights` and of their squares, in units of 1."""
    unit = _unit_of(top)
    return unit + mass.double().log(), 2 * unit + square.double().log()


def _unit_of(top: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The logarithm of what `_weights` count in, float64."""
    return top.double() - math.log(_FINEST)


def _weights(
    scores: Float[Tensor, "B m"], top: Float[Tensor, " B"], out: Float[Tensor, "B m"] | None = None
) -> Float[Tensor, "B m"]:
    """127 exp(scores - top), at least 1e-35; no more than 127, lest a byte overflow. They go to `out`."""
    most = math.log2(_FINEST)
    offset = most - BITS * top[:, None]
    return torch.add(offset, scores, alpha=BITS, out=out).clamp_(FAINTEST, most).exp2_()
