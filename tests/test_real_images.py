"""The main path on real photographs: NNFLOW_TEST_DATA names the folder that holds cifar10-test.zip."""

import os
from pathlib import Path

import pytest
import torch
from contract import all_images

from nnflow import EmpiricalVelocity, ImageStore, NeighbourIndex, sample
from nnflow.path import interpolate
from nnflow.store import to_uint8

ZIP = Path(os.environ.get("NNFLOW_TEST_DATA", "")) / "cifar10-test.zip"

pytestmark = pytest.mark.skipif(
    not ZIP.is_file(), reason="NNFLOW_TEST_DATA does not name a folder with cifar10-test.zip"
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> NeighbourIndex:
    out = tmp_path_factory.mktemp("cifar")
    return NeighbourIndex.build(ImageStore.build(ZIP, out, size=32), out)


def test_classes_are_slices(index: NeighbourIndex) -> None:
    store = index.store
    assert store.shape == (10_000, 3, 32, 32)
    assert len(store.classes) == 10
    for label in range(10):
        rows = store.class_rows(label)
        assert rows.stop - rows.start == 1000
        assert (store.labels[rows] == label).all()
        assert all(store.paths[i].startswith(store.classes[label] + "/") for i in (rows.start, rows.stop - 1))


@pytest.mark.parametrize("time", [0.005, 0.06, 0.15, 0.3, 0.9, 0.99])
def test_fields_against_float64(index: NeighbourIndex, time: float) -> None:
    """`exact` to 2e-5 of the velocity at every t; `nearest` within its bound, right after the collapse."""
    generator = torch.Generator().manual_seed(0)
    x1 = index.store.images(torch.randint(10_000, (8,), generator=generator))
    xt = interpolate(torch.randn(x1.shape, generator=generator), x1, time)
    x, images = xt.flatten(1).double(), all_images(index.store)
    squares = torch.stack([(query - time * images).square().sum(1) for query in x])
    mean = (-squares / (2 * (1 - time) ** 2)).softmax(1) @ images
    wanted = (mean - x) / (1 - time)
    size = wanted.norm(dim=1)
    exact = EmpiricalVelocity.exact(index.store, device="cpu")(xt, time).flatten(1)
    assert ((exact - wanted).norm(dim=1) <= 2e-5 * size).all()
    near = EmpiricalVelocity.nearest(index, k=100, device="cpu").estimate(xt, time)
    error = (near.velocity.flatten(1) - wanted).norm(dim=1)
    assert (error <= near.bound + 1e-5 * size).all()
    if time >= 0.3:
        assert (error <= 2e-5 * size).all()
    if time >= 0.9:
        assert (near.bound <= 1e-3 * size).all()


def test_samples_are_photographs_of_the_set(index: NeighbourIndex) -> None:
    field = EmpiricalVelocity.exact(index.store, device="cpu")
    found = to_uint8(sample(field, range(6), steps=30)).flatten(1)
    rows = [int((index.store.pixels == image).all(1).nonzero()[0, 0]) for image in found]
    assert len(set(rows)) == 6
