"""Every image's principal coordinates, one byte each: what all images are weighed by.

With y = P (x - t mean) and z_i = P (x_i - mean) the logit of image i in its first r coordinates is, less
a term all images share (docs/field.md, eq. 9),

    gain (y . z_i - t |z_i|^2 / 2),    gain = t / (1-t)^2

A byte holds z_ij in steps of a 127th of the largest |z_j| of any image: per coordinate for the first 64,
the largest of these steps for the others, whose spread differs less. On CIFAR-10 that moves an image by
0.6, of a length of 28; 3.5 lie outside the 512 coordinates kept. The rounded z are the coordinates: norms
are taken after rounding.

Axes:  B queries   n images   K images of one query   R coordinates kept   r of them used
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from nnflow import integers
from nnflow.embedding import Embedding
from nnflow.errors import StoreError
from nnflow.files import disk_errors, reserve, shown, write_at
from nnflow.integers import LEVELS
from nnflow.laidout import LaidOut, Rows

_FIRST_EDGE = 32
_HEAD = 64  # coordinates with a step of their own
_MIDDLE = 512  # where ladders of all 1,024 and of half of them part
# Where 512 part, from so many images on that a sample stands for the rest of a scan by 256. In one piece more
# 50,000 images take a tenth more time; the first 256 of 1,281,167 would take 328 MB once more.
_HALF, _MANY = 256, 1 << 19
_BLOCK_ROWS = 1 << 13  # whose squares are summed at once


def edges_of(count: int) -> tuple[int, ...]:
    """Ranks a ladder may have: 32, 64, 128, ..., and all `count`."""
    found, edge = [], _FIRST_EDGE
    while edge < count:
        found.append(edge)
        edge *= 2
    return (*found, count)


class Coordinates:
    """The coordinates of n images and the map that gives those of a query."""

    def __init__(self, rows: Int8[Tensor, "n R"], embedding: Embedding) -> None:
        self.rows = rows
        self.embedding = embedding
        self.steps = _steps(embedding.peaks)
        self.edges = edges_of(rows.shape[1])
        self._squares: dict[int, Tensor] = {}
        self._widest: dict[int, float] = {}
        self._moved: dict[torch.device, Coordinates] = {}
        self._samples: dict[int, Sample] = {}
        self._laid_out: LaidOut | None = None

    @property
    def rank(self) -> int:
        """Coordinates kept."""
        return self.edges[-1]

    def to(self, device: torch.device) -> "Coordinates":
        """The same on another device; moved once, however many ladders use them there."""
        if self.rows.device == device:
            return self
        if device not in self._moved:
            self._moved[device] = Coordinates(self.rows.to(device), self.embedding.to(device))
        return self._moved[device]

    def edge(self, rank: int) -> int:
        """The smallest of the `edges` that is at least `rank`, or the last."""
        return next((edge for edge in self.edges if edge >= rank), self.rank)

    def rounding(self, rank: int) -> float:
        """No image is moved further than this (L2) in its first `rank` coordinates by rounding to bytes."""
        return 0.5 * self.steps[:rank].double().norm().item() * (1 + 1e-6)

    def squares(self, rank: int) -> Float[Tensor, " n"]:
        """|z_i|^2 in the first `rank` coordinates; a pass over them the first time."""
        if rank not in self._squares:
            blocks = self.rows[:, :rank].split(_BLOCK_ROWS)
            self._squares[rank] = torch.cat([self.values(block).square_().sum(1) for block in blocks])
        return self._squares[rank]

    def sample(self, count: int) -> "Sample":
        """`count` of the images, a random one of each of as many stretches of equal length; drawn once."""
        if count not in self._samples:
            edges = torch.arange(count + 1) * len(self.rows) // count
            draws = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            places = (edges[:-1] + (draws * edges.diff()).long()).to(self.rows.device)
            self._samples[count] = Sample(places, Coordinates(self.rows[places], self.embedding))
        return self._samples[count]

    def scanned(self, images: slice, budget: int) -> Rows:
        """Some images' bytes as a scan reads them: laid out if all are asked for and fit in `budget` bytes.

        A class' images are few, and the blocks laid out begin elsewhere.
        """
        count, rank = self.rows.shape
        fits = self.rows.device.type == "cpu" and self.rows.nbytes <= budget and rank >= integers.LEAST
        if (images.start, images.stop) != (0, count) or not fits or not integers.factor_levels():
            return Rows(self.rows[images])
        if self._laid_out is None:
            halves = count >= _MANY and rank == _MIDDLE
            self._laid_out = LaidOut(self.rows, cuts=(_HALF,) if halves else (_MIDDLE,))
        return self._laid_out

    def widest(self, rank: int) -> float:
        """The largest sum of |bytes| of any image's first `rank`; a pass over them the first time."""
        if rank not in self._widest:
            blocks = self.rows[:, :rank].split(_BLOCK_ROWS)
            self._widest[rank] = max(block.float().abs_().sum(1).max().item() for block in blocks)
        return self._widest[rank]

    def values(self, rows: Tensor) -> Float[Tensor, "... r"]:
        """The coordinates that rows of bytes, or weighted means of such rows, stand for."""
        return rows.float() * self.steps[: rows.shape[-1]]

    def query(
        self, y: Float[Tensor, "B r"], t: Float[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B r"], Float[Tensor, " B"]]:
        """What makes logits of an image's bytes and its square: logit_i = row . q_i - fall |z_i|^2.

        Args:
            y: the query's first r coordinates, P (x - t mean).
            t: times.
        """
        gain = t.double() / (1 - t.double()).square()
        row = gain[:, None] * y.double() * self.steps[: y.shape[1]].double()
        return row.float(), (0.5 * gain * t.double()).float()

    def encoded(self, z: Float[Tensor, "m R"]) -> Int8[Tensor, "m R"]:
        """Coordinates as bytes, to the nearest step."""
        return (z / self.steps).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)

    @classmethod
    def empty(cls, embedding: Embedding) -> "Coordinates":
        """Those of no image yet."""
        return cls(torch.empty(0, len(embedding.peaks), dtype=torch.int8), embedding)

    @classmethod
    def open(cls, path: Path, embedding: Embedding, count: int) -> "Coordinates":
        """Maps a finished `CoordinateFile`.

        Raises:
            StoreError: absent, cut, or of other images.
        """
        try:
            held = np.lib.format.open_memmap(path, mode="c")  # "c": torch wants it writable
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(
                f"{shown(path)}: not readable coordinates ({shown(error)}); build the index again"
            ) from error
        wanted = (count, len(embedding.peaks))
        if held.dtype != np.int8 or held.shape != wanted:
            raise StoreError(
                f"{shown(path)}: {held.dtype} of shape {held.shape}, wanted int8 {wanted}; build the "
                "index again"
            )
        return cls(torch.from_numpy(held), embedding)


@dataclass(frozen=True)
class Sample:
    """Some of the images, that stand for all.

    Attributes:
        places: which, ascending.
        coordinates: theirs.
    """

    places: Int[Tensor, " m"]
    coordinates: Coordinates


def _steps(peaks: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """What one unit of each coordinate's byte stands for; 1 where every image has the same."""
    steps = peaks / LEVELS
    if len(steps) > _HEAD:
        steps = torch.cat([steps[:_HEAD], steps[_HEAD:].amax().expand(len(steps) - _HEAD)])
    return steps.where(steps > 0, 1.0)


class CoordinateFile:
    """A (count, rank) matrix of bytes on disk that is filled block by block, in any order.

    Written, not mapped: what has been written is the kernel's memory and not this process's.

    Raises:
        StoreError: the disk is full or refuses.
    """

    def __init__(self, path: Path, count: int, rank: int) -> None:
        self._path, self._rank = path, rank
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|i1", "fortran_order": False, "shape": (count, rank)}
        )
        self._offset = header.tell()
        with disk_errors(path, "writing"):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            before = os.fstat(self._file).st_size
            try:
                reserve(self._file, self._offset + count * rank)  # a full disk refuses here, before the work
                write_at(self._file, header.getbuffer(), 0)
            except BaseException:
                os.ftruncate(self._file, before)  # a refused reservation keeps what there was of room
                os.close(self._file)
                raise

    def __enter__(self) -> "CoordinateFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def put(self, start: int, rows: Int8[Tensor, "m R"]) -> None:
        """Writes `rows` from row `start` on."""
        with disk_errors(self._path, "writing"):
            write_at(self._file, rows.contiguous().numpy().data.cast("B"), self._offset + start * self._rank)

    def sync(self) -> None:
        """Brings what has been written to the disk."""
        with disk_errors(self._path, "writing"):
            os.fdatasync(self._file)
