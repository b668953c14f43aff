"""Precision and recall against a drawing, a slow loop, and sets of copies."""

import pytest
import torch
from refusals import refused

from nnflow.errors import InputError
from nnflow.manifold import _squares, precision_recall


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_on_a_line():
    """k = 1: balls of 0, 1, 3, 6 reach 1, 1, 2, 3; those of 4, 10, 20 reach 6, 6, 10."""
    found = precision_recall(column(4.0, 10.0, 20.0), column(0.0, 1.0, 3.0, 6.0), k=1)
    assert found.precision == pytest.approx(1 / 3)  # 4 lies within 3 +- 2; 10 and 20 within none
    assert found.recall == 1.0  # 0 to 6 lie within 4 +- 6
    edge = precision_recall(column(9.0, 9.5), column(0.0, 1.0, 3.0, 6.0), k=1)
    assert (edge.precision, edge.recall) == (0.5, 0.0)  # the border of 6 +- 3 belongs to the ball
    assert (edge.k, edge.count, edge.reference_count) == (1, 2, 4)


def test_a_slow_loop_agrees():
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(30, 5, generator=generator)
    theirs = 0.7 * torch.randn(24, 5, generator=generator) + 0.8

    def share(points, centres, k):
        hits = 0
        for p in points.double():
            for c in centres.double():
                radius = sorted(float((c - other).norm()) for other in centres.double())[k]
                if float((p - c).norm()) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    found = precision_recall(ours, theirs, k=3)
    assert 0.1 < found.precision < 1
    assert 0.1 < found.recall < 1
    assert found.precision == pytest.approx(share(ours, theirs, 3))
    assert found.recall == pytest.approx(share(theirs, ours, 3))
    low, high = found.precision_interval
    assert low < found.precision < high


def test_copies_lie_inside_even_where_the_reference_repeats_itself():
    """Four copies of each of ten references: every ball has radius 0. Far from the origin, where an
    expansion about it would round to 1e-3.
    """
    points = torch.randn(10, 8, generator=torch.Generator().manual_seed(1)) + 1e5
    reference = points.repeat(4, 1)
    assert precision_recall(points.repeat(2, 1), reference).precision == 1.0
    assert precision_recall(points.repeat(2, 1) + 0.1, reference).precision == 0.0
    whole = precision_recall(points, points)
    assert (whole.precision, whole.recall) == (1.0, 1.0)


def test_copies_are_at_distance_zero():
    """Whatever the product of one block rounds to: in another block it may round otherwise."""
    points = torch.randn(50, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 5
    (squares,) = _squares(points, points, 1 << 20)
    assert squares.diagonal().max() == 0
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(squares, apart, rtol=1e-9, atol=1e-8)


def test_memory_changes_nothing():
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(70, 4, generator=generator), torch.randn(80, 4, generator=generator)
    assert precision_recall(x, y, memory=16 * 80) == precision_recall(x, y)


@pytest.mark.parametrize(
    ("x", "y", "k", "said"),
    [
        (torch.zeros(3, 2), torch.zeros(9, 2), 3, "more images than k"),
        (torch.zeros(9, 2), torch.zeros(9, 2), 0, "k = 0"),
        (torch.zeros(9, 2), torch.zeros(9, 3), 3, "same extractor"),
    ],
)
def test_bad_input_is_told_in_one_line(x, y, k, said):
    with refused(InputError, said):
        precision_recall(x, y, k=k)
