"""Products of bytes, summed exactly: the fastest a processor with VNNI (or AMX) instructions can do.

On one such machine (2 cores) 66 x 512 by 512 x 50,000 takes 2.9 ms, in bfloat16 8 ms, in float32 25 ms.
"""

import functools

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

LEVELS = 127  # a signed byte holds -LEVELS ... LEVELS
_LOW = 2 * LEVELS  # steps of the second digit in one of the first
LEAST = 16  # below, a product needs no haste; torch._int_mm of torch 2.13 was wrong for a single column
_PROBED = 64
_SIGN = 128  # by which a signed byte lies below the unsigned one it is sent as
_TOGETHER = 8  # of products that have their factors to themselves


@functools.cache
def are_fast() -> bool:
    """Whether this processor's torch._int_mm is there and right.

    Without VNNI instructions oneDNN adds pairs of products in 16 bits, which saturate: with AVX2 alone
    64 products of 127 * 127 come to 8,160 instead of 1,032,256.
    """
    worst = torch.full((_PROBED, _PROBED), LEVELS, dtype=torch.int8)
    try:
        return bool((torch._int_mm(worst, worst) == _PROBED * LEVELS**2).all())
    except (AttributeError, RuntimeError):  # a build of torch without it
        return False


def product(a: Int8[Tensor, "m k"], b: Int8[Tensor, "k n"]) -> Int[Tensor, "m n"] | Float[Tensor, "m n"]:
    """The product a b: int32 and exact where that is fast, float32 elsewhere.

    A float32 result is exact up to k = 1,040, and beyond that rounded as float32 sums are.
    """
    if a.device.type == "cpu" and min(b.shape) >= LEAST and are_fast():
        return torch._int_mm(a, b)
    return a.float() @ b.float()


class Factor:
    """A matrix b of bytes, laid out by oneDNN for products a b' with many a."""

    def __init__(self, b: Int8[Tensor, "m k"]) -> None:
        """Copies `b`."""
        self._columns = len(b)
        spare = -len(b) % LEAST
        rows = torch.nn.functional.pad(b, (0, 0, 0, spare)) if spare else b
        self._held = torch.ops.onednn.qlinear_prepack(rows.contiguous(), None)

    def product(self, a: UInt8[Tensor, "n k"]) -> Float[Tensor, "n m"]:
        """Of signed bytes that are sent as `unsigned` ones: summed exactly, then rounded to float32."""
        return self._of(a, _SIGN)

    def sum(self, a: UInt8[Tensor, "n k"]) -> Float[Tensor, "n m"]:
        """Of weights, which have no sign and are sent as they are."""
        return self._of(a, 0)

    def _of(self, a: UInt8[Tensor, "n k"], zero: int) -> Float[Tensor, "n m"]:
        """(a - zero) b'."""
        one, none = _one_and_none()
        found = torch.ops.onednn.qlinear_pointwise(
            a, 1.0, zero, self._held, one, none, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return found[:, : self._columns]


def unsigned(a: Int8[Tensor, "n k"]) -> UInt8[Tensor, "n k"]:
    """Signed bytes as a `Factor` wants them: 0 is sent as 128."""
    return (a.to(torch.int16) + _SIGN).to(torch.uint8)


@functools.cache
def _one_and_none() -> tuple[Tensor, Tensor]:
    """Scale and zero point of a factor's bytes."""
    return torch.ones(1), torch.zeros(1, dtype=torch.int64)


@functools.cache
def factors_are_fast() -> bool:
    """Whether torch has the operators that a `Factor` needs, and they are right here (`are_fast`)."""
    worst = torch.full((_PROBED, _PROBED), LEVELS, dtype=torch.int8)
    try:
        factor = Factor(worst)
        right = (factor.product(unsigned(worst)) == _PROBED * LEVELS**2).all()
        right &= (factor.sum(worst.view(torch.uint8)) == _PROBED * LEVELS**2).all()
        return are_fast() and bool(right)
    except (AttributeError, RuntimeError, TypeError):  # a build of torch without them, or with others
        return False


def two_digits(values: Float[Tensor, "m k"]) -> tuple[Int8[Tensor, "2*m k"], Float[Tensor, " m"]]:
    """Rows as integers of two digits: values = unit (254 high + low), high and low in -127 ... 127.

    Off by at most unit / 2, a 64,516th of the row's largest value.

    Returns:
        the high digits of all rows, then the low ones; and the units.
    """
    unit = unit_of(values)
    whole = (values / unit[:, None]).round_()
    high = (whole / _LOW).round_()
    return torch.cat([high, whole.sub_(high, alpha=_LOW)]).to(torch.int8), unit


def one_digit(values: Float[Tensor, "m k"]) -> tuple[Int8[Tensor, "m k"], Float[Tensor, " m"]]:
    """Rows as integers of one digit: values = unit digit, off by at most unit / 2.

    Returns:
        the digits, -127 ... 127; and the units, a 127th of each row's largest value.
    """
    unit = unit_of(values, digits=1)
    return (values / unit[:, None]).round_().to(torch.int8), unit


def unit_of(values: Float[Tensor, "m k"], *, digits: int = 2) -> Float[Tensor, " m"]:
    """What the last of one or two digits counts in: a 127th, a 32,258th of the row's largest value."""
    unit = values.abs().amax(1) / (LEVELS if digits == 1 else LEVELS * _LOW)
    return unit.where(unit > 0, 1.0)


def own_products(a: Int8[Tensor, "B m k"], b: Int8[Tensor, "B n k"]) -> Tensor:
    """The products a_q b_q' of every q, (B, m, n), int32 or float32 as `product`.

    A few q at a time are multiplied all with all, and the others' products thrown away: bytes are so much
    faster, and there is no batched product of them, that this is a tenth of float32's time.
    """
    if a.device.type != "cpu" or not are_fast():
        return torch.bmm(a.float(), b.float().transpose(1, 2))
    size, rows, columns = len(a), a.shape[1], b.shape[1]
    found = torch.empty(size, rows, columns, dtype=torch.int32)
    for start in range(0, size, _TOGETHER):
        some, theirs = a[start : start + _TOGETHER], b[start : start + _TOGETHER]
        every = product(some.flatten(0, 1), theirs.flatten(0, 1).T)
        own = every.view(len(some), rows, len(some), columns).diagonal(dim1=0, dim2=2)
        found[start : start + _TOGETHER] = own.permute(2, 0, 1)
    return found


def own_sums(weights: Int8[Tensor, "B m k"], rows: Int8[Tensor, "B k r"]) -> Tensor:
    """The products w_q b_q of every q, (B, m, r), int32 or float32 as `product`."""
    if weights.device.type != "cpu" or not are_fast():
        return torch.bmm(weights.float(), rows.float())
    size, digits, terms = weights.shape
    found = torch.empty(size, digits, rows.shape[2], dtype=torch.int32)
    for start in range(0, size, _TOGETHER):
        some, theirs = weights[start : start + _TOGETHER], rows[start : start + _TOGETHER]
        apart = torch.zeros(len(some), digits, len(some), terms, dtype=torch.int8)
        apart.diagonal(dim1=0, dim2=2).copy_(some.permute(1, 2, 0))
        summed = product(apart.view(len(some) * digits, -1), theirs.flatten(0, 1))
        found[start : start + _TOGETHER] = summed.view(len(some), digits, -1)
    return found
