"""What stored numbers stand for: an affine map from a file's numbers p to the values a field works with.

    value = p / unit + offset

    pixels    bytes, p in 0 .. 255, unit 127.5, offset -1: values in [-1, 1]
    latents   p in float16 or float32, as an autoencoder gave them; unit = 1 / scaling, offset 0

Sums run over p and the map is applied to the result: one pass less over the data.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Num, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The map, and how far the stored numbers reach.

    Attributes:
        dtype: of the stored numbers.
        unit: stored numbers to one of the values'.
        offset: the value of a stored 0.
        reach: no row of p / unit is longer than this (L2); None for bytes, where 0 .. 255 says it.
    """

    dtype: torch.dtype
    unit: float
    offset: float
    reach: float | None = None

    @property
    def of_pixels(self) -> bool:
        """Whether bytes are stored, which are pixels and can be mirrored; else latents, which cannot."""
        return self.dtype == torch.uint8

    @property
    def scaling(self) -> float:
        """What a stored number is multiplied by."""
        return 1 / self.unit

    def values_(self, numbers: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Values in the place of stored `numbers`, or of weighted means of such."""
        numbers.div_(self.unit)
        return numbers.add_(self.offset) if self.offset else numbers

    def values(self, numbers: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Stored `numbers` as float32 values."""
        return self.values_(numbers.to(torch.float32, copy=True))

    def same(self, values: Float[Tensor, "B D"], stored: Float[Tensor, "B D"]) -> Bool[Tensor, " B"]:
        """Which rows of `values` are their row of `stored` values, as precisely as the numbers are kept.

        Bytes: equal in every byte, for codecs that round differently in the last bit of a float write equal
        pixels. Floats: everywhere within half a spacing of the row's largest number.
        """
        if self.of_pixels:
            return (to_uint8(values) == to_uint8(stored)).all(1)
        spacing = max(torch.finfo(self.dtype).eps / 2, 4 * torch.finfo(torch.float32).eps)
        apart = (values - stored).abs().amax(1)
        return apart <= spacing * stored.abs().amax(1)

    def longest(self, dim: int) -> float:
        """No row of `dim` values is further than this from `offset` (L2)."""
        return 2 * math.sqrt(dim) if self.reach is None else self.reach

    def diameter(self, dim: int) -> float:
        """No two rows of `dim` values are further apart than this (L2)."""
        return 2 * math.sqrt(dim) if self.reach is None else 2 * self.reach


BYTES = Codec(dtype=torch.uint8, unit=127.5, offset=-1.0)


def to_uint8(images: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """[-1, 1] to 0 .. 255, rounded; values outside are clamped, NaN is black."""
    return images.float().add(1).mul_(127.5).nan_to_num_(nan=0.0).round_().clamp_(0, 255).byte()
