"""The stored pixels as a field reads them: blocks to stream, rows to gather, on its device.

A pixel is p in 0..255 and stands for p / 127.5 - 1 in [-1, 1]. Sums run over p as float32, which is
exact, and the affine map is applied to the result: one pass less over the data.
"""

from collections.abc import Iterator
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nnflow.filemap import let_go
from nnflow.memory import rows_within

HALF_RANGE = 127.5  # p / HALF_RANGE - 1 maps 0..255 onto [-1, 1]
_BLOCK_ROWS = 1024  # 12.6 MB of float32 at d = 3,072; from 256 to 4,096 the exact field's time moves by 6 %
_copies: "WeakValueDictionary[tuple[int, int, torch.device], Tensor]" = WeakValueDictionary()
_SCATTERED = 16  # rows read here and there at once: each may bring 400 KiB of its file along


class PixelRows:
    """n rows of D uint8 pixels, kept where they are and read as float32 on `device`.

    On a GPU the rows move into device memory when they fill at most `share` of what is free, and are
    copied block by block when not. Of the same pixels there is one such copy, however many read it.
    """

    def __init__(
        self, pixels: UInt8[Tensor, "n D"], device: torch.device | str = "cpu", *, share: float = 0.6
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if pixels.nbytes <= share * free or (share and _key(pixels, self.device) in _copies):
                pixels = moved(pixels, self.device)
        self.pixels = pixels
        self.count, self.dim = pixels.shape
        self._norms: Tensor | None = None

    def block_rows(self, budget: int) -> int:
        """Rows of a float32 block that take at most a quarter of `budget` bytes."""
        return rows_within(budget, 4 * self.dim, at_most=_BLOCK_ROWS, what="pixel block", share=4)

    def new_block(self, rows: int) -> Float[Tensor, "R D"]:
        """Room for `rows` rows; `read` fills it, so that a stream allocates once."""
        return torch.empty(rows, self.dim, device=self.device)

    def read(self, start: int, stop: int, into: Float[Tensor, "R D"]) -> Float[Tensor, "r D"]:
        """Rows `start` to `stop` as p in 0..255, in the head of `into`."""
        return into[: stop - start].copy_(self._here(self.pixels[start:stop]))

    def _here(self, rows: UInt8[Tensor, "m D"]) -> UInt8[Tensor, "m D"]:
        """Rows on `device`, as the bytes they are: `copy_` would send floats, four times as much.

        Through pinned memory to a GPU, which may still be copying when this returns; the allocator of pinned
        memory keeps it until then.
        """
        if self.device.type == "cuda" and rows.device.type == "cpu":
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def blocks(
        self, budget: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, int, Float[Tensor, "r D"]]]:
        """Rows `start` to `stop` in order: first and end of each block, and it as p in 0..255.

        The block may be written to: it is filled anew for each.
        """
        stop = self.count if stop is None else stop
        room = self.new_block(self.block_rows(budget))
        for first in range(start, stop, len(room)):
            end = min(first + len(room), stop)
            yield first, end, self.read(first, end, room)
            self.let_go(budget, first, end)

    def let_go(self, budget: int, start: int = 0, stop: int | None = None) -> None:
        """Lets pages go that rows were read from, where all rows are more than a quarter of `budget`.

        A quarter, as for a block: smaller stores stay mapped, and are read without asking the kernel again.
        """
        if 4 * self.pixels.nbytes > budget:
            let_go(self.pixels[start:stop])

    def gather(self, ids: Int[Tensor, " m"], budget: int | None = None) -> UInt8[Tensor, "m D"]:
        """Rows by number; within a `budget`, pages are let go of on the way as `let_go` does."""
        if budget is None or 4 * self.pixels.nbytes <= budget:
            return self._here(self.pixels.index_select(0, ids.to(self.pixels.device)))
        found = torch.empty(len(ids), self.dim, dtype=torch.uint8, device=self.device)
        for start in range(0, len(ids), _SCATTERED):
            some = ids[start : start + _SCATTERED]
            found[start : start + len(some)] = self.gather(some)
            self.let_go(budget, int(some.min()), int(some.max()) + 1)
        return found

    def squared_norms(self, budget: int) -> Float[Tensor, " n"]:
        """|x_i|^2 in [-1, 1] units, float64: one pass over all pixels, the first time."""
        if self._norms is not None:
            return self._norms
        norms = torch.empty(self.count, dtype=torch.float64, device=self.device)
        for start, stop, block in self.blocks(budget):
            # (p - 127.5)^2 is a multiple of 1/4 up to 16,256: exact in float32, summed in float64.
            norms[start:stop] = block.sub_(HALF_RANGE).square_().sum(1, dtype=torch.float64) / HALF_RANGE**2
        self._norms = norms
        return norms


def moved(pixels: UInt8[Tensor, "n D"], device: torch.device) -> UInt8[Tensor, "n D"]:
    """`pixels` on another device: the copy that is there already, while anyone holds it."""
    key = _key(pixels, device)
    there = _copies.get(key)
    if there is None:
        there = pixels.to(device)
        there.source = pixels  # type: ignore[attr-defined]  # so that its address is no other's
        _copies[key] = there
    return there


def _key(pixels: Tensor, device: torch.device) -> tuple[int, int, torch.device]:
    # "cuda" is a device without a number, "cuda:0" may be the same
    return pixels.data_ptr(), pixels.nbytes, torch.empty(0, device=device).device
