"""The measures against published values, closed forms and paper-and-pencil cases."""

import math

import pytest
import torch
from stores import store_of

from nnflow.errors import InputError
from nnflow.index import NeighbourIndex
from nnflow.metrics import (
    count_distances,
    count_memorised,
    histogram_edges,
    memorised_fraction,
    pair_errors,
    summarise,
    wilson_interval,
)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----- the interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("trials", [1, 7, 64])
def test_wilson_interval_solves_the_score_equation(trials):
    """Its ends are where the fraction lies z standard errors away, the error taken at the end."""
    for successes in range(trials + 1):
        fraction = successes / trials
        for end in wilson_interval(successes, trials):
            if 0 < end < 1:
                z = abs(fraction - end) / math.sqrt(end * (1 - end) / trials)
                assert z == pytest.approx(1.959964)


def test_wilson_interval_holds_the_fraction_and_mirrors():
    for trials in (1, 3, 1000):
        for successes in {0, 1, trials // 2, trials}:
            low, high = wilson_interval(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1
            other = wilson_interval(trials - successes, trials)
            assert (1 - high, 1 - low) == pytest.approx(other)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_of_nonsense_is_refused(successes, trials):
    with pytest.raises(InputError, match=f"{successes} of {trials}"):
        wilson_interval(successes, trials)


# ----- memorised, from distances


def test_memorised_by_hand():
    distances = torch.tensor(
        [
            [0.0, 0.0],  # a copy of an image stored twice
            [0.0, 5.0],  # a copy
            [1.0, 3.0],  # just at a third
            [1.001, 3.0],  # just above
            [2.0, 2.0],  # between two images
        ]
    )
    found = count_memorised(distances)
    assert (found.memorised, found.images, found.ratio) == (3, 5, 1 / 3)
    assert found.fraction == 3 / 5
    assert (found.low, found.high) == wilson_interval(3, 5)


def test_the_threshold_is_kept_and_used():
    distances = torch.tensor([[1.0, 3.0], [1.0, 2.5], [1.0, 1.9]])
    assert [count_memorised(distances, ratio=r).memorised for r in (0.3, 0.35, 0.45, 0.6)] == [
        0,
        1,
        2,
        3,
    ]
    assert count_memorised(distances, ratio=0.6).ratio == 0.6


@pytest.mark.parametrize(
    ("distances", "said"),
    [
        (torch.zeros(0, 2), "no images"),
        (torch.zeros(3), r"\(S, 2\)"),
        (torch.zeros(2, 3), r"\(S, 2\)"),
        (torch.tensor([[0.0, 1.0], [2.0, 1.0]]), "row 1 are 2, 1"),
        (torch.tensor([[0.0, math.nan]]), "row 0"),
        (torch.tensor([[0.0, math.inf]]), "row 0"),
        (torch.tensor([[-1.0, 2.0]]), "row 0"),
    ],
)
def test_wrong_distances_are_refused(distances, said):
    with pytest.raises(InputError, match=said):
        count_memorised(distances)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -1.0, math.nan])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(InputError, match="ratio"):
        count_memorised(torch.ones(1, 2), ratio=ratio)


# ----- memorised, from images


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    pixels = torch.randint(256, (12, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    pixels[7] = pixels[2]  # one image stored twice
    store = store_of(pixels, folder)
    return NeighbourIndex.build(store, folder / "out", rank="pixels")


def test_copies_count_and_midpoints_do_not(index):
    images = index.store.images(torch.arange(12))
    assert memorised_fraction(images, index).memorised == 12
    midpoints = (images[:6] + images[[8, 9, 10, 11, 0, 1]]) / 2
    assert memorised_fraction(midpoints, index).memorised == 0
    mixed = torch.cat([midpoints[:3], images[:1]])
    found = memorised_fraction(mixed, index)
    assert (found.fraction, found.images) == (0.25, 4)


def test_mirrored_copies_count_where_mirror_images_do(index):
    images = index.store.images(torch.tensor([0, 1, 3, 4])).flip(-1)
    assert memorised_fraction(images, index).memorised == 0
    assert memorised_fraction(images, index, flip=True).memorised == 4
    midpoints = (images + images.roll(1, 0)) / 2
    assert memorised_fraction(midpoints, index, flip=True).memorised == 0


def test_memorised_follows_the_threshold_along_a_line(index):
    """From image 0 towards its nearest, d1 / d2 = s / (1 - s), which is 1/3 at s = 1/4."""
    images = index.store.images(torch.arange(12))
    others = (images - images[0]).flatten(1).norm(dim=1)
    nearest = int(others[1:].argmin()) + 1
    steps = torch.tensor([0.2, 0.24, 0.26, 0.3])[:, None, None, None]
    samples = (1 - steps) * images[0] + steps * images[nearest]
    found = [memorised_fraction(sample[None], index).memorised for sample in samples]
    assert found == [1, 1, 0, 0]


def test_no_samples_are_refused(index):
    with pytest.raises(InputError, match="no samples"):
        memorised_fraction(torch.zeros(0, 3, 4, 4), index)


def test_samples_of_another_shape_are_refused(index):
    with pytest.raises(InputError, match=r"\(2, 3, 4, 5\)"):
        memorised_fraction(torch.zeros(2, 3, 4, 5), index)


def test_one_stored_image_has_no_second_neighbour(tmp_path):
    store = store_of(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), tmp_path)
    alone = NeighbourIndex.build(store, tmp_path / "out", rank="pixels")
    with pytest.raises(InputError, match="1 image stored"):
        memorised_fraction(torch.zeros(2, 1, 4, 4), alone)


# ----- histogram


def test_histogram_by_hand():
    edges = (0.0, 1.0, 2.0, 3.0)
    counted = count_distances(torch.tensor([0.0, 0.99, 1.0, 2.5, 3.0, 3.0]), edges)
    assert counted.counts == (2, 1, 3)  # closed at the left, the last bin at both ends
    assert counted.edges == edges


def test_histograms_share_edges_and_lose_nothing():
    one, other = noise(500).abs(), 3 * noise(70, seed=1).abs()
    edges = histogram_edges([one, other])
    assert len(edges) == 41
    assert (edges[0], edges[-1]) == (0.0, float(max(one.max(), other.max())))
    widths = torch.tensor(edges, dtype=torch.float64).diff()
    torch.testing.assert_close(widths, widths.mean().expand(40))
    for values in (one, other):
        counts = count_distances(values, edges).counts
        assert sum(counts) == len(values)
        for i in (0, 7, 20):
            inside = (values.double() >= edges[i]) & (values.double() < edges[i + 1])
            assert counts[i] == int(inside.sum())


def test_histogram_of_copies_only():
    edges = histogram_edges([torch.zeros(9)])
    assert count_distances(torch.zeros(9), edges).counts == (9,) + (0,) * 39


@pytest.mark.parametrize("value", [-0.1, 3.1, math.nan])
def test_a_distance_outside_the_edges_is_not_lost_silently(value):
    with pytest.raises(InputError, match="outside"):
        count_distances(torch.tensor([1.0, value]), (0.0, 1.0, 3.0))


# ----- errors of a velocity


def test_errors_by_hand():
    """u* = (3, 0, 0, 4) and v = u* + (0, 2, 0, 0): 2 of 5 apart, at an angle of atan(2/5)."""
    reference = torch.tensor([3.0, 0.0, 0.0, 4.0]).reshape(1, 1, 2, 2)
    velocity = reference + torch.tensor([0.0, 2.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
    errors = pair_errors(velocity, reference)
    assert errors.squared.item() == pytest.approx(1.0)
    assert errors.relative.item() == pytest.approx(0.4)
    assert errors.cosine.item() == pytest.approx(math.cos(math.atan2(2, 5)))


def test_cosine_knows_direction_not_size():
    reference = noise(6, 3, 4, 4)
    for scale, cosine, relative in ((7.0, 1.0, 6.0), (-0.5, -1.0, 1.5)):
        errors = pair_errors(scale * reference, reference)
        torch.testing.assert_close(errors.cosine, torch.full((6,), cosine).double())
        torch.testing.assert_close(errors.relative, torch.full((6,), relative).double())


def test_a_small_angle_is_not_lost():
    """1 - cos(1e-4) = 5e-9, which float32 cannot tell from 0."""
    reference = torch.tensor([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
    velocity = torch.tensor([1.0, 1e-4, 0.0, 0.0]).reshape(1, 1, 2, 2)
    assert 1 - pair_errors(velocity, reference).cosine.item() == pytest.approx(5e-9, rel=1e-3)


def test_a_zero_reference_stays_finite():
    zero, some = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    both, wrong = pair_errors(zero, zero), pair_errors(some, zero)
    assert (both.relative.item(), both.cosine.item()) == (0, 0)
    assert math.isfinite(wrong.relative.item())
    assert wrong.relative.item() > 1e30


def test_summary_orders_times_and_percentiles():
    """Pair i is wrong by i times u*: relative errors 0, 1 ... 10, median 5, 90th percentile 9."""
    reference = torch.ones(11, 1, 1, 4)
    scaled = reference * (1 + torch.arange(11.0))[:, None, None, None]
    found = summarise([0.1, 0.7], [pair_errors(scaled, reference), pair_errors(reference, reference)])
    assert found.times == (0.1, 0.7)
    assert found.relative_p50 == pytest.approx((5.0, 0.0))
    assert found.relative_p90 == pytest.approx((9.0, 0.0))
    assert found.mean_squared == pytest.approx((35.0, 0.0))  # mean of squares of 0 ... 10
    assert found.cosine == pytest.approx((1.0, 1.0))
    assert found.pairs == 11
