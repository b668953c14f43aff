"""KID against scikit-learn's kernel, and its expectation of zero."""

import math

import pytest
import torch
from refusals import refused

from nnflow.errors import InputError
from nnflow.mmd import kernel_distance, squared_mmd


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_kernel_of_scikit_learn():
    pairwise = pytest.importorskip("sklearn.metrics.pairwise", reason="scikit-learn is not installed")
    x, y = normal(9, 5).numpy(), normal(12, 5, seed=1).numpy() + 0.5

    def k(a, b):
        return pairwise.polynomial_kernel(a, b, degree=3, gamma=1 / 5, coef0=1)

    def within(a):
        kernel = k(a, a)
        return (
            sum(kernel[i, j] for i in range(len(a)) for j in range(len(a)) if i != j) / len(a) / (len(a) - 1)
        )

    wanted = within(x) + within(y) - 2 * k(x, y).mean()
    assert squared_mmd(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(wanted, rel=1e-12)


def test_two_points_each_on_paper():
    """F = 1, k = (xy + 1)^3: x in {0, 1}, y in {0, 2}: 1 + 1 - 2 (1 + 1 + 1 + 27) / 4."""
    found = squared_mmd(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]]))
    assert found == pytest.approx(2 - 2 * 30 / 4)


def test_one_distribution_is_at_distance_zero_however_few_images():
    """The mean of 400 pairs of sets of 5; with the diagonal left in it would be 15 errors away."""
    found = torch.tensor([squared_mmd(normal(5, 3, seed=s), normal(5, 3, seed=1000 + s)) for s in range(400)])
    assert abs(float(found.mean())) < 3 * float(found.std()) / math.sqrt(400)


def test_a_subset_of_everything_is_everything():
    x, y = normal(20, 4), normal(20, 4, seed=1)
    found = kernel_distance(x, y, subsets=3, size=1000)
    assert found.value == pytest.approx(squared_mmd(x, y), rel=1e-9)
    assert found.spread < 1e-9
    assert (found.size, found.count, found.reference_count, found.subsets) == (20, 20, 20, 3)


def test_subsets_average_to_the_whole():
    """Each is unbiased for the pools it is drawn from."""
    x, y = normal(60, 4), normal(80, 4, seed=1) + 0.3
    found = kernel_distance(x, y, subsets=400, size=15, seed=2)
    assert abs(found.value - squared_mmd(x, y)) < 4 * found.spread / math.sqrt(400)
    assert found.spread > 0.1 * abs(found.value)


def test_the_seed_decides():
    x, y = normal(30, 4), normal(30, 4, seed=1)
    one, again, other = (kernel_distance(x, y, subsets=5, size=10, seed=s) for s in (3, 3, 4))
    assert one == again
    assert one.value != other.value


@pytest.mark.parametrize(
    ("x", "y", "subsets", "said"),
    [
        (torch.zeros(1, 2), torch.zeros(5, 2), 3, "two images"),
        (torch.zeros(5, 2), torch.zeros(5, 2), 0, "0 subsets"),
        (torch.zeros(5, 2), torch.zeros(5, 3), 3, "same extractor"),
    ],
)
def test_bad_input_is_told_in_one_line(x, y, subsets, said):
    with refused(InputError, said):
        kernel_distance(x, y, subsets=subsets)
