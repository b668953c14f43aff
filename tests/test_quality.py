"""Sets of images against each other: equal ones, noised ones, and the null of the right size."""

import dataclasses
import json

import pytest
import torch
from refusals import refused
from stores import store_of

from nnflow.errors import InputError
from nnflow.features import Pixels
from nnflow.frechet import Moments, frechet_distance
from nnflow.quality import compare, feature_set, image_quality

SHAPE = (1, 4, 4)


def pixels(count, seed):
    """Grey levels around 100, every pixel with a variance of its own."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(5, 60, 16).reshape(SHAPE)
    return (100 + spread * torch.randn(count, *SHAPE, generator=generator)).round().clamp(0, 255).byte()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(pixels(120, 0), tmp_path_factory.mktemp("train"), classes=["a"] * 50 + ["b"] * 70)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return store_of(pixels(90, 1), tmp_path_factory.mktemp("held-out"))


def all_of(store):
    return store.images(torch.arange(len(store)))


def test_a_set_against_itself(store):
    one = feature_set(Pixels(SHAPE), store)
    found = compare(one, feature_set(Pixels(SHAPE), all_of(store)))
    assert found.frechet.value < 1e-10
    assert (found.precision_recall.precision, found.precision_recall.recall) == (1.0, 1.0)
    assert found.kernel.value < 0  # two copies of one set are more alike than two sets: the diagonal is out
    assert (found.frechet.count, found.frechet.groups, found.frechet.features) == (120, 10, 16)


def test_noise_is_worse_than_the_null_in_every_figure(store, held_out):
    noised = all_of(held_out)[:60] + 0.5 * torch.randn(60, *SHAPE, generator=torch.Generator().manual_seed(2))
    found = image_quality(Pixels(SHAPE), store, samples=noised, held_out=held_out)
    null = found.null
    for worse in (found.to_training, found.to_held_out):
        assert worse.frechet.value > null.frechet.value + 5 * null.frechet.standard_error
        assert worse.kernel.value > null.kernel.value + 3 * null.kernel.spread
        assert worse.precision_recall.precision < null.precision_recall.precision_interval[0]
    counts = [
        (q.frechet.count, q.frechet.reference_count) for q in (found.to_training, found.to_held_out, null)
    ]
    assert counts == [(60, 120), (60, 90), (60, 120)]
    assert null.precision_recall.count == null.precision_recall.reference_count == 60
    assert found.extractor == {"name": "pixels", "features": 16}


def test_the_moments_are_of_all_images_and_the_kept_a_random_choice(store, monkeypatch):
    monkeypatch.setattr("nnflow.quality.KEPT", 40)
    found = feature_set(Pixels(SHAPE), store, seed=3, memory=2 * 20 * 16 * 7)
    rows = all_of(store).flatten(1)
    wanted = Moments.of(rows)
    torch.testing.assert_close(found.moments.covariance, wanted.covariance, rtol=1e-12, atol=1e-12)
    assert [group.count for group in found.groups] == [12] * 10
    where = torch.cdist(found.kept, rows).argmin(1)
    assert torch.equal(rows[where], found.kept)
    assert len(where.unique()) == 40
    head = where[:12]  # a prefix is as random: stored by class, its first rows would be all of class a
    assert 0 < int((head < 50).sum()) < 12
    other = feature_set(Pixels(SHAPE), store, seed=4)
    assert not torch.equal(other.kept, found.kept)


def test_a_count_draws_that_many_different_images(store):
    found = feature_set(Pixels(SHAPE), store, count=30, seed=5)
    rows = all_of(store).flatten(1)
    where = torch.cdist(found.kept, rows).argmin(1)
    assert len(where.unique()) == found.count == 30
    assert int((where < 50).sum()) not in (0, 30)
    whole = Moments.of(rows[where])
    assert frechet_distance(found.moments, whole).value < 1e-9


def test_seeds_decide_and_memory_does_not(store, held_out):
    def measure(**knobs):
        return dataclasses.asdict(image_quality(Pixels(SHAPE), store, held_out=held_out, **knobs))

    one = measure(seed=1)
    assert json.loads(json.dumps(one, allow_nan=False))["null"]["kernel"]["seed"] == 1
    assert one["to_training"] is None
    assert one == measure(seed=1)
    assert one["null"]["kernel"] != measure(seed=2)["null"]["kernel"]
    small = measure(seed=1, memory=2 * 33 * 20 * 16)
    assert small["null"]["precision_recall"] == one["null"]["precision_recall"]
    assert small["null"]["frechet"]["value"] == pytest.approx(one["null"]["frechet"]["value"], rel=1e-12)


def test_what_cannot_be_compared(store, held_out):
    with refused(InputError, "nothing to compare"):
        image_quality(Pixels(SHAPE), store)
    with refused(InputError, r"samples are \(3, 4, 4\)"):
        image_quality(Pixels(SHAPE), store, samples=torch.zeros(9, 3, 4, 4))
    with refused(InputError, "3 samples: precision and recall need at least 4"):
        image_quality(Pixels(SHAPE), store, samples=torch.zeros(3, *SHAPE))
    with refused(InputError, "91 images wanted of a set of 90"):
        feature_set(Pixels(SHAPE), held_out, count=91)
    one = feature_set(Pixels(SHAPE), held_out)
    with refused(InputError, "one extractor"):
        compare(dataclasses.replace(one, extractor={"name": "other"}), one)
