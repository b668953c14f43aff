"""Optimal pairs, against all permutations and against scipy."""

from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from nnflow.errors import InputError
from nnflow.pairs import cheapest, transported


def total(cost: Tensor, columns: Tensor) -> float:
    assert sorted(columns.tolist()) == list(range(len(cost))), "no permutation"
    return float(cost[torch.arange(len(cost)), columns].sum())


def random_costs(size: int, seed: int, *, ties: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 4, (size, size), generator=generator).double()
    return torch.randn(size, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", range(1, 7))
def test_no_permutation_is_cheaper(size: int, ties: bool) -> None:
    for seed in range(8):
        cost = random_costs(size, seed, ties=ties)
        best = min(total(cost, torch.tensor(p)) for p in permutations(range(size)))
        assert total(cost, cheapest(cost)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("kind", ["normal", "ties", "hard"])
def test_it_is_what_scipy_finds(kind: str) -> None:
    """`hard`: rows agree on which columns are cheap, so that every path is long."""
    for seed in range(4):
        cost = random_costs(60, seed, ties=kind == "ties")
        if kind == "hard":
            cost = torch.outer(torch.arange(60.0), torch.arange(60.0)).double() + 0.1 * cost
        rows, columns = linear_sum_assignment(cost.numpy())
        assert total(cost, cheapest(cost)) == pytest.approx(float(cost[rows, columns].sum()), abs=1e-9)


def test_a_table_that_is_none() -> None:
    assert cheapest(torch.zeros(0, 0)).tolist() == []
    with pytest.raises(InputError, match=r"\(2, 3\): wanted finite numbers in a square"):
        cheapest(torch.zeros(2, 3))
    with pytest.raises(InputError, match="finite"):
        cheapest(torch.full((2, 2), torch.nan))


def test_noise_on_a_line_goes_to_images_in_its_order() -> None:
    """In one dimension the optimal pairs are sorted alike: the closed form, with no costs in it."""
    generator = torch.Generator().manual_seed(3)
    x0, x1 = (torch.randn(50, 1, 1, 1, generator=generator) for _ in range(2))
    moved = transported(x0, x1)
    assert torch.equal(moved.flatten()[x1.flatten().argsort()], x0.flatten().sort().values)


def test_classes_keep_their_noise() -> None:
    generator = torch.Generator().manual_seed(4)
    x0, x1 = (torch.randn(40, 1, 2, 2, generator=generator) for _ in range(2))
    labels = torch.randint(3, (40,), generator=generator)
    moved = transported(x0, x1, labels)
    for label in range(3):
        here = labels == label
        assert torch.equal(moved[here], transported(x0[here], x1[here]))
    apart, together = ((x1 - m).square().sum() for m in (moved, transported(x0, x1)))
    assert together < apart < (x1 - x0).square().sum()
