"""Near + far against the mixture it stands for, written out with full covariances in float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import DEVICE, FieldContract, all_images, moved, oracle, pixels_of, queries
from peaks import peak_of
from stores import store_of
from torch import Tensor
from torch.distributions import MultivariateNormal

from nnflow import integers
from nnflow.errors import InputError
from nnflow.farfield import NearAndFar
from nnflow.index import NeighbourIndex
from nnflow.ladder import Ladder
from nnflow.memory import parse_bytes
from nnflow.store import ImageStore
from nnflow.support import Part
from nnflow.velocity import EmpiricalVelocity


class TestNearAndFar(FieldContract):
    """Six images in pixels, the others by the 37 coordinates that 37 images have."""

    def make(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        index = NeighbourIndex.build(store, store.folder, rank=5)
        return EmpiricalVelocity.near_and_far(index, levels=[(40, 6)], flip=flip, device="cpu")

    def complete(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        index = NeighbourIndex.build(store, store.folder, rank=5)
        return EmpiricalVelocity.near_and_far(index, k=len(store), rank=32, flip=flip, device="cpu")


class TestEveryCoordinate(TestNearAndFar):
    """As many coordinates as pixels: nothing is left to estimate."""

    def complete(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        index = NeighbourIndex.build(store, store.folder, rank=5)
        return EmpiricalVelocity.near_and_far(index, k=1, rank=store.pixels.shape[1], flip=flip, device="cpu")


class TestNearAlone(TestNearAndFar):
    """The same six images, and a certificate in the place of a far field."""

    def make(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        return super().make(store, flip=flip).without_far()

    def complete(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        return super().complete(store, flip=flip).without_far()


SIDE = 7
D = 3 * SIDE * SIDE
N = 200
KEPT = 64  # directions kept, of 147: the others share one variance


def smooth(count: int, seed: int = 0) -> Tensor:
    """Images whose variance falls along their principal directions, as that of photos does."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(D, D, generator=generator))
    strength = 250 / torch.arange(1, D + 1) ** 0.9
    pixels = 128 + (torch.randn(count, D, generator=generator) * strength) @ basis.T
    return pixels.round().clamp(0, 255).to(torch.uint8).view(count, 3, SIDE, SIDE)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> NeighbourIndex:
    store = store_of(smooth(N), tmp_path_factory.mktemp("far"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnflow.fitting.PRINCIPAL", KEPT)
        return NeighbourIndex.build(store, store.folder, rank=40)


def field_of(index: NeighbourIndex, levels: list[tuple[int, int]]) -> EmpiricalVelocity:
    return EmpiricalVelocity.near_and_far(index, levels=levels, device="cpu")


def sampled(index: NeighbourIndex, name: str) -> NearAndFar:
    """The sum by a ladder of this name."""
    return NearAndFar(index, index.store.rows(DEVICE), ladder=Ladder.parse(name), budget=1 << 26)


def mixture_velocity(
    index: NeighbourIndex, x: Tensor, t: float, near: Tensor, *others: tuple[int, Tensor, float]
) -> Tensor:
    """u = x/t + (1-t)/t score of the mixture: `near` images as points, others blurred beyond a rank.

    Others are given by that rank, their ids, and how many each stands for.

    The blur of an image outside its first r coordinates is its Gaussian there; each component is written
    out as a MultivariateNormal of D x D covariance. One query.
    """
    images = all_images(index.store)
    embedding = index.embedding
    whole = torch.linalg.qr(torch.cat([embedding.principal.double().T, torch.eye(D).double()], 1))[0]
    whole[:, : len(embedding.principal)] = embedding.principal.double().T
    centre, variances = embedding.mean.double(), embedding.spectrum.double().clone()
    variances[KEPT:] = variances[KEPT:].mean()
    query = x.double().flatten().clone().requires_grad_()
    logs = [MultivariateNormal(t * images[near], (1 - t) ** 2 * torch.eye(D).double()).log_prob(query)]
    held = index.coordinates.values(index.coordinates.rows).double()
    for rank, ids, each in others:
        head, rest = whole[:, :rank], whole[:, rank:]
        means = centre + held[ids, :rank] @ head.T
        covariance = (1 - t) ** 2 * torch.eye(D).double() + t**2 * (rest * variances[rank:]) @ rest.T
        factor = torch.linalg.cholesky(covariance)
        logs.append(MultivariateNormal(t * means, scale_tril=factor).log_prob(query) + math.log(each))
    (score,) = torch.autograd.grad(torch.cat(logs).logsumexp(0), query)
    return (query / t + (1 - t) / t * score).detach()


@pytest.mark.parametrize("time", [0.02, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("levels", [[(32, 5)], [(64, 20)], [(32, 40), (64, 7)], [(32, 1)]])
def test_velocity_is_that_of_the_blurred_mixture(
    index: NeighbourIndex, time: float, levels: list[tuple[int, int]]
) -> None:
    """Which image goes how far is read off the logits in float64; all else is the oracle's own.

    The coordinates are those that bytes hold. Whole numbers for weights add noise to the mean of what is left
    behind, as if each went up or down by the toss of a coin.
    """
    x, t = queries(index.store, time, count=3)
    found = field_of(index, levels).estimate(x, t)
    images, held = all_images(index.store), index.coordinates.values(index.coordinates.rows).double()
    for row in range(len(x)):
        left, others, noise = torch.arange(N), [], 0.0
        for rank, keep in levels:
            head = index.embedding.principal[:rank].double()
            y = (x[row].double().flatten() - time * index.embedding.mean.double()) @ head.T
            inside = (y - time * held[left, :rank]).square().sum(1)
            best = inside.topk(keep, largest=False).indices
            behind = torch.ones(len(left), dtype=torch.bool)
            behind[best] = False
            logits = -inside[behind] / (2 * (1 - time) ** 2)
            units = 127 * (logits - logits.max()).exp()
            noise += held.norm(dim=1).mean() * (units.frac() * (1 - units.frac())).sum().sqrt() / units.sum()
            others.append((rank, left[behind], 1.0))
            left = left[best]
        wanted = mixture_velocity(index, x[row], time, left, *others)
        error = (found.velocity[row].flatten().double() - wanted).norm() / wanted.norm()
        noise *= found.tail_mass[row] / (1 - time) / wanted.norm()
        assert error < 5e-4 + 2 * noise, f"{levels} at {time}: {error:.1e}, of which noise {noise:.1e}"
        assert noise < 4e-3, "allows for anything: proves nothing"
        if time < 0.2:
            plain = oracle(images[left], x[row : row + 1], t[:1]).flatten()
            assert (plain - wanted).norm() / wanted.norm() > 0.02, "no far field to speak of: proves nothing"


def part_of(support: NearAndFar, x: Tensor, t: Tensor, images: slice) -> Part:
    """What a support says of queries, wherever it lives."""
    return moved(support.part(moved(x.flatten(1), DEVICE), moved(t, DEVICE), images), x.device)


@pytest.mark.parametrize("time", [0.02, 0.1, 0.25])
def test_a_sample_stands_for_all(index: NeighbourIndex, time: float) -> None:
    """What comes is the field of the images drawn."""
    drawn = index.coordinates.sample(120).places
    x, t = queries(index.store, time, count=6)
    part = part_of(sampled(index, "64/30 of 120"), x, t, slice(0, N))
    held = index.coordinates.values(index.coordinates.rows).double()
    y = (x.flatten(1).double() - time * index.embedding.mean) @ index.embedding.principal.double().T
    for row in range(len(x)):
        order = (y[row] - time * held[drawn]).square().sum(1).argsort()
        near, far = drawn[order[:30]], drawn[order[30:]]
        wanted = mixture_velocity(index, x[row], time, near, (64, far, 1.0))
        found = (part.weighted.mean[row].double() - x[row].flatten()) / (1 - time)
        assert (found - wanted).norm() / wanted.norm() < 4e-3
        assert set(part.ids[row].tolist()) - {-1} <= set(near.tolist())
    assert set(part.ladders) == {"64/30 of 120"}


def test_each_of_a_sample_is_so_much_heavier(index: NeighbourIndex) -> None:
    """Mass, effective sample size, and what was estimated: all but the images read in pixels themselves."""
    drawn, time = index.coordinates.sample(120).places, 0.06
    x, t = queries(index.store, time, count=20)
    part = part_of(sampled(index, "64/30 of 120"), x, t, slice(0, N))
    images = all_images(index.store)[drawn]
    logits = -(x.flatten(1).double()[:, None] - time * images).square().sum(2) / (2 * (1 - time) ** 2)
    mass, weights = logits.logsumexp(1) + math.log(N / 120), logits.softmax(1)
    torch.testing.assert_close(part.weighted.log_mass, mass, rtol=0, atol=0.05)
    torch.testing.assert_close(part.weighted.ess, N / 120 / weights.square().sum(1), rtol=0.05, atol=0)
    inside = (part.ids[:, :, None] == drawn).double() @ weights[:, :, None]
    share = 1 - inside.sum((1, 2)) / (N / 120)
    torch.testing.assert_close((part.log_far - part.weighted.log_mass).exp(), share, rtol=0.05, atol=1e-3)


def test_a_sample_is_one_image_of_each_stretch(index: NeighbourIndex) -> None:
    places = index.coordinates.sample(50).places
    assert torch.equal(places // 4, torch.arange(50))
    assert len((places % 4).unique()) == 4, "regular steps meet the same classes, or copies, again and again"
    assert torch.equal(index.coordinates.sample(50).coordinates.rows, index.coordinates.rows[places])
    assert index.coordinates.sample(150).places.unique().numel() == 150


@pytest.mark.parametrize("time", [0.02, 0.1, 0.25])
@pytest.mark.parametrize("name", ["32/40 64/7 rest of 120", "64/12 rest of 90"])
def test_a_sample_stands_for_those_left_behind(
    index: NeighbourIndex, name: str, time: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which images the first level passes on is read off; all else is the oracle's own."""
    levels: list[Any] = []
    level = NearAndFar._level

    def noted(self: NearAndFar, *given: Any, **settings: Any) -> Any:
        levels.append(level(self, *given, **settings))
        return levels[-1]

    monkeypatch.setattr(NearAndFar, "_level", noted)
    x, t = queries(index.store, time, count=6)
    part = part_of(sampled(index, name), x, t, slice(0, N))
    ladder, images = Ladder.parse(name), all_images(index.store)
    assert ladder.rest is not None
    drawn = index.coordinates.sample(ladder.rest).places
    held = index.coordinates.values(index.coordinates.rows).double()
    y = (x.flatten(1).double() - time * index.embedding.mean) @ index.embedding.principal.double().T
    for row in range(len(x)):
        first = levels[0].places[row].cpu()
        inside = (y[row] - time * held[first]).square().sum(1)
        near = first[inside.topk(ladder.levels[-1][1], largest=False).indices]
        behind = first[~torch.isin(first, near)]
        standing = drawn[~torch.isin(drawn, first)]
        each = (N - len(first)) / len(standing)
        others = [(64, behind, 1.0)] if len(behind) else []
        wanted = mixture_velocity(index, x[row], time, near, *others, (ladder.levels[0][0], standing, each))
        found = (part.weighted.mean[row].double() - x[row].flatten()) / (1 - time)
        assert (found - wanted).norm() / wanted.norm() < 4e-3
        assert set(part.ids[row].tolist()) - {-1} <= set(near.tolist())
        logits = -(x[row].flatten().double() - time * images).square().sum(1) / (2 * (1 - time) ** 2)
        each_logit = torch.cat([logits[first], logits[standing] + math.log(each)])
        assert part.weighted.log_mass[row].item() == pytest.approx(each_logit.logsumexp(0).item(), abs=0.1)
        square = torch.cat([2 * logits[first], 2 * logits[standing] + math.log(each)]).logsumexp(0)
        ess = (2 * each_logit.logsumexp(0) - square).exp().item()
        assert part.weighted.ess[row].item() == pytest.approx(ess, rel=0.1)
        far = (each_logit.logsumexp(0).exp() - logits[near].logsumexp(0).exp()).log().item()
        assert part.log_far[row].item() == pytest.approx(far, abs=0.2)
    assert set(part.ladders) == {name}
    assert [level.rank for level in levels] == [rank for rank, _ in (*ladder.levels, ladder.levels[0])]
    dropped = sampled(index, name).without_far().ladder
    assert str(dropped) == name.split(" rest")[0] + " alone"


def test_of_a_class_and_of_few_images_all_are_asked(index: NeighbourIndex) -> None:
    x, t = queries(index.store, 0.1, count=5)
    some, every = slice(20, 120), slice(0, N)
    cases = (
        ("64/9 of 90", some),
        ("64/9 of 200", every),
        ("64/9 rest of 90", some),
        ("64/9 rest of 200", every),
    )
    for name, images in cases:
        found, wanted = (part_of(sampled(index, way), x, t, images) for way in (name, "64/9"))
        torch.testing.assert_close(found.weighted.mean, wanted.weighted.mean)
        torch.testing.assert_close(found.log_far, wanted.log_far)
        assert found.ladders == wanted.ladders == ("64/9",) * 5


@pytest.mark.parametrize("time", [0.05, 0.6, 0.9])
def test_the_certificate_knows_of_those_not_drawn(index: NeighbourIndex, time: float) -> None:
    x, t = queries(index.store, time, count=40)
    field = EmpiricalVelocity(sampled(index, "64/30 of 120 alone"), index.store)
    estimate = field.estimate(x, t)
    error = (estimate.velocity - oracle(all_images(index.store), x, t)).flatten(1).norm(dim=1)
    assert (error <= estimate.bound + 1e-5 / (1 - time)).all()
    assert time < 0.5 or error.max() > 1, "nobody's own image was left out: proves nothing"


@pytest.mark.parametrize("time", [0.005, 0.05, 0.15, 0.3, 0.6, 0.95])
def test_near_and_far_is_near_the_truth_where_the_nearest_alone_are_not(
    index: NeighbourIndex, time: float
) -> None:
    x, t = queries(index.store, time, count=40)
    wanted = oracle(all_images(index.store), x, t).flatten(1)
    both, alone = field_of(index, [(64, 30)]), field_of(index, [(64, 30)]).without_far()
    errors = [
        ((f(x, t).flatten(1) - wanted).norm(dim=1) / wanted.norm(dim=1)).median() for f in (both, alone)
    ]
    assert errors[0] < 0.01
    assert time > 0.2 or errors[1] > 5 * errors[0]


def test_masses_and_sample_sizes(index: NeighbourIndex) -> None:
    """The log-mass of the two parts is that of the mixture; what is estimated is said."""
    time = 0.1
    x, t = queries(index.store, time, count=20)
    estimate = field_of(index, [(64, 30)]).estimate(x, t)
    logits = -(x.flatten(1).double()[:, None] - time * all_images(index.store)).square().sum(2)
    weights = (logits / (2 * (1 - time) ** 2)).softmax(1)
    inside = weights.gather(1, estimate.ids.clamp_min(0)).masked_fill(estimate.ids < 0, 0).sum(1)
    torch.testing.assert_close(estimate.tail_mass.double(), 1 - inside, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(estimate.ess.double(), 1 / weights.square().sum(1), rtol=0.05, atol=0)
    assert estimate.bound.isposinf().all()
    assert estimate.error.isnan().all()
    assert set(estimate.ladder) == {"64/30"}
    assert torch.equal(estimate.candidates, (estimate.ids >= 0).sum(1))


def test_candidates_without_weight_are_not_read(index: NeighbourIndex) -> None:
    x, t = queries(index.store, 0.8, count=20)
    estimate = field_of(index, [(64, 30)]).estimate(x, t)
    assert estimate.candidates.median() < 10
    assert estimate.candidates.min() >= 1
    wanted = oracle(all_images(index.store), x, t)
    torch.testing.assert_close(estimate.velocity.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_ladder_between_two_cuts_is_rounded_up(index: NeighbourIndex) -> None:
    x, t = queries(index.store, 0.1)
    assert set(field_of(index, [(33, 9)]).estimate(x, t).ladder) == {"64/9"}
    assert set(field_of(index, [(33, 90), (60, 9)]).estimate(x, t).ladder) == {"64/9"}
    fine = EmpiricalVelocity.near_and_far(index, k=9, device="cpu").estimate(x, t)
    assert set(fine.ladder) == {"exact"}, "512 coordinates of 147 values are all of them"
    assert (fine.error == 0).all()
    assert fine.whole.all()


def test_a_small_budget_changes_nothing(index: NeighbourIndex) -> None:
    x, t = queries(index.store, 0.1, count=33)
    levels = [(32, 40), (64, 9)]
    small = EmpiricalVelocity.near_and_far(index, levels=levels, device="cpu", memory=parse_bytes("96KiB"))
    torch.testing.assert_close(small(x, t), field_of(index, levels)(x, t), rtol=1e-3, atol=2e-3)


@pytest.mark.skipif(DEVICE != "cpu", reason="it is the CPU's memory that is measured")
def test_peak_memory_keeps_the_budget_whatever_n(tmp_path: Path) -> None:
    budget = parse_bytes("24MiB")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6000, 3, 8, 8), generator=generator, dtype=torch.uint8)
    store = store_of(pixels, tmp_path)
    index = NeighbourIndex.build(store, store.folder, rank=40)
    x, t = queries(store, 0.05, count=900)  # unrestricted, the logits alone would take 10.8 MB, a level 81 MB
    levels = [(32, 500), (64, 50)]
    field = EmpiricalVelocity.near_and_far(index, levels=levels, memory=budget, device="cpu")
    field(x[:2], t[:2])
    peak = peak_of(lambda: field(x, t))
    assert 4e6 < peak < budget + 6 * x.nbytes  # the answer and its parts come on top


def test_one_class_sums_its_own_images(tmp_path: Path) -> None:
    names = ["ant"] * 60 + ["bee"] * 140
    store = store_of(smooth(N), tmp_path, classes=names)
    field = field_of(NeighbourIndex.build(store, store.folder, rank=40), [(64, 30)])
    x, t = queries(store, 0.1, count=30)
    estimate = field.estimate(x, t, 1)
    images = all_images(store)[60:]
    wanted = oracle(images, x, t).flatten(1)
    error = (estimate.velocity.flatten(1) - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert error.median() < 0.01
    assert ((estimate.ids >= 60) | (estimate.ids == -1)).all()


@pytest.mark.parametrize("lacking", [["factor_levels"], ["factor_levels", "are_fast"]])
def test_other_products_say_the_same(
    index: NeighbourIndex, lacking: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a torch that lays nothing out does, and a processor without products of bytes."""
    x, t = queries(index.store, 0.1, count=9)
    off = 1e-4 if 0 < integers.factor_levels() < integers.LEVELS else 1e-5  # digits of 7 bits for those of 8
    fast = field_of(index, [(32, 40), (64, 9)])(x, t)
    for name in lacking:
        monkeypatch.setattr(f"nnflow.integers.{name}", lambda: False)
    torch.testing.assert_close(field_of(index, [(32, 40), (64, 9)])(x, t), fast, rtol=1e-5, atol=off)


@pytest.mark.parametrize("levels", [[(64, 30)], [(32, 60), (64, 20)]])
def test_the_certificate_of_what_is_dropped_holds_and_says_something(
    index: NeighbourIndex, levels: list[tuple[int, int]]
) -> None:
    held = []
    for time in (0.05, 0.3, 0.6, 0.8, 0.9, 0.97):
        x, t = queries(index.store, time, count=40)
        estimate = field_of(index, levels).without_far().estimate(x, t)
        wanted = oracle(all_images(index.store), x, t)
        error = (estimate.velocity - wanted).flatten(1).norm(dim=1)
        assert (error <= estimate.bound + 1e-5 / (1 - time)).all()
        held.append((estimate.bound < 0.01 * wanted.flatten(1).norm(dim=1)).double().mean().item())
    assert held[0] == 0
    assert held[-1] > 0.9


def test_the_certificate_allows_for_rounding(tmp_path: Path) -> None:
    """Twins, late, and one of each pair left out: bytes do not say which is the nearer."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 216, (40, 3, 4, 4), generator=generator)
    pixels[1::2] = pixels[::2]
    pixels[1::2, 1, 2, 3] += 4
    store = store_of(pixels.to(torch.uint8), tmp_path)
    index = NeighbourIndex.build(store, store.folder, rank=20)
    field = EmpiricalVelocity.near_and_far(index, k=1, rank=40, device="cpu").without_far()
    time, wrong = 0.99, 0
    x1 = (store.images(torch.arange(0, 40, 2)) + store.images(torch.arange(1, 40, 2))) / 2
    for seed in range(5):
        x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(seed))
        x, t = (1 - time) * x0 + time * x1, torch.full((20,), time)
        estimate = field.estimate(x, t)
        error = (estimate.velocity - oracle(all_images(store), x, t)).flatten(1).norm(dim=1)
        assert (error <= estimate.bound + 1e-4).all()
        wrong += int((error > 0.1).sum())
    assert wrong > 20, "no query lost its nearer twin: the test would prove nothing"


def test_off_every_path_the_order_of_candidates_is_still_found(index: NeighbourIndex) -> None:
    """Logits of many thousands, alike in their leading digits."""
    generator = torch.Generator().manual_seed(4)
    x = 3 * torch.randn(60, *index.store.shape[1:], generator=generator)
    t = torch.full((60,), 0.9)
    found = EmpiricalVelocity.near_and_far(index, k=1, rank=KEPT, device="cpu").estimate(x, t)
    coordinates = (all_images(index.store) - index.embedding.mean) @ index.embedding.principal.double().T
    y = (x.flatten(1) - t[:, None] * index.embedding.mean).double() @ index.embedding.principal.double().T
    nearest = (y[:, None] - 0.9 * coordinates).square().sum(2).argmin(1)
    assert (found.ids[:, 0] == nearest).double().mean() > 0.9


class TestLadder:
    @pytest.mark.parametrize(
        "name",
        [
            "512/100",
            "64/3000 512/100",
            "32/8 alone",
            "512/30 of 65536",
            "32/90 64/3 of 100 alone",
            "64/9 512/3 rest of 70",
        ],
    )
    def test_names_are_read_back(self, name: str) -> None:
        assert str(Ladder.parse(name)) == name

    @pytest.mark.parametrize(
        "levels",
        [[], [(0, 5)], [(64, 0)], [(64, 100), (64, 50)], [(64, 100), (32, 50)], [(64, 100), (128, 200)]],
    )
    def test_what_is_no_ladder(self, levels: list[tuple[int, int]]) -> None:
        with pytest.raises(InputError, match=r"levels .*wanted"):
            Ladder.of(levels)

    def test_what_is_no_name(self) -> None:
        for name in (
            "",
            "512",
            "512/100 only",
            "a/b",
            "512/100\n",
            "512/100 alone of 300",
            "512/30 of",
            "512/9 rest",
        ):
            with pytest.raises(InputError, match="ladder"):
                Ladder.parse(name)

    def test_a_sample_no_larger_than_what_is_passed_on(self) -> None:
        for name in ("512/100 of 100", "512/100 rest of 100"):
            with pytest.raises(InputError, match="sample of 100 images: wanted more than the 100"):
                Ladder.parse(name)

    def test_what_has_a_rest_has_a_far_field_of_all(self) -> None:
        with pytest.raises(InputError, match=r"512/9 rest of 100 alone: wanted a rest in a far field"):
            Ladder.parse("512/9 rest of 100 alone")
        with pytest.raises(InputError, match="no other sample"):
            Ladder(((512, 9),), sample=50, rest=50)

    def test_a_tolerance_beside_a_ladder(self, index: NeighbourIndex) -> None:
        for settings in (
            {"tolerance": 0.01, "k": 5},
            {"levels": [(64, 5)], "rank": 3},
            {"levels": [(64, 5)], "tolerance": 0.1},
        ):
            with pytest.raises(InputError, match="wanted one of"):
                EmpiricalVelocity.near_and_far(index, **settings)  # type: ignore[arg-type]


def test_pixels_keep_their_role_at_an_early_time(tmp_path: Path) -> None:
    """n = K + 1: one image is far; at t = 0 the velocity is the way to the mean of all."""
    store = store_of(pixels_of(7), tmp_path)
    index = NeighbourIndex.build(store, store.folder, rank=3)
    x, t = queries(store, 0.0)
    found = field_of(index, [(5, 6)])(x, t)
    wanted = all_images(store).mean(0).view(1, *x.shape[1:]) - x.double()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=5e-3)


def test_beyond_the_coordinates_that_are_summed_the_far_mean_is_that_of_the_gaussian(
    index: NeighbourIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, t = queries(index.store, 0.2, count=4)
    whole = field_of(index, [(64, 6)]).estimate(x, t)
    monkeypatch.setattr("nnflow.farfield._SUMMED", 16)
    found = field_of(index, [(64, 6)]).estimate(x, t)
    near = torch.cat(
        [
            x[row : row + 1] + 0.8 * oracle(all_images(index.store)[ids], x[row : row + 1], t[:1])
            for row, ids in enumerate(found.ids)
        ]
    )
    embedding, centre = index.embedding, index.embedding.mean

    def coordinates(mean: Tensor) -> Tensor:
        return (mean.flatten(1) - centre).double() @ embedding.principal.double().T

    noise = 0.8**2 + 0.2**2 * embedding.spectrum[:KEPT].double()
    wiener = (
        0.2 * embedding.spectrum[:KEPT].double() / noise * coordinates(x + 0.8 * centre.view(x[:1].shape))
    )
    far = found.tail_mass[:, None].double()
    wanted = (1 - far) * coordinates(near) + far * wiener
    torch.testing.assert_close(coordinates(found.mean)[:, 16:], wanted[:, 16:], rtol=0, atol=2e-4)
    torch.testing.assert_close(
        coordinates(found.mean)[:, :16], coordinates(whole.mean)[:, :16], rtol=0, atol=1e-4
    )
    assert (coordinates(whole.mean)[:, 16:] - wanted[:, 16:]).abs().max() > 5e-3
