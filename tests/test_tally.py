"""Figures of the estimates behind targets, against sums over all images in float64."""

import math
from pathlib import Path

import pytest
import torch
from contract import all_images, pixels_of
from stores import store_of
from torch import Tensor

from nnflow.batches import Batches
from nnflow.calibrating import calibrate
from nnflow.config import resolve
from nnflow.index import NeighbourIndex
from nnflow.store import ImageStore
from nnflow.tally import Tally, TargetFigures
from nnflow.targets import make_matcher
from nnflow.velocity import EmpiricalVelocity, Estimate

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return store_of(pixels_of(20), tmp_path)


def weights_of(store: ImageStore, x: Tensor, t: Tensor) -> Tensor:
    """Soft-max weights of all images, float64."""
    squares = (x.flatten(1).double()[:, None] - t.double()[:, None, None] * all_images(store)).square().sum(2)
    return (-squares / (2 * (1 - t.double())[:, None] ** 2)).softmax(1)


def queries(store: ImageStore, count: int = 40, latest: float = 0.6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(count, generator=generator) * latest
    x1 = store.images(torch.randint(len(store), (count,), generator=generator))
    time = t[:, None, None, None]
    return time * x1 + (1 - time) * torch.randn(x1.shape, generator=generator), t


def figures(field: EmpiricalVelocity, x: Tensor, t: Tensor, pairs: int) -> TargetFigures:
    """Of one tally over queries in two calls."""
    tally = Tally(CPU, tolerance=0.01)
    tally.add(field.estimate(x[:7], t[:7]))
    tally.add(field.estimate(x[7:], t[7:]))
    found = TargetFigures.of(tally.sums, pairs, tolerance=0.01)
    assert found is not None
    return found


def test_the_exact_field_leaves_nothing_out(store: ImageStore) -> None:
    x, t = queries(store)
    found = figures(EmpiricalVelocity.exact(store, device="cpu"), x, t, 80)
    log_ess = -weights_of(store, x, t).square().sum(1).log()
    assert found.ess == pytest.approx(log_ess.mean().exp().item(), rel=1e-5)
    assert 1.5 < found.ess < 10, "not between one image and all: nothing to prove"
    assert (found.asked, found.tail_mass, found.certified, found.error) == (0.5, 0, 1, 0)


def test_of_neighbours_the_tail_bounds_what_they_miss(store: ImageStore) -> None:
    """In pixels, where the bound is tight enough to certify some queries and not others."""
    x, t = queries(store, latest=0.98)
    index = NeighbourIndex.build(store, store.folder, rank="pixels")
    found = figures(EmpiricalVelocity.nearest(index, k=5, device="cpu"), x, t, 40)
    missed = 1 - weights_of(store, x, t).topk(5).values.sum(1)
    assert missed.mean().item() <= found.tail_mass < 3 * missed.mean().item() + 0.3
    assert 0 < found.certified < 1
    assert found.certified <= (missed < 0.01).double().mean().item()
    assert math.isnan(found.error)
    assert found.asked == 1


def test_what_calibration_measured_is_averaged(store: ImageStore) -> None:
    index = NeighbourIndex.build(store, store.folder, rank=8)
    calibrate(index, queries=2, seconds=0.1)
    x, t = queries(store)
    field = EmpiricalVelocity.near_and_far(index, tolerance=0.5, device="cpu")
    found = figures(field, x, t, 40)
    assert found.error == pytest.approx(field.estimate(x, t).error.double().mean().item(), rel=1e-6)


def test_a_sum_of_nothing_has_no_figures() -> None:
    assert TargetFigures.of(Tally(CPU, tolerance=0.01).sums, 12, tolerance=0.01) is None


def test_unknown_bounds_certify_nothing_and_unmeasured_errors_do_not_count() -> None:
    """By hand: two of three errors known, one bound of 1 % of a velocity of length 2 or less."""
    tally = Tally(CPU, tolerance=0.01)
    ones = torch.ones(3)
    estimate = Estimate(
        velocity=torch.ones(3, 1, 2, 2),
        mean=torch.zeros(3, 1, 2, 2),
        tail_mass=torch.tensor([0.0, 0.5, 1.0]),
        bound=torch.tensor([0.0199, 0.0201, torch.inf]),
        ess=torch.tensor([1.0, 8.0, 64.0]),
        ids=torch.zeros(3, 1, dtype=torch.int64),
        whole=ones > 2,
        candidates=ones.long(),
        error=torch.tensor([0.002, torch.nan, 0.004]),
        ladder=("index/1",) * 3,
    )
    tally.add(estimate)
    found = TargetFigures.of(tally.sums, 4, tolerance=0.01)
    assert found is not None
    assert (found.asked, found.tail_mass, found.tolerance) == (0.75, 0.5, 0.01)
    assert found.ess == pytest.approx(8, rel=1e-6)
    assert found.certified == pytest.approx(1 / 3)
    assert found.error == pytest.approx(0.003)
    text = str(found)
    for part in ("75 % of the pairs", "8 images matter", "tail mass 0.5", "33 % certified to 1 %", "0.3 %"):
        assert part in text


@pytest.mark.parametrize("name", ["efm", "efm-unbiased"])
def test_settled_pairs_are_not_asked_about(store: ImageStore, name: str) -> None:
    field = EmpiricalVelocity.exact(store, device="cpu")
    settling = torch.full((20,), 0.3)
    matcher = make_matcher(name, store, field=field, settling=settling)
    config = resolve("digits", {"batch": 200})
    batch = Batches(store, matcher, config, size=200, rank=0, device=CPU).make(0)
    assert batch.estimates[0] == (batch.t < 0.3).sum() > 0
    found = TargetFigures.of(batch.estimates, 200, tolerance=0.01)
    early = batch.t < 0.3
    log_ess = -weights_of(store, batch.xt[early], batch.t[early]).square().sum(1).log()
    assert found is not None
    assert found.ess == pytest.approx(log_ess.mean().exp().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["cfm", "efm-m"])
def test_targets_without_a_field_estimate_nothing(store: ImageStore, name: str) -> None:
    matcher = make_matcher(name, store, samples=4)
    config = resolve("digits", {"batch": 4})
    batch = Batches(store, matcher, config, size=4, rank=0, device=CPU).make(0)
    assert not batch.estimates.any()
