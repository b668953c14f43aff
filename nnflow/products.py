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
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from nnflow import integers
from nnflow.laidout import MOST_ROWS, Rows, block_rows
from nnflow.weighted import WeightedMean

_STRIDE = 16  # images that share a maximum while the largest logits are sought
_FEW, _MANY = 8, 1 << 11  # maxima that share one in turn, where there are so many of these
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

    They lie in blocks of images, each a matrix (B, m) by itself: what is added to it is added in place.

    Attributes:
        held: all of them, in `unit`, block after block.
        count: images, n.
        size: images of a block, but for the last; a multiple of 16 where there are several.
        maxima: of a block of m = 16 w images the largest of j, j + w, ..., j + 15 w, for each j below w; None
            where there are few.
        unit: what a query's logits and its coordinates are counted in.
    """

    held: Float[Tensor, " Bn"]
    count: int
    size: int
    maxima: Float[Tensor, "B g"] | None
    unit: Float[Tensor, " B"]

    def blocks(self) -> Iterator[tuple[slice, Float[Tensor, "B m"]]]:
        """Images, and their logits in `unit`."""
        for start in range(0, self.count, self.size):
            stop = min(start + self.size, self.count)
            yield slice(start, stop), _block(self.held, slice(start, stop), len(self.unit))

    def log_bound(self, top: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Upper bound on the log of the sum of exp(logits), were none above `top`; float64.

        Each group counts as 16 times its largest.
        """
        if self.maxima is None:
            return top.double() + math.log(self.count)
        # a few in the cache at a time: 64 queries of 1,281,167 images take 3.9 ms, as one logsumexp 41
        mass = torch.zeros_like(top)
        for some in self.maxima.split(block_rows(len(top)), 1):
            mass += _weights(some, self.unit, top).sum(1)
        groups = _log_unit(top) + mass.double().log() + math.log(_STRIDE)
        return torch.logaddexp(groups, top.double() + math.log(max(1, self.count % _STRIDE)))

    def highest(self, k: int) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
        """The k largest logits of each query, descending, and which images'.

        The k largest lie in the k groups of largest maximum, and only these are searched: for 1,000 of 50,000
        that takes 7 ms instead of 9 (28 queries), for 6,000 of 1,281,167 54 ms instead of 380.
        """
        if self.maxima is None or 2 * k > self.maxima.shape[1]:
            found = [
                (best, places + images.start)
                for images, block in self.blocks()
                for best, places in [block.topk(min(k, block.shape[1]), dim=1)]
            ]
            values, places = (torch.cat(every, 1) for every in zip(*found, strict=True))
            values, order = values.topk(k, dim=1)
            return values * self.unit[:, None], places.gather(1, order)
        groups = _largest(self.maxima, k)
        at = self._searched(groups)
        values, order = self.held.index_select(0, at.flatten()).view_as(at).topk(k, dim=1)
        return values * self.unit[:, None], self._found(groups, order)

    def largest(self) -> Float[Tensor, " B"]:
        """The largest logit of each query, of those that have not been left out."""
        return torch.stack([block.amax(1) for _, block in self.blocks()]).amax(0) * self.unit

    def leave_out(self, places: Int[Tensor, "B K"], which: Bool[Tensor, "B K"]) -> None:
        """Gives some images of each query no weight."""
        self.held.index_fill_(0, self._at(places)[which], -torch.inf)

    def _searched(self, groups: Int[Tensor, "B k"]) -> Int[Tensor, "B m"]:
        """Where in `held` the logits of these groups are, 16 each, and those at the end that are in none."""
        start, images = self._block_of(groups)
        first = self._first(start, images) + groups - start // _STRIDE
        within = torch.arange(_STRIDE, device=groups.device) * (images // _STRIDE)[:, :, None]
        tail = torch.arange(self.count - self.count % _STRIDE, self.count, device=groups.device)
        at = within.add_(first[:, :, None]).flatten(1)
        return torch.cat([at, self._at(tail.expand(len(at), -1))], 1) if len(tail) else at

    def _found(self, groups: Int[Tensor, "B k"], order: Int[Tensor, "B m"]) -> Int[Tensor, "B m"]:
        """The images at these places of what `_searched` finds."""
        group = groups.gather(1, (order // _STRIDE).clamp_max(groups.shape[1] - 1))
        start, images = self._block_of(group)
        grouped = start + group - start // _STRIDE + order % _STRIDE * (images // _STRIDE)
        tail = order - _STRIDE * groups.shape[1]
        return torch.where(tail < 0, grouped, self.count - self.count % _STRIDE + tail)

    def _block_of(self, groups: Int[Tensor, "B k"]) -> tuple[Int[Tensor, "B k"], Int[Tensor, "B k"]]:
        """The first image of each group's block, and how many there are in it."""
        start = groups // (self.size // _STRIDE) * self.size
        return start, (self.count - start).clamp_max(self.size)

    def _first(self, start: Int[Tensor, "B k"], images: Int[Tensor, "B k"]) -> Int[Tensor, "B k"]:
        """Where in `held` each query's logits of a block begin, of so many images from `start` on."""
        return start * len(start) + torch.arange(len(start), device=start.device)[:, None] * images

    def _at(self, places: Int[Tensor, "B K"]) -> Int[Tensor, "B K"]:
        """Where in `held` these images' logits are."""
        start = places // self.size * self.size
        return self._first(start, (self.count - start).clamp_max(self.size)) + places - start


def _largest(maxima: Float[Tensor, "B g"], k: int) -> Int[Tensor, "B k"]:
    """Which k are the largest, in any order; of many, found among every few's largest.

    The 2,000 largest of 80,072 of 30 queries take 5.5 ms so for 10.6, the 500 largest 2.9 for 5.3.
    """
    apart = maxima.shape[1] // _FEW
    if apart < max(2 * k, _MANY):
        return maxima.topk(k, dim=1, sorted=False).indices
    whole = maxima[:, : _FEW * apart].unflatten(1, (_FEW, apart))
    first = whole.amax(1).topk(k, dim=1, sorted=False).indices
    within = torch.arange(_FEW, device=maxima.device)[:, None] * apart
    tail = torch.arange(_FEW * apart, maxima.shape[1], device=maxima.device)
    at = torch.cat([(first[:, None] + within).flatten(1), tail.expand(len(first), -1)], 1)
    return at.gather(1, maxima.gather(1, at).topk(k, dim=1, sorted=False).indices)


def _block(held: Tensor, images: slice, queries: int) -> Float[Tensor, "B m"]:
    """The logits of a block of images."""
    return held[images.start * queries : images.stop * queries].view(queries, -1)


@dataclass(frozen=True)
class _Digits:
    """B queries as integers: digits of their coordinates, from the first on, and what each digit counts for.

    Attributes:
        digits: of some coordinates, and how many units they count for.
        unit: what the last counts in.
    """

    digits: list[tuple[Int8[Tensor, "B _"], float]]
    unit: Float[Tensor, " B"]

    @classmethod
    def of(cls, row: Float[Tensor, "B r"], levels: int, *, fine: bool) -> "_Digits":
        """What sums of exponentials need; less where no more is asked than which images come first.

        The last is of all coordinates. If `fine`, another holds what is too large for it of the first 64.
        """
        if not fine:
            digit, unit = integers.one_digit(row, levels)
            return cls([(digit, 1.0)], unit)
        head, tail = row[:, :HEAD], row[:, HEAD:]
        unit = integers.unit_of(head, levels=levels)
        if tail.shape[1]:
            unit = torch.maximum(unit, integers.unit_of(tail, digits=1, levels=levels))
        low = (row / unit[:, None]).round_()
        high = (low[:, :HEAD] / (2 * levels)).round_()
        low[:, :HEAD].sub_(high, alpha=2 * levels)
        return cls([(high.to(torch.int8), 2.0 * levels), (low.to(torch.int8), 1.0)], unit)


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
    if isinstance(rows, Tensor):
        return _own_scores(row, fall, rows, squares)
    queries, count, size = len(row), len(rows), rows.block_rows(len(row))
    asked = _Digits.of(row, rows.levels, fine=fine)
    fall = (-fall / asked.unit)[:, None]
    held = buffer.take("logits", (1, queries * count), row)[0]
    maxima = buffer.take("maxima", (queries, count // _STRIDE), row)
    groups = [
        (mine, [rows.adding(digits[mine], scale) for digits, scale in asked.digits])
        for mine in _groups(queries, size, rows.most_added)
    ]
    for images in rows.blocks(queries):
        block, first = _block(held, images, queries), images.start // _STRIDE
        width = block.shape[1] // _STRIDE
        for mine, adding in groups:
            some = torch.mul(squares[images], fall[mine], out=block[mine])
            for add in adding:
                add(images, some)
            whole = some[:, : _STRIDE * width].unflatten(1, (_STRIDE, width))
            torch.amax(whole, 1, out=maxima[mine, first : first + width])
    return Scores(held, count, size, maxima, asked.unit)


def _groups(queries: int, images: int, most: int) -> list[slice]:
    """Queries taken together, about as many in each: so few that with a block of images they make no more."""
    count = max(1, -(-queries * images // most))
    edges = [queries * place // count for place in range(count + 1)]
    return [slice(*pair) for pair in pairwise(edges) if pair[0] < pair[1]]


def _own_scores(row: Tensor, fall: Tensor, rows: Tensor, squares: Tensor) -> Scores:
    """As `scores_of`, of each query's own images, in two digits throughout."""
    digits, unit = integers.two_digits(row)
    found = integers.own_products(digits.view(2, *row.shape).transpose(0, 1), rows)
    values = (squares * (-fall / unit)[:, None]).add_(found[:, 1])
    values.add_(found[:, 0], alpha=2 * integers.LEVELS)
    return Scores(values.flatten(), rows.shape[1], rows.shape[1], None, unit)


def masses(
    scores: Scores, top: Float[Tensor, " B"], asked: Int[Tensor, " b"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Logarithms of the sums of exp(logits) and of its square, float64, of the queries `asked`.

    No logit is above `top`, but by rounding.
    """
    top, unit = top[asked], scores.unit[asked]
    mass, square = torch.zeros_like(top), torch.zeros_like(top)
    for _, block in scores.blocks():
        for some in block.split(block_rows(len(asked)), 1):
            weights = _weights(_of(some, asked, slice(None)), unit, top)
            mass += weights.sum(1)
            square += torch.linalg.vector_norm(weights, dim=1).square()
    return _logs(mass, square, top)


def weighted(
    scores: Scores,
    top: Float[Tensor, " B"],
    rows: Rows | Int8[Tensor, "B K r"],
    asked: Int[Tensor, " b"],
    rank: int,
    buffer: Buffer,
) -> WeightedMean:
    """As `masses`, and the mean of the first `rank` coordinates, of all images' rows or each query's own.

    For the mean a weight is a whole number of 127ths of exp(top) (`_dithered`). What that adds to the mean
    is noise, of a variance of at most 1 / (127 sum exp(logits - top)) of that of the images. `buffer` is
    where the weights of a block go: into fresh memory they take 1.1 ms a query of 1,281,167 images, so 0.2.
    """
    top, unit = top[asked], scores.unit[asked]
    mass, square, count = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
    total = torch.zeros(len(asked), rank, device=top.device)
    for images, block in scores.blocks():
        width = images.stop - images.start
        whole = buffer.take("weights", (len(asked), width), block)
        for few in _groups(len(asked), width, _IN_CACHE):
            weights = _weights(_of(block, asked, few), unit[few], top[few], out=whole[few])
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


def _of(scores: Float[Tensor, "B m"], asked: Int[Tensor, " b"], few: slice) -> Float[Tensor, "f m"]:
    """Those of `few` of the queries asked; a view where all are asked."""
    return scores[few] if len(asked) == len(scores) else scores.index_select(0, asked[few])


def _logs(mass: Tensor, square: Tensor, top: Tensor) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Logarithms of sums of `_weights` and of their squares, in units of 1."""
    counted = _log_unit(top)
    return counted + mass.double().log(), 2 * counted + square.double().log()


def _log_unit(top: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The logarithm of what `_weights` count in, float64."""
    return top.double() - math.log(_FINEST)


def _weights(
    scores: Float[Tensor, "B m"],
    unit: Float[Tensor, " B"],
    top: Float[Tensor, " B"],
    out: Float[Tensor, "B m"] | None = None,
) -> Float[Tensor, "B m"]:
    """127 exp(unit scores - top), at least 1e-18 and no more than 127, lest a byte overflow; to `out`."""
    most = math.log2(_FINEST)
    offset = most - BITS * top[:, None]
    return torch.addcmul(offset, scores, BITS * unit[:, None], out=out).clamp_(FAINTEST, most).exp2_()
