"""All images' bytes as the products of a few queries with them read them: as they lie, or laid out for that.

A processor multiplies bytes a row of one matrix by sixteen columns of the other, four terms at once, and an
image's bytes lie the wrong way for it to take sixteen images together. Laid out beforehand, products of 25
queries with 262,144 images in 512 coordinates take 11.5 ms for 26.9, weighted sums of 128 coordinates 2.9 ms
for 10.4 (2 cores; the images are read in 4.6).

Axes:  n images   m of them, a block   C rows of digits   B queries   r coordinates
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from nnflow import integers

_BLOCK = 1 << 19  # logits of a block: with them, and the integers they are made of, 6 MB
_LEAST_ROWS, _MOST_ROWS = 1 << 11, 1 << 14  # of a block of rows as they lie
# Rows laid out together; products of bytes sum within int32. 9 queries in 64 coordinates (n = 1,281,167)
# take 57 ms in blocks of 2^14, 46 of 2^15, 64 queries in 512 coordinates 454 and 498 ms.
MOST_ROWS = 1 << 15

# Adds products with some images, (C, m), to float32 that is contiguous
Adding = Callable[[slice, Tensor], None]

Factors = list[integers.Factor | integers.ShortFactor]


class Rows:
    """The first r coordinates of all images, a byte each, as they lie in memory."""

    levels = integers.LEVELS  # of the digits they are multiplied by
    most_added = 1 << 20  # logits to which products are added at once: these lie in memory of their own

    def __init__(self, rows: Int8[Tensor, "n r"]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def block_rows(self, queries: int) -> int:
        """Images of a block for so many queries: so many that their logits stay in the cache of a core."""
        return block_rows(queries)

    def blocks(self, queries: int) -> Iterator[slice]:
        """Consecutive images, `block_rows` in each but the last."""
        size = self.block_rows(queries)
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def adding(self, digits: Int8[Tensor, "C k"], scale: float) -> Adding:
        """What adds `scale` times the products of the first k coordinates with `digits`."""
        rows = self.rows[:, : digits.shape[1]]

        def add(images: slice, to: Tensor) -> None:
            to.add_(integers.product(digits, rows[images].T), alpha=scale)

        return add

    def sums(self, weights: Float[Tensor, "B m"], images: slice, rank: int) -> Tensor:
        """Of the first `rank` coordinates, weighted by whole numbers, 0 ... 127: (B, rank)."""
        return integers.product(weights.to(torch.int8), self.rows[images, :rank])


class LaidOut(Rows):
    """The same, laid out for the processor as they are asked for: a copy of them in memory.

    Args:
        rows: all coordinates of all images.
        cuts: no layout reaches across one of these, so that ladders of any rank share the others.
    """

    def __init__(self, rows: Int8[Tensor, "n R"], cuts: tuple[int, ...]) -> None:
        super().__init__(rows)
        self._cuts = cuts
        self.levels = integers.factor_levels()
        self._kind = integers.factor_kind()
        self.most_added = self._kind.most_added
        self._across: dict[tuple[int, int], Factors] = {}
        self._along: dict[int, Factors] = {}

    def block_rows(self, queries: int) -> int:  # noqa: ARG002
        """Images of a block: as many as were laid out together."""
        return MOST_ROWS

    def adding(self, digits: Int8[Tensor, "C k"], scale: float) -> Adding:
        """As of those not laid out."""
        parts = [
            self._part(digits[:, first:last], first, last) for first, last in self._pieces(digits.shape[1])
        ]

        def add(images: slice, to: Tensor) -> None:
            for blocks, sent in parts:
                blocks[images.start // MOST_ROWS].add(sent, self.levels, scale, to)

        return add

    def _pieces(self, rank: int) -> Iterator[tuple[int, int]]:
        """The first `rank` coordinates, divided at the cuts."""
        return pairwise([0, *(cut for cut in self._cuts if cut < rank), rank])

    def _part(self, digits: Int8[Tensor, "C k"], first: int, last: int) -> tuple[Factors, Tensor]:
        """Those coordinates of all images, and the digits as they take them."""
        if (first, last) not in self._across:
            rows = self.rows[:, first:last]
            self._across[first, last] = [self._kind(rows[some]) for some in self.blocks(1)]
        return self._across[first, last], self._kind.sent(digits, self.levels)

    def sums(self, weights: Float[Tensor, "B m"], images: slice, rank: int) -> Tensor:
        """As of those not laid out, as float32."""
        if rank not in self._along:
            rows = self.rows[:, :rank]
            self._along[rank] = [self._kind(rows[some].T) for some in self.blocks(1)]
        return self._along[rank][images.start // MOST_ROWS].sum(weights)


def block_rows(queries: int) -> int:
    """Images of a block for so many queries, a power of two.

    289 queries in 64 coordinates take 11 ms in blocks of 2,048, 22 ms of 8,192; 12 in 512 coordinates 3.0 and
    2.4 ms.
    """
    return min(max(1 << (_BLOCK // max(1, queries)).bit_length() - 1, _LEAST_ROWS), _MOST_ROWS)
