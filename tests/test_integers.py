"""Products of bytes against numpy's in int64; numbers as two digits."""

import functools
import platform
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from contract import DEVICE

from nnflow import integers


@pytest.fixture(params=[True, False], ids=["bytes", "float32"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not integers.are_fast():
        pytest.skip("this processor has no exact products of bytes")
    monkeypatch.setattr(integers, "are_fast", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 16, 1), (3, 5, 40), (1, 512, 17), (66, 512, 999), (7, 1000, 64)]
)
def test_products_are_exact_in_whatever_layout(shape: tuple[int, int, int], fast: bool) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(m * n)
    a = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8).to(DEVICE)
    b = torch.randint(-127, 128, (n, k + 3), generator=generator, dtype=torch.int8).to(DEVICE)[:, :k].T
    wanted = torch.from_numpy(a.cpu().long().numpy() @ b.cpu().long().numpy()).to(DEVICE)
    assert torch.equal(integers.product(a, b).long(), wanted)
    assert torch.equal(integers.product(a, b.contiguous()).long(), wanted)


@pytest.fixture(params=[integers.Factor, integers.ShortFactor])
def kind(request: pytest.FixtureRequest) -> type[integers.Factor] | type[integers.ShortFactor]:
    here = integers.factor_levels() > 0
    if request.param is integers.ShortFactor:
        here = "fbgemm" in torch.backends.quantized.supported_engines and platform.machine() == "x86_64"
    if not here:
        pytest.skip("this processor lays out no such factors")
    return request.param


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 16, 1), (3, 5, 40), (1, 512, 17), (66, 6, 999), (7, 1000, 64)]
)
def test_factors_are_exact_whatever_their_shape(
    shape: tuple[int, int, int], kind: type[integers.Factor] | type[integers.ShortFactor]
) -> None:
    levels = 63 if kind is integers.ShortFactor else integers.factor_levels()
    m, k, n = shape
    generator = torch.Generator().manual_seed(m * n)
    a = torch.randint(-levels, levels + 1, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k + 3), generator=generator, dtype=torch.int8)[:, :k]
    weights = torch.randint(0, 128, (m, k), generator=generator).float()
    factor = kind(b)
    rows = b.long().numpy().T
    found = factor.product(factor.sent(a, levels), levels)
    assert torch.equal(found.long(), torch.from_numpy(a.long().numpy() @ rows))
    assert torch.equal(factor.sum(weights).long(), torch.from_numpy(weights.long().numpy() @ rows))
    start = torch.randint(-1000, 1000, (2 * m, n), generator=generator).float()
    wanted = start.long() + 2 * torch.from_numpy(a.long().numpy() @ rows).repeat_interleave(2, 0)
    to = start.clone()
    for row in (0, 1):  # every other row: what is added to does not lie together
        factor.add(factor.sent(a, levels), levels, 2.0, to[row::2])
    assert torch.equal(to.long(), wanted)
    to = start[::2].clone()
    factor.add(factor.sent(a, levels), levels, 2.0, to)
    assert torch.equal(to.long(), wanted[::2])


@pytest.mark.parametrize("count", [1, 8, 19])
def test_each_its_own(count: int, fast: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    a = torch.randint(-127, 128, (count, 2, 40), generator=generator, dtype=torch.int8).to(DEVICE)
    b = torch.randint(-127, 128, (count, 33, 40), generator=generator, dtype=torch.int8).to(DEVICE)
    wanted = torch.einsum("bmk,bnk->bmn", a.cpu().long(), b.cpu().long())
    assert torch.equal(integers.own_products(a, b).cpu().long(), wanted)
    weights = torch.randint(0, 128, (count, 2, 40), generator=generator).float().to(DEVICE)
    c = torch.randint(-127, 128, (count, 40, 27), generator=generator, dtype=torch.int8).to(DEVICE)
    wanted = torch.einsum("bmk,bkr->bmr", weights.cpu().long(), c.cpu().long())
    assert torch.equal(integers.own_sums(weights, c).cpu().long(), wanted)


def test_products_of_the_largest_bytes(fast: bool) -> None:
    """Where sums of pairs saturate in 16 bits, 64 products of 127 * 127 come to 8,160."""
    worst = torch.full((32, 1024), 127, dtype=torch.int8, device=DEVICE)
    assert (integers.product(worst, worst.T) == 1024 * 127**2).all()


@pytest.fixture
def forgotten() -> Iterator[None]:
    probes = (integers.are_fast, integers.factor_levels, integers.factor_kind, integers.adds_in_place)
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_a_processor_whose_products_saturate_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.full((len(a), b.shape[1]), 8160))
    assert not integers.are_fast()


@pytest.mark.usefixtures("forgotten")
def test_a_torch_without_them_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("_int_mm: not here")

    monkeypatch.setattr(torch, "_int_mm", absent)
    assert not integers.are_fast()


@pytest.mark.usefixtures("forgotten")
def test_products_that_are_right_but_slow_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With AVX2 alone torch._int_mm takes ten times as long as float32."""
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: slowly(a.float() @ b.float()))
    assert not integers.are_fast()


def slowly(found: torch.Tensor) -> torch.Tensor:
    time.sleep(0.2)
    return found


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("wrong", [AttributeError("qlinear_prepack"), RuntimeError("not here"), None])
def test_no_factor_is_laid_out_where_its_products_are_wrong_or_absent(
    wrong: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(self: integers.Factor, a: torch.Tensor, zero: int) -> torch.Tensor:
        if wrong is not None:
            raise wrong
        return torch.full((len(a), 512), 512.0 * 127**2 - 1)

    monkeypatch.setattr(integers.Factor, "_of", off)
    assert integers.factor_levels() == 0


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("wrong", ["absent", "elsewhere", "not added"])
def test_where_products_are_not_added_in_place_they_are_made_first(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not integers.factor_levels():
        pytest.skip("this processor lays out no such factors")

    def other(
        self: integers.Factor, a: torch.Tensor, zero: int, scale: float, to: torch.Tensor
    ) -> torch.Tensor:
        if wrong == "absent":
            raise AttributeError("binary")
        found = scale * self._of(a, zero)
        return to + found if wrong == "elsewhere" else to.copy_(found)

    monkeypatch.setattr(integers.Factor, "_add", other)
    assert not integers.adds_in_place()
    factor, to = integers.Factor(torch.ones(32, 20, dtype=torch.int8)), torch.ones(3, 32)
    factor.add(factor.sent(torch.ones(3, 20, dtype=torch.int8), 127), 127, 2.0, to)
    assert torch.equal(to, torch.full((3, 32), 41.0))


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(("most", "wait", "levels"), [(65_536, 0, 127), (65_536, 0.2, 0), (32_767, 0.2, 63)])
def test_digits_are_as_long_as_their_products_stay_right(
    most: int, wait: float, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN without VNNI adds two products of unsigned and signed bytes in 16 bits, or loops plainly."""

    def packed(rows: torch.Tensor, _: None) -> torch.Tensor:
        return rows

    def linear(a: torch.Tensor, _: float, zero: int, rows: torch.Tensor, *__: object) -> torch.Tensor:
        time.sleep(wait)
        largest = 2 * int(a.max()) * int(rows.max())  # all are alike here
        pairs = a.shape[1] // 2 * min(largest, most)
        return torch.full((len(a), len(rows)), float(pairs - zero * int(rows[0].sum())))

    onednn = SimpleNamespace(qlinear_prepack=packed, qlinear_pointwise=linear)
    monkeypatch.setattr(integers.torch, "ops", SimpleNamespace(onednn=onednn))
    assert integers.factor_levels() == levels


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("levels", "found", "summed", "kind"),
    [
        (63, 512 * 63 * 127, 512 * 127**2, integers.ShortFactor),
        (63, 512 * 63 * 127 - 1, 512 * 127**2, integers.Factor),  # it saturates even of short digits
        (63, 512 * 63 * 127, 512 * 127**2 - 1, integers.Factor),  # or of weights
        (63, AttributeError("no operator linear_prepack"), 0, integers.Factor),
        (127, 512 * 63 * 127, 512 * 127**2, integers.Factor),  # oneDNN need not lay out anew
        (0, 512 * 63 * 127, 512 * 127**2, integers.Factor),
    ],
)
def test_short_factors_are_for_processors_without_vnni_and_a_torch_that_has_them(
    levels: int, found: int | Exception, summed: int, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def multiplied(a: torch.Tensor, scale: float, zero: int, held: torch.Tensor) -> torch.Tensor:
        if isinstance(found, Exception):
            raise found
        return torch.full((len(a), len(held)), float(found if zero else summed))

    fbgemm = SimpleNamespace(
        linear_prepack=lambda rows, bias: rows, linear_with_input_q_dq_qweight_dq_output_fp32=multiplied
    )
    monkeypatch.setattr(integers.torch, "ops", SimpleNamespace(quantized=fbgemm))
    monkeypatch.setattr(integers, "factor_levels", functools.cache(lambda: levels))
    assert integers.factor_kind() is kind


@pytest.mark.parametrize("levels", [127, 63])
def test_two_digits_hold_a_row_to_half_a_unit(levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 300, generator=generator) * torch.logspace(-8, 8, 50)[:, None]
    values = values.to(DEVICE)
    values[3] = 0
    values[4, 1:] = 0
    digits, unit = integers.two_digits(values, levels)
    high, low = digits.double().chunk(2)
    assert digits.abs().max() <= levels
    held = unit.double()[:, None] * (2 * levels * high + low)
    assert ((held - values.double()).abs() <= 0.503 * unit.double()[:, None]).all()
    largest = values.abs().amax(1)
    assert torch.equal(unit, integers.unit_of(values, levels=levels))
    assert (unit * 2 * levels**2 >= largest * 0.9999)[values.abs().amax(1) > 0].all()
    assert (unit * 2 * levels**2 <= largest * 1.0001)[values.abs().amax(1) > 0].all()
