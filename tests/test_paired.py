"""Intervals over seeds, against scipy and against how often they hold."""

import pytest
import torch
from scipy import stats

from nnflow.errors import InputError
from nnflow.paired import difference, spread, student_quantile


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 30, 100])
def test_quantiles_are_students(freedom: int, level: float) -> None:
    wanted = stats.t.ppf((1 + level) / 2, freedom)
    assert student_quantile(freedom, level=level) == pytest.approx(wanted, rel=2e-5)


def test_the_paired_interval_is_that_of_scipys_test() -> None:
    ours, theirs = [1.0, 2.5, 2.0, 4.0], [0.5, 2.0, 2.25, 3.0]
    found = difference(ours, theirs)
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)
    assert found.mean == pytest.approx(0.4375)
    assert found.values == (0.5, 0.5, -0.25, 1.0)


def test_it_holds_as_often_as_it_says() -> None:
    """500 experiments of three seeds: 95 % of the intervals hold the truth, within 4.5 errors."""
    draws = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 7
    held = 0
    for row in draws.tolist():
        found = spread(row)
        held += found.low <= 7 <= found.high
    assert abs(held / 500 - 0.95) < 4.5 * (0.95 * 0.05 / 500) ** 0.5


def test_what_has_no_spread_is_said() -> None:
    with pytest.raises(InputError, match="1 seeds: an interval needs"):
        spread([1.0])
    with pytest.raises(InputError, match="finite"):
        spread([1.0, float("nan")])
    with pytest.raises(InputError, match="2 and 3 seeds"):
        difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="0 degrees"):
        student_quantile(0)
    with pytest.raises(InputError, match="level 1"):
        student_quantile(2, level=1.0)
