"""The stored images as a field reads them: blocks to stream, rows to gather, on its device.

A stored number p stands for the value p / unit + offset of the store's codec. Sums run over p as float32,
which holds every byte and float16 exactly, and the affine map is applied to the result (`codec`).
"""

from collections.abc import Iterator
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from nnflow.codec import BYTES, Codec
from nnflow.errors import InputError
from nnflow.filemap import let_go, rows_at
from nnflow.memory import machine_memory, rows_within

_BLOCK_ROWS = 1024  # 12.6 MB of float32 at d = 3,072; from 256 to 4,096 the exact field's time moves by 6 %
# Of a block that is passed over several times, and at least so many rows: 1,024 of 12,288 values, 50 MB, are
# centred and squared in 52 ms on 2 cores, in blocks of 256 in 8. A product of 128 rows with each is quicker
# of the larger blocks, by a fifth.
_CACHED, _FEWEST = 12 << 20, 64
_copies: "WeakValueDictionary[tuple[int, int, torch.device], Tensor]" = WeakValueDictionary()


class PixelRows:
    """n rows of D stored numbers, kept where they are and read as float32 on `device`.

    On a GPU the rows move into device memory when they fill at most `share` of what is free, and are
    copied block by block when not. Of the same pixels there is one such copy, however many read it.
    """

    def __init__(
        self,
        pixels: Num[Tensor, "n D"],
        device: torch.device | str = "cpu",
        *,
        codec: Codec = BYTES,
        share: float = 0.6,
    ) -> None:
        if pixels.dtype != codec.dtype:
            raise InputError(f"rows of {pixels.dtype} with a codec of {codec.dtype}: wanted the store's own")
        self.codec = codec
        self.device = torch.device(device)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if pixels.nbytes <= share * free or (share and _key(pixels, self.device) in _copies):
                pixels = moved(pixels, self.device)
        self.pixels = pixels
        self.count, self.dim = pixels.shape
        self.longest, self.diameter = codec.longest(self.dim), codec.diameter(self.dim)
        self._norms: Tensor | None = None
        self._machine = machine_memory()

    def block_rows(self, budget: int) -> int:
        """Rows of a float32 block that take at most a quarter of `budget` bytes."""
        return rows_within(budget, 4 * self.dim, at_most=_BLOCK_ROWS, what="pixel block", share=4)

    def cached_rows(self, budget: int) -> int:
        """Rows of a block that stays in the processor's caches, within the same budget."""
        return min(self.block_rows(budget), max(_FEWEST, _CACHED // (4 * self.dim)))

    def new_block(self, rows: int) -> Float[Tensor, "R D"]:
        """Room for `rows` rows; `read` fills it, so that a stream allocates once."""
        return torch.empty(rows, self.dim, device=self.device)

    def read(self, start: int, stop: int, into: Float[Tensor, "R D"]) -> Float[Tensor, "r D"]:
        """Rows `start` to `stop` as p, not values yet, in the head of `into`."""
        return into[: stop - start].copy_(self._here(self.pixels[start:stop]))

    def _here(self, rows: Num[Tensor, "m D"]) -> Num[Tensor, "m D"]:
        """Rows on `device`, as they are stored: `copy_` would send floats, of bytes four times as much.

        Through pinned memory to a GPU, which may still be copying when this returns; the allocator of pinned
        memory keeps it until then.
        """
        if self.device.type == "cuda" and rows.device.type == "cpu":
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def blocks(
        self, budget: int, start: int = 0, stop: int | None = None, *, rows: int | None = None
    ) -> Iterator[tuple[int, int, Float[Tensor, "r D"]]]:
        """Rows `start` to `stop` in order: first and end of each block, and it as p, not values yet.

        The block may be written to: it is filled anew for each. It has `rows` rows, or `block_rows`.
        """
        stop = self.count if stop is None else stop
        room = self.new_block(rows or self.block_rows(budget))
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

    def gather(self, ids: Int[Tensor, " m"], budget: int | None = None) -> Num[Tensor, "m D"]:
        """Rows by number, as stored; of stores too large to become resident by reading, not by their map.

        Too large: more than a quarter of a `budget`, where one is given, else of the machine's memory.
        """
        room = self._machine if budget is None else budget
        if 4 * self.pixels.nbytes > room:
            return self._here(rows_at(self.pixels, ids))
        return self._here(self.pixels.index_select(0, ids.to(self.pixels.device)))

    def values(self, ids: Int[Tensor, " m"], budget: int | None = None) -> Float[Tensor, "m D"]:
        """The images `ids` in their values; `budget` as of `gather`."""
        return self.codec.values_(self.gather(ids, budget).float())

    def squared_norms(self, budget: int) -> Float[Tensor, " n"]:
        """|x_i|^2, float64: one pass over all images, the first time."""
        if self._norms is not None:
            return self._norms
        unit = self.codec.unit
        norms = torch.empty(self.count, dtype=torch.float64, device=self.device)
        for start, stop, block in self.blocks(budget, rows=self.cached_rows(budget)):
            # Of bytes (p - 127.5)^2 is a multiple of 1/4 up to 16,256: exact in float32, summed in float64.
            squares = block.add_(self.codec.offset * unit).square_().sum(1, dtype=torch.float64)
            norms[start:stop] = squares / unit**2
        self._norms = norms
        return norms


def moved(pixels: Num[Tensor, "n D"], device: torch.device) -> Num[Tensor, "n D"]:
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
