"""Every target has the mean it promises."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import all_images, oracle, pixels_of
from stores import store_of
from torch import Tensor

from nnflow.errors import InputError
from nnflow.index import NeighbourIndex
from nnflow.pairs import Pairs, transported
from nnflow.settling import settling_times
from nnflow.store import ImageStore
from nnflow.targets import TARGETS, EmpiricalFlowMatcher, MinibatchTarget, make_matcher
from nnflow.velocity import EmpiricalVelocity, Estimate

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


def half_settled(store: ImageStore) -> Tensor:
    """Every other image has settled by t = .25, the rest never does."""
    return torch.where(torch.arange(len(store)) % 2 == 0, 0.25, 1.0)


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
@pytest.mark.parametrize("name", ["cfm", "efm-m", "efm-unbiased", "efm-unbiased, settling"])
def test_mean_given_x_is_the_exact_velocity(store: ImageStore, name: str, flip: bool) -> None:
    """Over 1e5 draws at one x_t, the mean lies within 4.5 standard errors of u* in every direction.

    Whatever the settling times: those here are wrong, and x_t lies among images that share the mass.
    """
    t, draws = 0.3, 100_000
    generator = torch.Generator().manual_seed(2)
    x = t * store.images(torch.tensor([3]))[0] + (1 - t) * torch.randn(3, 4, 4, generator=generator)
    images = all_images(store)
    if flip:
        images = torch.cat([images, images.view(-1, *x.shape).flip(-1).flatten(1)])
    wanted = oracle(images, x[None], torch.tensor([t]))[0].flatten()
    assert posterior(images, x, t).max() < 0.9, "one image has all the mass: nothing to prove"
    name, _, settles = name.partition(", ")
    matcher = make_matcher(
        name,
        store,
        field=bad_nearest(store, flip=flip),
        settling=half_settled(store) if settles else None,
        samples=4,
        flip=flip,
        memory=1 << 24,
    )
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
        assert variance < 0.97 * plain


def test_unbiased_test_would_notice_a_biased_target(store: ImageStore) -> None:
    """The bad index alone, used as `efm`, is far from u*: the test above could have failed."""
    t = 0.3
    generator = torch.Generator().manual_seed(2)
    x = t * store.images(torch.tensor([3]))[0] + (1 - t) * torch.randn(3, 4, 4, generator=generator)
    wanted = oracle(all_images(store), x[None], torch.tensor([t]))[0]
    assert (bad_nearest(store)(x[None], t)[0] - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", ["efm", "efm-unbiased"])
def test_pairs_that_have_settled_are_not_asked_about(
    store: ImageStore, name: str, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get x1 - x0; the field is asked about the others as if there were no more."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(len(store), (40,), generator=generator)
    flipped = torch.rand(40, generator=generator) < 0.5 if flip else None
    labels = store.labels[ids]
    x1 = store.images(ids)
    if flipped is not None:
        x1 = torch.where(flipped[:, None, None, None], x1.flip(-1), x1)
    x0 = torch.randn(x1.shape, generator=generator)
    t = torch.rand(40, generator=generator) * 0.5
    field = exact(store, flip=flip)
    asked = make_matcher(name, store, field=field, flip=flip).sample_location_and_conditional_flow(
        x0, x1, t, ids=ids, labels=labels, flipped=flipped
    )[2]

    seen: list[Tensor] = []
    whole = EmpiricalVelocity.estimate

    def estimate(self: EmpiricalVelocity, x: Tensor, t: Tensor, label: Tensor | None = None) -> Estimate:
        seen.append(t.cpu())
        return whole(self, x, t, label)

    monkeypatch.setattr(EmpiricalVelocity, "estimate", estimate)
    settling = half_settled(store)
    matcher = make_matcher(name, store, field=field, settling=settling, flip=flip)
    found = matcher.sample_location_and_conditional_flow(x0, x1, t, ids=ids, labels=labels, flipped=flipped)[
        2
    ]
    settled = t >= settling[ids]
    assert 5 < settled.sum() < 20
    assert torch.equal(found[settled], (x1 - x0)[settled])
    torch.testing.assert_close(found[~settled], asked[~settled], rtol=1e-5, atol=1e-5)
    assert (asked - x1 + x0)[settled].abs().max() > 0.1, "all alike: the test would prove nothing"
    assert torch.equal(torch.cat(seen), t[~settled])

    seen.clear()
    late = torch.full((40,), 0.9)
    ids, x1 = ids // 2 * 2, store.images(ids // 2 * 2)
    found = matcher.sample_location_and_conditional_flow(x0, x1, late, ids=ids)[2]
    assert torch.equal(found, x1 - x0)
    assert not seen


def test_efm_without_ids_asks_about_every_pair(store: ImageStore) -> None:
    x1 = store.images(torch.arange(20))
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(4))
    t = torch.full((20,), 0.3)
    plain, settling = (
        make_matcher("efm", store, field=exact(store), settling=times)
        for times in (None, torch.full((20,), 0.1))
    )
    found = settling.sample_location_and_conditional_flow(x0, x1, t)[2]
    assert torch.equal(found, plain.sample_location_and_conditional_flow(x0, x1, t)[2])


def test_near_duplicates_are_asked_about(tmp_path: Path) -> None:
    """With the settling times of the index, targets of twins one bit apart stay those of the field."""
    pixels = pixels_of(20)
    pixels[[4, 9, 11]] = pixels[[3, 8, 11]]
    pixels[4, 0, 0, 0] ^= 1
    pixels[9] = pixels[8].flip(-1)
    pixels[9, 1, 2, 0] ^= 1
    store = store_of(pixels, tmp_path)
    times = settling_times(NeighbourIndex.build(store, store.folder, rank=4))
    ids = torch.tensor([3, 4, 8, 9, 0, 1, 2, 5])
    x1 = store.images(ids)
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(4))
    field = exact(store, flip=True)
    for time in (0.95, 0.99, 0.995):
        t = torch.full((8,), time)
        straight = make_matcher("cfm", store).sample_location_and_conditional_flow(x0, x1, t)[2]
        wanted, found = (
            make_matcher("efm", store, field=field, settling=settling, flip=True)
            .sample_location_and_conditional_flow(x0, x1, t, ids=ids)[2]
            for settling in (None, times)
        )  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert ((wanted - straight).flatten(1).norm(dim=1)[:4] > 0.01).all()
        assert torch.equal(found[4:], straight[4:])


def test_unbiased_target_leaves_a_far_field_out(store: ImageStore) -> None:
    """With it, the mean of what was retrieved would hold the images not retrieved, too."""
    index = NeighbourIndex.build(store, store.folder, rank=2)
    field = EmpiricalVelocity.near_and_far(index, k=3, rank=16, device="cpu")
    ids = torch.arange(20)
    x1 = store.images(ids)
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(4))
    t = torch.full((20,), 0.25)
    _, xt, ut = make_matcher("efm-unbiased", store, field=field).sample_location_and_conditional_flow(
        x0, x1, t, ids=ids
    )
    retrieved = field.without_far().estimate(xt, t).ids
    images = all_images(store)
    asked = 0
    for row in range(20):
        mine = retrieved[row][retrieved[row] >= 0]
        wanted = (x1 - x0)[row].double()
        if row in mine:
            wanted, asked = oracle(images[mine], xt[row : row + 1], t[row : row + 1])[0], asked + 1
        torch.testing.assert_close(ut[row].double(), wanted, rtol=1e-4, atol=1e-4)
    assert 3 < asked < 20


def test_unbiased_target_sums_what_was_retrieved_and_has_not_settled(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row, whatever was retrieved, in chunks of a few rows, with places left empty."""
    generator = torch.Generator().manual_seed(9)
    ids = torch.arange(1, 20, 2)  # those that have not settled
    x1 = store.images(ids)
    x0 = torch.randn(x1.shape, generator=generator)
    t = torch.full((10,), 0.3)
    retrieved = torch.rand(10, 20, generator=generator).argsort(1)[:, :12]
    retrieved[:, ::4] = -1
    whole = EmpiricalVelocity.estimate

    def estimate(self: EmpiricalVelocity, x: Tensor, t: Tensor, label: Tensor | None = None) -> Estimate:
        found = whole(self, x, t, label)
        none = torch.zeros(10, dtype=torch.bool, device=x.device)
        return replace(found, ids=retrieved.to(x.device), whole=none, ess=found.ess + 1)

    monkeypatch.setattr(EmpiricalVelocity, "estimate", estimate)
    memory = 12 * 13 * 48 * 3
    settling = half_settled(store)
    matcher = make_matcher("efm-unbiased", store, field=exact(store), settling=settling, memory=memory)
    _, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1, t, ids=ids)
    asked = 0
    for row, own in enumerate(ids.tolist()):
        mine = retrieved[row][retrieved[row] % 2 == 1]
        mine = mine[mine >= 0]
        wanted = (x1 - x0)[row].double()
        if own in mine:
            wanted, asked = oracle(all_images(store)[mine], xt[row : row + 1], t[row : row + 1])[0], asked + 1
        torch.testing.assert_close(ut[row].double(), wanted, rtol=1e-4, atol=1e-4)
    assert 2 < asked < 10


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
    with pytest.raises(InputError, match="wanted one for each of 20"):
        make_matcher("efm", store, field=exact(store), settling=torch.ones(19))
    with pytest.raises(InputError, match="samples = 0"):
        make_matcher("efm-m", store, samples=0)


def test_otcfm_pairs_within_the_batch_and_leaves_the_images_in_place(store: ImageStore) -> None:
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(len(store), (24,), generator=generator)
    x1, t = store.images(ids), torch.rand(24, generator=generator)
    x0 = torch.randn(x1.shape, generator=generator)
    _, xt, ut = make_matcher("otcfm", store).sample_location_and_conditional_flow(x0, x1, t)
    time = t[:, None, None, None]
    noise = xt - time * ut  # x_t = x0 + t (x1 - x0)
    torch.testing.assert_close(noise + ut, x1, atol=1e-5, rtol=0)
    torch.testing.assert_close(noise, transported(x0, x1), atol=1e-5, rtol=0)
    assert (noise - x0).abs().max() > 1, "the pairs are as they were drawn"


def test_transport_is_refused_where_u_star_is_asked(store: ImageStore) -> None:
    with pytest.raises(InputError, match="EmpiricalTarget: u\\* is the velocity of independent pairs"):
        EmpiricalFlowMatcher(exact(store), transport=True)
