"""Frechet distances that are known on paper, and the jackknife against what repeated draws do."""

import math

import numpy as np
import pytest
import torch
from refusals import refused

from nnflow.errors import InputError
from nnflow.frechet import Moments, frechet_distance, grouped_moments, merged


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def given(mean, covariance, count=1000):
    """Moments of a known Gaussian."""
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    return Moments(
        count=count,
        mean=torch.as_tensor(mean, dtype=torch.float64),
        scatter=covariance * (count - 1),
    )


def positive(size, seed):
    a = normal(size, size, seed=seed)
    return a @ a.T / size


# ----- closed forms


def test_commuting_covariances_and_a_shift():
    """Diagonal: |m1 - m2|^2 + sum (s1 - s2)^2 of the standard deviations."""
    one = given([0.0, 1.0, -2.0], torch.diag(torch.tensor([4.0, 9.0, 1.0])))
    other = given([3.0, 1.0, 2.0], torch.diag(torch.tensor([1.0, 1.0, 0.0])))
    found = frechet_distance(one, other)
    assert found.mean_part == pytest.approx(9 + 16)
    assert found.covariance_part == pytest.approx(1 + 4 + 1)
    assert found.value == pytest.approx(31)


def test_two_by_two_on_paper():
    """tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)), with M = S1 S2 that do not commute."""
    one, other = [[2.0, 1.0], [1.0, 3.0]], [[1.0, -0.5], [-0.5, 4.0]]
    product_trace = 2 * 1 + 2 * 1 * -0.5 + 3 * 4
    root = math.sqrt(product_trace + 2 * math.sqrt(5 * 3.75))
    found = frechet_distance(given([0, 0], one), given([0, 0], other))
    assert found.value == pytest.approx(5 + 5 - 2 * root, rel=1e-12)


def test_lines_in_space():
    """Covariances a a^T and b b^T of rank 1: tr (S1 S2)^(1/2) = |a . b|."""
    a, b = normal(40, seed=1), normal(40, seed=2)
    found = frechet_distance(given(torch.zeros(40), a.outer(a)), given(torch.zeros(40), b.outer(b)))
    assert found.value == pytest.approx(float(a @ a + b @ b - 2 * (a @ b).abs()), rel=1e-9)


def test_the_matrix_root_of_scipy():
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    one, other = positive(30, 3), positive(30, 4)
    root = linalg.sqrtm((one @ other).numpy()).real
    wanted = float(one.trace() + other.trace()) - 2 * float(np.trace(root))
    found = frechet_distance(given(torch.zeros(30), one), given(torch.zeros(30), other))
    assert found.value == pytest.approx(wanted, rel=1e-9)


def test_fewer_images_than_features():
    """A set is at distance 0 from itself to rounding, though 190 of 200 eigenvalues are none; two sets in
    spaces at right angles are apart by all their variance.
    """
    few = normal(11, 200)
    one = Moments.of(few)
    assert one.factor.shape == (200, 10)
    assert frechet_distance(one, one).value < 1e-12 * float(one.covariance.trace())
    apart = [torch.cat([few, 0 * few], 1), torch.cat([0 * few, few], 1)]
    across = frechet_distance(*map(Moments.of, apart))
    assert across.covariance_part == pytest.approx(2 * float(one.covariance.trace()), rel=1e-12)


def test_a_full_covariance_against_one_of_rank_three():
    """S1 = 4 I: tr (S1 S2)^(1/2) = 2 (3 + 2 + 1), exactly, though 197 of 200 roots are of zeros."""
    turn = torch.linalg.qr(normal(200, 200, seed=8)).Q[:, :3]
    thin = given(torch.zeros(200), turn @ torch.diag(torch.tensor([9.0, 4.0, 1.0]).double()) @ turn.T)
    full = given(torch.zeros(200), 4 * torch.eye(200))
    for found in (frechet_distance(full, thin), frechet_distance(thin, full)):
        assert found.value == pytest.approx(800 + 14 - 2 * 12, rel=1e-11)


def test_turned_shifted_and_stretched():
    turn = torch.linalg.qr(normal(12, 12, seed=5)).Q
    one, other = normal(40, 12, seed=6), normal(50, 12, seed=7) @ torch.diag(torch.arange(12.0).double())
    plain = frechet_distance(Moments.of(one), Moments.of(other))
    moved = frechet_distance(Moments.of(3 * one @ turn + 100), Moments.of(3 * other @ turn + 100))
    assert moved.value == pytest.approx(9 * plain.value, rel=1e-9)
    back = frechet_distance(Moments.of(other), Moments.of(one))
    assert back.value == pytest.approx(plain.value, rel=1e-12)
    assert (plain.count, plain.reference_count, plain.features) == (40, 50, 12)


# ----- moments


def test_moments_are_those_of_numpy_in_any_blocks():
    """Far from the origin: sums of squares would lose 8 of 16 digits."""
    rows = normal(101, 7) + 1e4
    whole = merged(grouped_moments(rows.split([1, 60, 3, 37])))
    np.testing.assert_allclose(whole.mean, rows.mean(0), rtol=1e-15)
    np.testing.assert_allclose(whole.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-9, atol=1e-11)
    assert whole.count == 101


def test_images_are_dealt_out_to_groups_whatever_the_blocks():
    rows = torch.arange(20.0)[:, None].repeat(1, 2)
    for blocks in (rows.split(20), rows.split(3), rows.split([1, 11, 8])):
        groups = grouped_moments(blocks, groups=4)
        assert [g.count for g in groups] == [5] * 4
        assert [float(g.mean[0]) for g in groups] == [8.0, 9.0, 10.0, 11.0]


# ----- bias and spread


def test_the_jackknife_against_repeated_draws():
    """50 draws of 400: their mean above the known distance is the bias, their deviation the error."""
    features, spread = 4, torch.tensor([1.0, 1.5, 0.5, 2.0], dtype=torch.float64)
    reference = given(torch.full((features,), 0.3), torch.eye(features))
    known = features * 0.09 + float((spread - 1).square().sum())
    found = [
        frechet_distance(grouped_moments([normal(400, features, seed=s) * spread], groups=10), reference)
        for s in range(50)
    ]
    values = torch.tensor([f.value for f in found])
    assert float(torch.tensor([f.standard_error for f in found]).mean()) == pytest.approx(
        float(values.std()), rel=0.25
    )
    off = float(torch.tensor([f.value - f.bias for f in found]).mean()) - known
    assert abs(off) < 3 * float(values.std()) / math.sqrt(50)
    # where nothing differs the bias is all there is
    same = [
        frechet_distance(
            grouped_moments([normal(200, features, seed=s)], groups=10), given([0] * 4, torch.eye(4))
        )
        for s in range(50)
    ]
    value = torch.tensor([f.value for f in same]).mean()
    assert float(torch.tensor([f.bias for f in same]).mean()) == pytest.approx(float(value), rel=0.15)


def test_no_groups_no_spread_and_no_rank_no_bias():
    rows, reference = normal(30, 40), given(torch.zeros(40), torch.eye(40))
    alone = frechet_distance(Moments.of(rows), reference)
    assert (alone.standard_error, alone.bias, alone.groups) == (None, None, 1)
    dealt = frechet_distance(grouped_moments([rows], groups=5), reference)
    assert dealt.value == pytest.approx(alone.value, rel=1e-12)
    assert dealt.standard_error > 0
    assert dealt.bias is None


# ----- bad input


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Moments.of(torch.zeros(0, 3)), "no features"),
        (lambda: Moments.of(torch.zeros(2, 5000)), "5000 values.*PCA"),
        (lambda: Moments.of(torch.zeros(1, 3)).covariance, "one image"),
        (lambda: grouped_moments([torch.zeros(3, 2)], groups=4), "3 images in 4 groups"),
        (lambda: grouped_moments([], groups=0), "0 groups"),
        (lambda: frechet_distance(given([0], [[1.0]]), given([0, 0], torch.eye(2))), "same extractor"),
    ],
)
def test_bad_input_is_told_in_one_line(call, said):
    with refused(InputError, said):
        call()
