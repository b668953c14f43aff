"""Sums over all images, their mean and covariance, in passes that a killed build goes on with.

The covariance of bytes is summed exactly, in integers: neither the blocks nor a kill between them change a
bit of it. That of floats is summed block by block, products in float32, sums in float64: a kill changes
nothing, other blocks its last bits.

Axes:  n images   R of a block   D = C*H*W values of one image
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from nnflow import integers
from nnflow.pixels import PixelRows
from nnflow.unfinished import Unfinished

_INTEGER_DIM = 64
_PANELS = 4  # of columns; those before each are not multiplied by it: 0.62 s for 0.91 of 32,768 x 3,072
_EXACT_ROWS = 1024  # rows whose int8 products sum within the 2^24 up to which float32 holds every integer


@dataclass(frozen=True)
class Fitting:
    """What a budget decides about a fit; two equal ones give the same embedding on one machine.

    Attributes:
        block: images of a block of float32.
        images: whose covariance gives the directions.
        together: images of a block of the covariance; None where a subset's inner products are taken instead.
    """

    block: int
    images: int
    together: int | None


@dataclass(frozen=True)
class Stream:
    """The images, how they are read, and where what is known of them is kept."""

    rows: PixelRows
    budget: int
    fitting: Fitting
    kept: Unfinished | None
    progress: bool

    def summed(
        self,
        name: str,
        step: int,
        sums: dict[str, Tensor],
        add: Callable[[dict[str, Tensor], int, int], None],
    ) -> dict[str, Tensor]:
        """`sums` after `add(sums, start, stop)` of all rows, or of those that no killed build had added."""
        found = self.kept.find_tensors(name) if self.kept else None
        done = 0
        if found is not None:
            done, sums = int(found.pop("done")), found
        total = -(-self.rows.count // step)
        bar = tqdm(
            range(done, self.rows.count, step),
            name,
            initial=done // step,
            total=total,
            disable=not self.progress,
            unit="block",
        )
        for start in bar:
            stop = min(start + step, self.rows.count)
            add(sums, start, stop)
            self.rows.let_go(self.budget, start, stop)
            if self.kept and self.kept.due and stop < self.rows.count:
                self.kept.keep_tensors(name, sums | {"done": torch.tensor(stop)})
        return sums


def mean_of(stream: Stream) -> Float[Tensor, " D"]:
    """Mean of all images, float64."""
    rows, room = stream.rows, stream.rows.new_block(stream.fitting.block)

    def add(sums: dict[str, Tensor], start: int, stop: int) -> None:
        block = rows.read(start, stop, room)
        # of bytes at most 1,024 * 255 in a float32 sum: exact
        sums["total"] += block.sum(0) if rows.codec.of_pixels else block.sum(0, dtype=torch.float64)

    none = {"total": torch.zeros(rows.dim, dtype=torch.float64)}
    total = stream.summed("mean", stream.fitting.block, none, add)["total"]
    return rows.codec.values_(total / rows.count)


def covariance_of(stream: Stream, step: int) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Mean and covariance of all images, float64, `step` images at a time."""
    return (_exact_covariance if stream.rows.codec.of_pixels else _float_covariance)(stream, step)


def _exact_covariance(stream: Stream, step: int) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Mean and exact covariance in float64, from integer products where torch has them.

    Pixels minus 128 are exact in int8 and their products exact in int32: 0.09 s for 8,192 rows of 3,072
    values on 2 cores, against 0.80 s in float32.
    """
    rows = stream.rows

    def add(sums: dict[str, Tensor], start: int, stop: int) -> None:
        block = (rows.pixels[start:stop] ^ 128).view(torch.int8)
        _add_gram(block, sums["gram"])
        for some in block.split(_EXACT_ROWS):
            sums["total"] += some.float().sum(0) + 128 * len(some)

    sums = stream.summed("covariance", step, _nothing(rows.dim), add)
    mean = rows.codec.values_(sums["total"] / rows.count)
    centre = (mean - rows.codec.offset) * rows.codec.unit - 128
    gram = sums["gram"].triu_()
    gram += gram.triu(1).T
    gram = gram.div_(rows.count).sub_(torch.outer(centre, centre))
    return mean, gram.div_(rows.codec.unit**2)


def _float_covariance(stream: Stream, step: int) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Mean and covariance of floats, about the mean of the first images: a large one would cancel.

    Products of 1,024 rows are float32, whose rounding of 1e-6 averages out; their sums float64.
    """
    rows, room = stream.rows, stream.rows.new_block(min(stream.fitting.block, _EXACT_ROWS))
    start = rows.read(0, min(len(room), rows.count), room).mean(0)

    def add(sums: dict[str, Tensor], first: int, last: int) -> None:
        for one in range(first, last, len(room)):
            end = min(one + len(room), last)
            some = rows.read(one, end, room).sub_(start)
            sums["gram"] += some.T @ some
            sums["total"] += some.sum(0, dtype=torch.float64)
            rows.let_go(stream.budget, one, end)

    sums = stream.summed("covariance", step, _nothing(rows.dim), add)
    centre = sums["total"] / rows.count
    gram = sums["gram"].div_(rows.count).sub_(torch.outer(centre, centre))
    return rows.codec.values_(centre + start), gram.div_(rows.codec.unit**2)


def _add_gram(block: Int[Tensor, "R D"], to: Float[Tensor, "D D"]) -> None:
    """Adds B'B, exact; of its part below the diagonal only what comes along.

    torch._int_mm of torch 2.13 is wrong for a single column; small ones need no haste.
    """
    dim = block.shape[1]
    if dim >= _INTEGER_DIM and integers.are_fast():
        columns, step = block.T.contiguous(), -(-dim // _PANELS)
        for start in range(0, dim, step):
            to[start : start + step, start:] += torch._int_mm(columns[start : start + step], block[:, start:])
        return
    for rows in block.split(_EXACT_ROWS):
        wide = rows.float()
        to += wide.T @ wide


def _nothing(dim: int) -> dict[str, Tensor]:
    """Sums before the first image."""
    return {
        "gram": torch.zeros(dim, dim, dtype=torch.float64),
        "total": torch.zeros(dim, dtype=torch.float64),
    }
