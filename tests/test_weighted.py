"""WeightedMean: a commutative monoid whose elements are sums over images."""

import pytest
import torch
from torch import Tensor

from nnflow.weighted import WeightedMean

B, D = 5, 7


def part_of(logits: Tensor, images: Tensor) -> WeightedMean:
    """One part straight from its definition; logits (B, n), images (n, D), float64."""
    top = logits.max(1, keepdim=True).values
    weights = (logits - top).exp()
    mass = weights.sum(1)
    return WeightedMean(
        top[:, 0] + mass.log(),
        2 * top[:, 0] + weights.square().sum(1).log(),
        ((weights / mass[:, None]) @ images).float(),
    )


def same(one: WeightedMean, other: WeightedMean) -> None:
    torch.testing.assert_close(one.log_mass, other.log_mass, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(one.log_square, other.log_square, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-5, atol=1e-6)


def numbers(count: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(B, count, generator=generator, dtype=torch.float64)
    return logits, torch.randn(count, D, generator=generator, dtype=torch.float64)


def empty() -> WeightedMean:
    return WeightedMean.empty(torch.ones(B, D))


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("seed", range(6))
def test_any_split_gives_the_soft_max_of_the_whole(spread: float, seed: int) -> None:
    """Also where every logit is a million away from zero and float32 would see no difference."""
    logits, images = numbers(23, spread, seed)
    logits += (-1) ** seed * 10 * spread
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(23, generator=generator)
    cuts = torch.randint(1, 23, (4,), generator=generator).unique().tolist()
    merged = empty()
    for ids in order.tensor_split(cuts):
        merged = merged.merge(part_of(logits[:, ids], images[ids]))
    weights = logits.softmax(1)
    torch.testing.assert_close(merged.mean, (weights @ images).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.log_mass, logits.logsumexp(1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merged.ess, 1 / weights.square().sum(1), rtol=1e-7, atol=1e-7)


def test_small_differences_of_large_logits_survive() -> None:
    """At t = .99 logits are near 1e6 and their differences decide: float32 would round them to 0.06."""
    one = WeightedMean(torch.full((B,), -1e6).double(), torch.full((B,), -2e6).double(), torch.ones(B, D))
    other = WeightedMean(one.log_mass + 0.01, one.log_square + 0.02, -one.mean)
    wanted = torch.full((B, D), -0.00499995833)  # -tanh(0.01 / 2)
    torch.testing.assert_close(one.merge(other).mean, wanted, rtol=1e-5, atol=0)


def test_merging_is_associative_and_commutative() -> None:
    logits, images = numbers(12, 3.0, 0)
    a, b, c = (part_of(logits[:, i::3], images[i::3]) for i in range(3))
    same(a.merge(b).merge(c), a.merge(b.merge(c)))
    same(a.merge(b), b.merge(a))


def test_empty_is_neutral_on_both_sides_to_the_bit() -> None:
    part = part_of(*numbers(4, 5.0, 1))
    for merged in (part.merge(empty()), empty().merge(part)):
        assert torch.equal(merged.log_mass, part.log_mass)
        assert torch.equal(merged.log_square, part.log_square)
        assert torch.equal(merged.mean, part.mean)


def test_nothing_and_nothing_is_nothing() -> None:
    nothing = empty().merge(empty())
    assert nothing.log_mass.isneginf().all()
    assert nothing.log_square.isneginf().all()
    assert (nothing.mean == 0).all()
    assert nothing.log_mass.dtype == torch.float64


def test_one_query_may_be_empty_where_another_is_not() -> None:
    part, whole = part_of(*numbers(4, 1.0, 2)), part_of(*numbers(6, 1.0, 3))
    holes = torch.tensor([True, False, True, False, False])
    some = WeightedMean(
        part.log_mass.masked_fill(holes, -torch.inf),
        part.log_square.masked_fill(holes, -torch.inf),
        part.mean.masked_fill(holes[:, None], 0.0),
    )
    merged, both = some.merge(whole), part.merge(whole)
    assert torch.equal(merged.mean[holes], whole.mean[holes])
    assert torch.equal(merged.mean[~holes], both.mean[~holes])


def test_effective_sample_size_of_equals_and_of_one() -> None:
    _, images = numbers(9, 1.0, 4)
    torch.testing.assert_close(
        part_of(torch.zeros(B, 9).double(), images).ess, torch.full((B,), 9.0).double()
    )
    lone = torch.full((B, 9), -1e6).double()
    lone[:, 3] = 0
    torch.testing.assert_close(part_of(lone, images).ess, torch.ones(B).double())
