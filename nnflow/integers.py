"""Products of bytes, summed exactly: the fastest a processor with VNNI (or AMX) instructions can do.

On one such machine (2 cores) 66 x 512 by 512 x 50,000 takes 2.9 ms, in bfloat16 8 ms, in float32 25 ms. With
AVX2 alone torch._int_mm is a plain loop, 1,108 ms where float32 takes 105, and is not used; factors that are
laid out take 10.5 ms there (float32: 35), of digits of 7 bits.
"""

import functools
import time
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

LEVELS = 127  # a signed byte holds -LEVELS ... LEVELS
LEAST = 16  # below, a product needs no haste; torch._int_mm of torch 2.13 was wrong for a single column
_SHORT = 63  # digits whose products with bytes, two added, stay within 16 bits: 2 * 127 * 128 = 32,512
_PROBED = (64, 512, 512)  # rows, terms and columns of a product that is timed
_TOGETHER = 8  # of products that have their factors to themselves


@functools.cache
def are_fast() -> bool:
    """Whether this processor's torch._int_mm is there, right, and quicker than float32."""
    rows, terms, columns = _PROBED
    a, b = _worst(rows, terms), _worst(columns, terms)
    try:
        right = bool((torch._int_mm(a, b.T) == terms * LEVELS**2).all())
        return right and _quicker(lambda: torch._int_mm(a, b.T), lambda: a.float() @ b.float().T)
    except (AttributeError, RuntimeError):  # a build of torch without it
        return False


def _worst(rows: int, terms: int, levels: int = LEVELS) -> Int8[Tensor, "rows terms"]:
    """Digits whose products are largest."""
    return torch.full((rows, terms), levels, dtype=torch.int8)


def _quicker(one: Callable[[], Tensor], other: Callable[[], Tensor]) -> bool:
    """Whether `one` takes less time than `other`: each at its best of three, in turn.

    Bytes take an eighth of float32's time with VNNI instructions, ten times as long in a plain loop.
    """
    best = [float("inf")] * 2
    for _ in range(3):
        for place, call in enumerate((one, other)):
            began = time.perf_counter()
            call()
            best[place] = min(best[place], time.perf_counter() - began)
    return best[0] < best[1]


def product(a: Int8[Tensor, "m k"], b: Int8[Tensor, "k n"]) -> Int[Tensor, "m n"] | Float[Tensor, "m n"]:
    """The product a b: int32 and exact where that is fast, float32 elsewhere.

    A float32 result is exact up to k = 1,040, and beyond that rounded as float32 sums are.
    """
    if a.device.type == "cpu" and min(b.shape) >= LEAST and are_fast():
        return torch._int_mm(a, b)
    return a.float() @ b.float()


class Factor:
    """A matrix b of bytes, laid out by oneDNN for products a b' with many a."""

    most_added = 1 << 22  # sums to which products are added at once: in place

    def __init__(self, b: Int8[Tensor, "m k"]) -> None:
        """Copies `b`."""
        self._columns = len(b)
        spare = -len(b) % LEAST
        rows = torch.nn.functional.pad(b, (0, 0, 0, spare)) if spare else b
        self._held = torch.ops.onednn.qlinear_prepack(rows.contiguous(), None)

    @staticmethod
    def sent(digits: Int8[Tensor, "n k"], levels: int) -> UInt8[Tensor, "n k"]:
        """Digits of so many levels as `product` takes them, without a sign: 0 is levels + 1."""
        return (digits.to(torch.int16) + (levels + 1)).to(torch.uint8)

    def product(self, a: UInt8[Tensor, "n k"], levels: int) -> Float[Tensor, "n m"]:
        """Of digits as they are `sent`: summed exactly, then rounded to float32."""
        return self._of(a, levels + 1)

    def add(self, a: UInt8[Tensor, "n k"], levels: int, scale: float, to: Float[Tensor, "n m"]) -> None:
        """Adds `scale` times the `product` to contiguous `to`."""
        if self._columns % LEAST or not to.is_contiguous() or not adds_in_place():
            to.add_(self.product(a, levels), alpha=scale)
        else:
            self._add(a, levels + 1, scale, to)

    def _add(self, a: UInt8[Tensor, "n k"], zero: int, scale: float, to: Float[Tensor, "n m"]) -> Tensor:
        """Adds scale (a - zero) b' to contiguous `to`, and returns it."""
        one, none = _one_and_none()
        return torch.ops.onednn.qlinear_pointwise.binary(
            *(a, scale, zero, self._held, one, none, to, None, 1.0, 0),
            *(torch.float32, 1.0, 0, "sum", 1.0, "none", [], ""),
        )

    def sum(self, weights: Float[Tensor, "n k"]) -> Float[Tensor, "n m"]:
        """Of whole numbers, 0 ... 127: exact, then rounded to float32."""
        return self._of(weights.to(torch.uint8), 0)

    def _of(self, a: UInt8[Tensor, "n k"], zero: int) -> Float[Tensor, "n m"]:
        """(a - zero) b'."""
        one, none = _one_and_none()
        found = torch.ops.onednn.qlinear_pointwise(
            a, 1.0, zero, self._held, one, none, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return found[:, : self._columns]


class ShortFactor:
    """The same laid out by FBGEMM, for digits of at most 63.

    Without VNNI instructions oneDNN lays b out anew for every product, FBGEMM once: 2 rows by 32,768 of 448
    terms take 0.4 ms for 3.6, 34 rows 3.2 for 6.9, 128 rows 13.5 for 15.7. Sums of 25 rows of 32,768 terms by
    128 columns take 1.0 ms for 1.3 from floats, of which oneDNN wants bytes made.
    """

    most_added = 1 << 20  # sums to which products are added at once: these lie in memory of their own

    def __init__(self, b: Int8[Tensor, "m k"]) -> None:
        """Copies `b`."""
        with warnings.catch_warnings():
            # Quantised types may leave torch (its issue 184982); `factor_kind` does without them then.
            warnings.simplefilter("ignore", UserWarning)
            in_ones = torch._make_per_tensor_quantized_tensor(b.contiguous(), 1.0, 0)
            self._held = torch.ops.quantized.linear_prepack(in_ones, None)

    @staticmethod
    def sent(digits: Int8[Tensor, "n k"], levels: int) -> Float[Tensor, "n k"]:  # noqa: ARG004
        """Digits as `product` takes them: it makes bytes of them itself."""
        return digits.float()

    def product(self, a: Float[Tensor, "n k"], levels: int) -> Float[Tensor, "n m"]:
        """Of digits as they are `sent`: summed exactly, then rounded to float32."""
        return self._of(a, levels + 1)

    def add(self, a: Float[Tensor, "n k"], levels: int, scale: float, to: Float[Tensor, "n m"]) -> None:
        """Adds `scale` times the `product` to `to`."""
        to.add_(self.product(a, levels), alpha=scale)

    def sum(self, weights: Float[Tensor, "n k"]) -> Float[Tensor, "n m"]:
        """Of whole numbers, 0 ... 127: exact, two products stay within 16 bits; then rounded to float32."""
        return self._of(weights, 0)

    def _of(self, a: Float[Tensor, "n k"], zero: int) -> Float[Tensor, "n m"]:
        """Product a b' of elements that fit in a byte without a sign once `zero` is added."""
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return multiply(a, 1.0, zero, self._held)


@functools.cache
def _one_and_none() -> tuple[Tensor, Tensor]:
    """Scale and zero point of a factor's bytes."""
    return torch.ones(1), torch.zeros(1, dtype=torch.int64)


@functools.cache
def adds_in_place() -> bool:
    """Whether oneDNN adds a product to what is there: no memory for it, and no pass over that."""
    rows, terms, columns = _PROBED
    factor, to = Factor(_worst(columns, terms)), torch.ones(rows, columns)
    try:
        found = factor._add(factor.sent(_worst(rows, terms, 1), 1), 2, 3.0, to)
        return found.data_ptr() == to.data_ptr() and bool((to == 3 * terms * LEVELS + 1).all())
    except (AttributeError, RuntimeError, TypeError):  # a build of torch without it, or with another
        return False


@functools.cache
def factor_levels() -> int:
    """The largest digit that a `Factor` multiplies right, and quicker than float32; 0: none, or no factors.

    127, or 63 without VNNI instructions, where oneDNN adds pairs of products in 16 bits, which saturate: of
    127 * 127 those of 64 pairs come to 8,160 instead of 1,032,256.
    """
    rows, terms, columns = _PROBED
    b = _worst(columns, terms)
    try:
        factor = Factor(b)
        if bool((factor.sum(_worst(rows, terms).float()) != terms * LEVELS**2).any()):
            return 0
        for levels in (LEVELS, _SHORT):
            if _is_right(factor, levels):
                break
        else:
            return 0
    except (AttributeError, RuntimeError, TypeError):  # a build of torch without them, or with others
        return 0
    # What saturates is no plain loop: 2.5 times as quick as float32, too little to time on a busy machine.
    a = _worst(rows, terms, levels)
    sent = factor.sent(a, levels)
    plain = levels == LEVELS and not _quicker(
        lambda: factor.product(sent, levels), lambda: a.float() @ b.float().T
    )
    return 0 if plain else levels


def _is_right(factor: "Factor | ShortFactor", levels: int) -> bool:
    """Whether the products of a factor of `_worst` with the worst digits are."""
    rows, terms, _ = _PROBED
    found = factor.product(factor.sent(_worst(rows, terms, levels), levels), levels)
    return bool((found == terms * levels * LEVELS).all())


@functools.cache
def factor_kind() -> type[Factor] | type[ShortFactor]:
    """Which multiplies digits of `factor_levels` more quickly."""
    rows, terms, columns = _PROBED
    try:
        factor = ShortFactor(_worst(columns, terms))
        short = factor_levels() == _SHORT and _is_right(factor, _SHORT)
        short = short and bool((factor.sum(_worst(rows, terms).float()) == terms * LEVELS**2).all())
    except (AttributeError, RuntimeError, TypeError):  # a build of torch without it
        short = False
    return ShortFactor if short else Factor


def two_digits(
    values: Float[Tensor, "m k"], levels: int = LEVELS
) -> tuple[Int8[Tensor, "2*m k"], Float[Tensor, " m"]]:
    """Rows as integers of two digits: values = unit (2 levels high + low), both in -levels ... levels.

    Off by at most unit / 2: of 127 levels, a 64,516th of the row's largest value.

    Returns:
        the high digits of all rows, then the low ones; and the units.
    """
    unit = unit_of(values, levels=levels)
    whole = (values / unit[:, None]).round_()
    high = (whole / (2 * levels)).round_()
    return torch.cat([high, whole.sub_(high, alpha=2 * levels)]).to(torch.int8), unit


def one_digit(
    values: Float[Tensor, "m k"], levels: int = LEVELS
) -> tuple[Int8[Tensor, "m k"], Float[Tensor, " m"]]:
    """Rows as integers of one digit: values = unit digit, off by at most unit / 2.

    Returns:
        the digits, -levels ... levels; and the units, so small a part of each row's largest value.
    """
    unit = unit_of(values, digits=1, levels=levels)
    return (values / unit[:, None]).round_().to(torch.int8), unit


def unit_of(values: Float[Tensor, "m k"], *, digits: int = 2, levels: int = LEVELS) -> Float[Tensor, " m"]:
    """What the last of one or two digits counts in: of 127 levels, a 127th or 32,258th of a row's largest."""
    unit = values.abs().amax(1) / (levels if digits == 1 else 2 * levels**2)
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


def own_sums(weights: Float[Tensor, "B m k"], rows: Int8[Tensor, "B k r"]) -> Tensor:
    """The products w_q b_q of every q, (B, m, r), w whole, 0 ... 127; int32 or float32 as `product`."""
    if weights.device.type != "cpu" or not are_fast():
        return torch.bmm(weights, rows.float())
    size, digits, terms = weights.shape
    found = torch.empty(size, digits, rows.shape[2], dtype=torch.int32)
    for start in range(0, size, _TOGETHER):
        some, theirs = weights[start : start + _TOGETHER], rows[start : start + _TOGETHER]
        apart = torch.zeros(len(some), digits, len(some), terms, dtype=torch.int8)
        apart.diagonal(dim1=0, dim2=2).copy_(some.permute(1, 2, 0))
        summed = product(apart.view(len(some) * digits, -1), theirs.flatten(0, 1))
        found[start : start + _TOGETHER] = summed.view(len(some), digits, -1)
    return found
