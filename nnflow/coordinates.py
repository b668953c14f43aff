"""Every image's principal coordinates, laid out so that one bfloat16 product yields logits.

With y = P (x - t mean) and z_i = P (x_i - mean) the logit of image i in its first r coordinates is, less
a term all images share (docs/field.md, eq. 9),

    gain (y . z_i - t |z_i|^2 / 2),    gain = t / (1-t)^2

A bfloat16 has 8 significant bits, and a product of bfloat16 rounds its result to one, though it sums in
float32. So all that cancels is summed within the product. A row of the matrix is

    1 1 1 | z (first block)  z (its head again)  N N' N | z (second block)  N N' N | ...

with N + N' the block's squared norm to 16 bits; the query's row stands opposite:

    the shift in three parts | gain y, rounded   what that lost   c c c' | gain y   c c c' | ...

with c + c' = -gain t / 2. Blocks end at ranks 32, 64, 128, ...: to use fewer coordinates is to read the
head of each row. The rounded z are the coordinates: their norms are taken after rounding.

Axes:  B queries   n images   R coordinates kept   A columns of a row
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from nnflow.embedding import Embedding
from nnflow.errors import StoreError
from nnflow.files import shown, whole_file

UInt16Rows: TypeAlias = "np.memmap[tuple[int, int], np.dtype[np.uint16]]"  # numpy knows no bfloat16

_FIRST_EDGE = 32
# The head of y is kept to 16 bits: rounded to 8, the first coordinate alone (standard deviation 15 on
# CIFAR-10) tilts the far mean by a thousandth of the velocity.
_HEAD = 16
_ONES = 3
_NORMS = 3


def edges_of(count: int) -> tuple[int, ...]:
    """Ranks at which a row may be cut: 32, 64, 128, ..., and all `count`."""
    found, edge = [], _FIRST_EDGE
    while edge < count:
        found.append(edge)
        edge *= 2
    return (*found, count)


class Coordinates:
    """The coordinates of n images and the map that gives those of a query."""

    def __init__(self, rows: BFloat16[Tensor, "n A"], embedding: Embedding) -> None:
        self.rows = rows
        self.embedding = embedding
        self.edges = edges_of(len(embedding.principal))

    @property
    def rank(self) -> int:
        """Coordinates kept."""
        return self.edges[-1]

    def to(self, device: torch.device) -> "Coordinates":
        """The same on another device."""
        return Coordinates(self.rows.to(device), self.embedding.to(device))

    def edge(self, rank: int) -> int:
        """The smallest rank at which a row may be cut that is at least `rank`, or all of it."""
        return next((edge for edge in self.edges if edge >= rank), self.rank)

    def width(self, rank: int) -> int:
        """Columns that hold the first `rank` coordinates, an edge."""
        return _ONES + min(_HEAD, self.edges[0]) + rank + _NORMS * (1 + self.edges.index(rank))

    def query(
        self,
        y: Float[Tensor, "B r"],
        t: Float[Tensor, " B"],
        shift: Float[Tensor, " B"],
    ) -> BFloat16[Tensor, "B a"]:
        """The row that a query puts opposite the images': their product is the logit less `shift`.

        Args:
            y: its first r coordinates, P (x - t mean); r an edge.
            t: times.
            shift: float64; near the largest logit, so that those that matter are small numbers.
        """
        time = t.double()
        gain = time / (1 - time).square()
        scaled = (gain[:, None] * y.double()).float()
        coefficient = _halves(-0.5 * gain * time, 2)
        norms = torch.stack([coefficient[0], coefficient[0], coefficient[1]], 1)
        parts = [torch.stack(_halves(-shift, _ONES), 1)]
        start = 0
        for edge in self.edges[: self.edges.index(y.shape[1]) + 1]:
            parts.append(scaled[:, start:edge].bfloat16())
            if start == 0:
                head = scaled[:, :_HEAD]
                parts.append((head - head.bfloat16().float()).bfloat16())
            parts.append(norms)
            start = edge
        return torch.cat(parts, 1)

    def values(self, total: Float[Tensor, "B a"]) -> Float[Tensor, "B r"]:
        """The coordinates among the columns of a weighted sum of rows."""
        parts, column, start = [], _ONES, 0
        for edge in self.edges:
            if column >= total.shape[1]:
                break
            parts.append(total[:, column : column + edge - start])
            column += edge - start + _NORMS + (min(_HEAD, edge) if start == 0 else 0)
            start = edge
        return torch.cat(parts, 1)

    @classmethod
    def open(cls, path: Path, embedding: Embedding, count: int) -> "Coordinates":
        """Maps what `written` wrote.

        Raises:
            StoreError: absent, cut, or of other images.
        """
        try:
            held = np.lib.format.open_memmap(path, mode="c")  # "c": torch wants it writable
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(
                f"{shown(path)}: not readable coordinates ({shown(error)}); build the index again"
            ) from error
        wanted = (count, columns_of(len(embedding.principal)))
        if held.dtype != np.uint16 or held.shape != wanted:
            raise StoreError(
                f"{shown(path)}: {held.dtype} of shape {held.shape}, wanted uint16 {wanted}; build the "
                "index again"
            )
        return cls(torch.from_numpy(held).view(torch.bfloat16), embedding)


def columns_of(count: int) -> int:
    """Columns of a row of `count` coordinates."""
    edges = edges_of(count)
    return _ONES + min(_HEAD, edges[0]) + count + _NORMS * len(edges)


def encoded(z: Float[Tensor, "m R"]) -> BFloat16[Tensor, "m A"]:
    """Rows of the matrix for images of coordinates `z`."""
    rounded = z.bfloat16()
    parts = [torch.ones(len(z), _ONES, dtype=torch.bfloat16)]
    start = 0
    for edge in edges_of(z.shape[1]):
        block = rounded[:, start:edge]
        parts.append(block)
        if start == 0:
            parts.append(block[:, :_HEAD])
        high, low = _halves(block.double().square().sum(1), 2)
        parts.append(torch.stack([high, low, high], 1))
        start = edge
    return torch.cat(parts, 1)


@contextlib.contextmanager
def written(path: Path, count: int, rank: int) -> Iterator[UInt16Rows]:
    """An empty (count, A) matrix on disk, whole at `path` when the block ends well; rows as uint16.

    Raises:
        StoreError: the disk is full or refuses.
    """
    with whole_file(path) as partial:
        shape = (count, columns_of(rank))
        held = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint16, shape=shape)
        # A full disk would end a write through a memory map by a signal: take the room before.
        with partial.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, held.offset + held.nbytes)
        yield held
        held.flush()


def _halves(values: Float[Tensor, " m"], parts: int) -> list[BFloat16[Tensor, " m"]]:
    """`values` as a sum of bfloat16, each taking up what those before it lost."""
    found = []
    for _ in range(parts):
        part = values.bfloat16()
        found.append(part)
        values = values - part.to(values.dtype)
    return found


@functools.cache
def bfloat16_is_fast(device: str) -> bool:
    """Whether products of bfloat16 run at more than float32's rate on a device of type `device`."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
