"""Products of bytes against numpy's in int64; numbers as two digits."""

from collections.abc import Iterator

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


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 16, 1), (3, 5, 40), (1, 512, 17), (66, 6, 999), (7, 1000, 64)]
)
def test_factors_are_exact_whatever_their_shape(shape: tuple[int, int, int]) -> None:
    if not integers.factors_are_fast():
        pytest.skip("nothing to lay factors out for")
    m, k, n = shape
    generator = torch.Generator().manual_seed(m * n)
    a = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k + 3), generator=generator, dtype=torch.int8)[:, :k]
    weights = torch.randint(0, 256, (m, k), generator=generator, dtype=torch.uint8)
    factor = integers.Factor(b)
    rows = b.long().numpy().T
    assert torch.equal(factor.product(integers.unsigned(a)).long(), torch.from_numpy(a.long().numpy() @ rows))
    assert torch.equal(factor.sum(weights).long(), torch.from_numpy(weights.long().numpy() @ rows))


@pytest.mark.parametrize("count", [1, 8, 19])
def test_each_its_own(count: int, fast: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    a = torch.randint(-127, 128, (count, 2, 40), generator=generator, dtype=torch.int8).to(DEVICE)
    b = torch.randint(-127, 128, (count, 33, 40), generator=generator, dtype=torch.int8).to(DEVICE)
    wanted = torch.einsum("bmk,bnk->bmn", a.cpu().long(), b.cpu().long())
    assert torch.equal(integers.own_products(a, b).cpu().long(), wanted)
    c = torch.randint(-127, 128, (count, 40, 27), generator=generator, dtype=torch.int8).to(DEVICE)
    wanted = torch.einsum("bmk,bkr->bmr", a.cpu().long(), c.cpu().long())
    assert torch.equal(integers.own_sums(a, c).cpu().long(), wanted)


def test_products_of_the_largest_bytes(fast: bool) -> None:
    """Where sums of pairs saturate in 16 bits, 64 products of 127 * 127 come to 8,160."""
    worst = torch.full((32, 1024), 127, dtype=torch.int8, device=DEVICE)
    assert (integers.product(worst, worst.T) == 1024 * 127**2).all()


@pytest.fixture
def forgotten() -> Iterator[None]:
    for probe in (integers.are_fast, integers.factors_are_fast):
        probe.cache_clear()
    yield
    for probe in (integers.are_fast, integers.factors_are_fast):
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
@pytest.mark.parametrize("wrong", [AttributeError("qlinear_prepack"), RuntimeError("not here"), None])
def test_no_factor_is_laid_out_where_its_products_are_wrong_or_absent(
    wrong: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(self: integers.Factor, a: torch.Tensor) -> torch.Tensor:
        if wrong is not None:
            raise wrong
        return torch.full((len(a), 64), 64.0 * 127**2 - 1)

    assert integers.factors_are_fast() == (
        integers.are_fast() and hasattr(torch.ops.onednn, "qlinear_prepack")
    )
    integers.factors_are_fast.cache_clear()
    monkeypatch.setattr(integers.Factor, "product", off)
    assert not integers.factors_are_fast()


def test_two_digits_hold_a_row_to_half_a_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 300, generator=generator) * torch.logspace(-8, 8, 50)[:, None]
    values = values.to(DEVICE)
    values[3] = 0
    values[4, 1:] = 0
    digits, unit = integers.two_digits(values)
    high, low = digits.double().chunk(2)
    assert digits.abs().max() <= 127
    held = unit.double()[:, None] * (254 * high + low)
    assert ((held - values.double()).abs() <= 0.503 * unit.double()[:, None]).all()
    largest = values.abs().amax(1)
    assert torch.equal(unit, integers.unit_of(values))
    assert (unit * 32_258 >= largest * 0.9999)[values.abs().amax(1) > 0].all()
    assert (unit * 32_258 <= largest * 1.0001)[values.abs().amax(1) > 0].all()
