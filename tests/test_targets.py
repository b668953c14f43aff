"""Every target has the mean it promises."""

from pathlib import Path

import pytest
import torch
from contract import all_images, oracle, pixels_of
from stores import store_of
from torch import Tensor

from nnflow.errors import InputError
from nnflow.index import NeighbourIndex
from nnflow.store import ImageStore
from nnflow.targets import TARGETS, EmpiricalFlowMatcher, MinibatchTarget, Pairs, make_matcher
from nnflow.velocity import EmpiricalVelocity

NAMES = ["ant"] * 6 + ["bee"] * 14


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return store_of(pixels_of(20), tmp_path, classes=NAMES)


def exact(store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
    return EmpiricalVelocity.exact(store, flip=flip, device="cpu")


def bad_nearest(store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
    """Three neighbours in two coordinates: often not the right ones."""
    index = NeighbourIndex.build(store, store.folder, rank=2)
    return EmpiricalVelocity.nearest(index, k=3, flip=flip, device="cpu")


def posterior(images: Tensor, x: Tensor, t: float) -> Tensor:
    """Law of x1's number given x_t = x, float64."""
    squares = (x.flatten().double() - t * images).square().sum(1)
    return (-squares / (2 * (1 - t) ** 2)).softmax(0)


def pairs_through(
    store: ImageStore, x: Tensor, t: float, count: int, *, flip: bool = False, label: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`count` draws of (x0, x1, t, ids, flipped) given x_t = x, from the exact posterior."""
    images = all_images(store)
    if flip:
        images = torch.cat([images, images.view(-1, *x.shape).flip(-1).flatten(1)])
    weights = posterior(images, x, t)
    if label is not None:
        weights[: len(store)] *= store.labels == label
    generator = torch.Generator().manual_seed(11)
    drawn = weights.multinomial(count, replacement=True, generator=generator)
    x1 = images[drawn].view(count, *x.shape).float()
    x0 = (x - t * x1) / (1 - t)
    return x0, x1, torch.full((count,), t), drawn % len(store), drawn >= len(store)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", ["cfm", "efm-m", "efm-unbiased"])
def test_mean_given_x_is_the_exact_velocity(store: ImageStore, name: str, flip: bool) -> None:
    """Over 1e5 draws at one x_t, the mean lies within 4.5 standard errors of u* in every direction."""
    t, draws = 0.3, 100_000
    generator = torch.Generator().manual_seed(2)
    x = t * store.images(torch.tensor([3]))[0] + (1 - t) * torch.randn(3, 4, 4, generator=generator)
    images = all_images(store)
    if flip:
        images = torch.cat([images, images.view(-1, *x.shape).flip(-1).flatten(1)])
    wanted = oracle(images, x[None], torch.tensor([t]))[0].flatten()
    assert posterior(images, x, t).max() < 0.9, "one image has all the mass: nothing to prove"
    matcher = make_matcher(name, store, field=bad_nearest(store, flip=flip), samples=4, flip=flip)
    x0, x1, times, ids, flipped = pairs_through(store, x, t, draws, flip=flip)
    _, xt, ut = matcher.sample_location_and_conditional_flow(
        x0, x1, times, ids=ids, flipped=flipped, generator=generator
    )
    torch.testing.assert_close(xt, x.expand_as(xt), rtol=0, atol=1e-5)
    found = ut.flatten(1).double()
    error = (found.mean(0) - wanted).abs() / (found.std(0) / draws**0.5 + 1e-9)
    assert error.max() < 4.5
    variance = found.var(0).sum()
    plain = (x1 - x0).flatten(1).double().var(0).sum()
    assert variance <= plain * 1.01
    if name != "cfm":
        assert variance < 0.95 * plain


def test_unbiased_test_would_notice_a_biased_target(store: ImageStore) -> None:
    """The bad index alone, used as `efm`, is far from u*: the test above could have failed."""
    t = 0.3
    generator = torch.Generator().manual_seed(2)
    x = t * store.images(torch.tensor([3]))[0] + (1 - t) * torch.randn(3, 4, 4, generator=generator)
    wanted = oracle(all_images(store), x[None], torch.tensor([t]))[0]
    assert (bad_nearest(store)(x[None], t)[0] - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize("time", [0.0, 0.3, 0.9, 0.999])
def test_efm_is_the_exact_velocity(store: ImageStore, time: float) -> None:
    generator = torch.Generator().manual_seed(4)
    x1 = store.images(torch.arange(9))
    x0 = torch.randn(x1.shape, generator=generator)
    matcher = EmpiricalFlowMatcher(exact(store))
    t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1, torch.full((9,), max(time, 1e-3)))
    wanted = oracle(all_images(store), xt, t)
    torch.testing.assert_close(ut.double(), wanted, rtol=1e-4, atol=1e-4 / (1 - time))


def test_close_to_the_data_the_target_does_not_cancel(store: ImageStore) -> None:
    """At 1 - t = 1e-6, (m - x_t) / (1 - t) in float32 is off by a tenth; x1 - x0 is what it should be."""
    x1 = store.images(torch.arange(9))
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(4))
    for name in ("efm", "efm-unbiased", "efm-m"):
        matcher = make_matcher(name, store, field=exact(store))
        t = torch.full((9,), 1 - 1e-6)
        _, _, ut = matcher.sample_location_and_conditional_flow(x0, x1, t, ids=torch.arange(9))
        torch.testing.assert_close(ut, x1 - x0, rtol=0, atol=1e-6)


def test_minibatch_of_all_images_many_times_tends_to_the_exact_velocity(store: ImageStore) -> None:
    generator = torch.Generator().manual_seed(5)
    x1 = store.images(torch.arange(5))
    x0 = torch.randn(x1.shape, generator=generator)
    t = torch.full((5,), 0.2)
    errors = []
    for samples in (10, 100, 10_000):
        matcher = make_matcher("efm-m", store, samples=samples)
        _, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1, t, generator=generator)
        errors.append((ut - oracle(all_images(store), xt, t)).norm().item())
    assert errors[2] < errors[1] / 3 < errors[0] / 3


@pytest.mark.parametrize("flip", [False, True])
def test_minibatch_of_x1_alone_is_cfm(store: ImageStore, flip: bool) -> None:
    x1 = store.images(torch.arange(5))
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(6))
    matcher = make_matcher("efm-m", store, samples=1, flip=flip)
    _, _, ut = matcher.sample_location_and_conditional_flow(x0, x1, torch.full((5,), 0.4))
    torch.testing.assert_close(ut, x1 - x0)


def test_minibatch_chunks_change_nothing(store: ImageStore) -> None:
    x1 = store.images(torch.arange(7))
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(6))
    found = []
    for memory in (1 << 30, 12 * 16 * 48 * 2):
        target = MinibatchTarget(store, samples=16, flip=True, memory=memory)
        generator = torch.Generator().manual_seed(7)
        t = torch.full((7,), 0.2)
        pairs = Pairs(x0=x0, x1=x1, xt=0.8 * x0 + 0.2 * x1, t=t, generator=generator)
        found.append(target(pairs))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_minibatch_stays_within_the_class(store: ImageStore) -> None:
    target = MinibatchTarget(store, samples=500, flip=True)
    x1 = store.images(torch.tensor([0, 19]))
    pairs = Pairs(
        x0=x1, x1=x1, xt=x1, t=torch.zeros(2), labels=torch.tensor([0, 1]),
        generator=torch.Generator().manual_seed(8),
    )  # fmt: skip
    draws = target._draw(pairs)
    assert set((draws[0] % 20).tolist()) == set(range(6))
    assert set((draws[1] % 20).tolist()) == set(range(6, 20))
    assert 400 < (draws >= 20).sum() < 600


def test_class_conditional_target_is_the_field_of_the_class(store: ImageStore) -> None:
    x1 = store.images(torch.arange(6, 12))
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(4))
    matcher = EmpiricalFlowMatcher(exact(store))
    t = torch.full((6,), 0.2)
    labels = torch.ones(6, dtype=torch.int64)
    _, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1, t, labels=labels)
    wanted = oracle(all_images(store)[6:], xt, t)
    torch.testing.assert_close(ut.double(), wanted, rtol=1e-4, atol=1e-4)


def test_times_are_uniform_and_seeded(store: ImageStore) -> None:
    matcher = make_matcher("cfm", store)
    x1 = store.images(torch.zeros(4000, dtype=torch.int64))
    one, other = (
        matcher.sample_location_and_conditional_flow(x1, x1, generator=torch.Generator().manual_seed(9))[0]
        for _ in range(2)
    )
    assert torch.equal(one, other)
    counts = one.histc(10, 0, 1)
    assert (counts - 400).abs().max() < 4.5 * 400**0.5


def test_what_a_target_needs_and_lacks_is_said(store: ImageStore) -> None:
    x = store.images(torch.arange(3))
    t = torch.full((3,), 0.5)
    unbiased = make_matcher("efm-unbiased", store, field=exact(store))
    with pytest.raises(InputError, match="pass ids="):
        unbiased.sample_location_and_conditional_flow(x, x, t)
    with pytest.raises(InputError, match="wanted the same"):
        unbiased.sample_location_and_conditional_flow(x[:2], x, t)
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        unbiased.sample_location_and_conditional_flow(x, x, t + 0.5)
    with pytest.raises(InputError, match=r"\[0, 1\)"):  # 1 in float32
        unbiased.sample_location_and_conditional_flow(x, x, torch.full((3,), 1 - 1e-9, dtype=torch.float64))
    with pytest.raises(InputError, match="flip=True"):
        make_matcher("efm", store, field=exact(store), flip=True)
    with pytest.raises(InputError, match="wanted a field"):
        make_matcher("efm", store)
    with pytest.raises(InputError, match=", ".join(TARGETS)):
        make_matcher("ot", store)
    with pytest.raises(InputError, match="samples = 0"):
        make_matcher("efm-m", store, samples=0)
