"""Solvers by their order and by closed forms; empirical samples by where they land."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import all_images, pixels_of
from stores import store_of
from torch import Tensor

from nnflow.errors import InputError
from nnflow.index import NeighbourIndex
from nnflow.sampling import METHODS, noise_of, sample
from nnflow.store import ImageStore, to_uint8
from nnflow.velocity import EmpiricalVelocity, Estimate, HybridVelocity, Velocity


class Known(Velocity):
    """dx/dt = -c x + sin(3 t): no method is exact on it, and its solution is known."""

    shape = (1, 2, 2)
    rate = 1.5

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Tensor:
        assert float(t) < 1
        return -self.rate * x + math.sin(3 * float(t))

    def solution(self, x: Tensor) -> Tensor:
        c, w = self.rate, 3.0
        steady = (c * math.sin(w) - w * math.cos(w)) / (c * c + w * w)
        return steady + (x + w / (c * c + w * w)) * math.exp(-c)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return store_of(pixels_of(), tmp_path)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
def test_error_shrinks_with_the_order_of_the_method(method: str, order: int) -> None:
    """Over [0, 1/2]: the step to t = 1 is Euler's whatever the method, and would hide the order."""
    field = Known()
    switched = HybridVelocity(field, _Still(), 0.5)
    noise = noise_of(range(4), field.shape).double()
    c, w = field.rate, 3.0
    steady = (c * math.sin(w / 2) - w * math.cos(w / 2)) / (c * c + w * w)
    wanted = steady + (noise + w / (c * c + w * w)) * math.exp(-c / 2)
    errors = [
        (sample(switched, noise, steps=steps, method=method) - wanted).abs().max().item()
        for steps in (8, 16, 32)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


class _Still(Known):
    def __call__(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun"])
def test_adaptive_methods_keep_their_tolerance(method: str) -> None:
    field = Known()
    noise = noise_of(range(3), field.shape)
    found = sample(field, noise, method=method, rtol=1e-5, atol=1e-5)
    # the last thousandth of the time is one Euler step: about (1e-3)^2
    torch.testing.assert_close(found, field.solution(noise), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_empirical_samples_are_training_images(store: ImageStore, method: str) -> None:
    field = EmpiricalVelocity.exact(store, device="cpu")
    found = sample(field, range(12), steps=20, method=method)
    known = {image.numpy().tobytes() for image in store.pixels}
    landed = [image.flatten().numpy().tobytes() for image in to_uint8(found)]
    assert set(landed) <= known
    assert len(set(landed)) > 3
    again = store.images(torch.tensor([_row(store, image) for image in to_uint8(found)]))
    torch.testing.assert_close(found, again, rtol=0, atol=1e-5)


def _row(store: ImageStore, image: Tensor) -> int:
    return int((store.pixels == image.flatten()).all(1).nonzero()[0, 0])


def test_one_image_is_reached_in_one_step(tmp_path: Path) -> None:
    """With one image the mean is frozen for good: Euler's single step is exact."""
    single = store_of(pixels_of(1), tmp_path)
    found = sample(EmpiricalVelocity.exact(single, device="cpu"), range(3), steps=1)
    torch.testing.assert_close(found, single.images(torch.zeros(3, dtype=torch.int64)), rtol=0, atol=0)


def test_a_coarse_last_step_still_ends_on_images(store: ImageStore) -> None:
    """At t = 1/2 the mean mixes images; what is left is halved until it does not."""
    found = sample(EmpiricalVelocity.exact(store, device="cpu"), range(12), steps=2)
    assert {i.flatten().numpy().tobytes() for i in to_uint8(found)} <= {
        p.numpy().tobytes() for p in store.pixels
    }


def test_copies_do_not_keep_the_last_step_from_ending(tmp_path: Path) -> None:
    twice = store_of(pixels_of(3).repeat(2, 1, 1, 1), tmp_path)
    found = sample(EmpiricalVelocity.exact(twice, device="cpu"), range(6), steps=10)
    assert {i.flatten().numpy().tobytes() for i in to_uint8(found)} <= {
        p.numpy().tobytes() for p in twice.pixels
    }


@pytest.mark.parametrize("method", ["euler", "heun", "rk4", "dopri5"])
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(store: ImageStore, method: str) -> None:
    index = NeighbourIndex.build(store, store.folder, rank=5)
    field = EmpiricalVelocity.nearest(index, k=8, device="cpu")
    together = sample(field, [5, 6, 7, 8], steps=10, method=method)
    apart = torch.cat([sample(field, [seed], steps=10, method=method) for seed in (8, 7, 6, 5)])
    torch.testing.assert_close(together, apart.flip(0), rtol=0, atol=1e-5)
    small = sample(field, [5, 6, 7, 8], steps=10, method=method, batch=3)
    torch.testing.assert_close(together, small, rtol=0, atol=1e-5)


def test_noise_is_standard_normal_and_of_its_seed() -> None:
    noise = noise_of(range(400), (3, 8, 8))
    assert abs(noise.mean()) < 4.5 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4.5 * (2 / noise.numel()) ** 0.5
    assert torch.equal(noise[[17, 3]], noise_of([17, 3], (3, 8, 8)))


def test_hybrid_has_a_step_end_at_tau(store: ImageStore) -> None:
    """tau = .33 between the steps of a grid of four: the first field rules exactly until there."""
    asked: list[tuple[str, float]] = []

    class Spy(Known):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Tensor:
            asked.append((self.name, float(t)))
            return torch.zeros_like(x)

    sample(HybridVelocity(Spy("before"), Spy("after"), 0.33), [0], steps=4)
    assert asked == [("before", 0.0), ("before", 0.25), ("after", 0.33), ("after", 0.5), ("after", 0.75)]
    asked.clear()
    sample(HybridVelocity(Spy("before"), Spy("after"), 0.33), [0], steps=2, method="heun")
    assert [name for name, _ in asked] == ["before", "before", "after", "after", "after"]


@pytest.mark.parametrize("method", ["euler", "midpoint", "dopri5"])
@pytest.mark.parametrize("tau", [0.1 + 0.2, 0.9995])
def test_tau_next_to_a_step_end(method: str, tau: float) -> None:
    """0.1 + 0.2 is 5e-17 above 3 / 10, and torchdiffeq refuses a step of that length."""
    first, second = Known(), _Still()
    noise = noise_of(range(2), first.shape)
    found = sample(HybridVelocity(first, second, tau), noise, steps=10, method=method)
    c, w = first.rate, 3.0
    wave = (c * math.sin(w * tau) - w * math.cos(w * tau)) / (c * c + w * w)
    wanted = wave + (noise + w / (c * c + w * w)) * math.exp(-c * tau)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.3 if method == "euler" else 0.01)


def test_an_adaptive_method_is_not_restarted_at_every_step() -> None:
    calls = []

    class Counted(Known):
        def __call__(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Tensor:
            calls.append(float(t))
            return super().__call__(x, t, label)

    for steps in (1, 200):
        sample(Counted(), [0], steps=steps, method="dopri5")
    assert len(calls) % 2 == 0
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :]


def test_hybrid_ends_are_its_fields(store: ImageStore) -> None:
    field, still = EmpiricalVelocity.exact(store, device="cpu"), Known()
    still.shape = field.shape
    seeds = [1, 2, 3]
    all_before = sample(HybridVelocity(field, still, 1.0), seeds, steps=10)
    torch.testing.assert_close(all_before, sample(field, seeds, steps=10), rtol=0, atol=0)
    none_before = sample(HybridVelocity(field, still, 0.0), seeds, steps=10)
    torch.testing.assert_close(none_before, sample(still, seeds, steps=10), rtol=0, atol=0)


def test_samples_of_a_class(tmp_path: Path) -> None:
    labelled = store_of(pixels_of(), tmp_path, classes=["ant"] * 10 + ["bee"] * 27)
    field = EmpiricalVelocity.exact(labelled, device="cpu")
    found = sample(field, range(6), steps=10, label=torch.tensor([0, 1, 0, 1, 0, 1]))
    rows = torch.tensor([_row(labelled, image) for image in to_uint8(found)])
    assert torch.equal(labelled.labels[rows], torch.tensor([0, 1, 0, 1, 0, 1]))


def test_labels_stay_with_their_samples_when_others_have_finished(tmp_path: Path) -> None:
    """One class of a single image, reached at t = 0; of the others every sample has its own class."""
    names = ["ant"] * 12 + ["bee"] + ["cow"] * 24
    labelled = store_of(pixels_of(), tmp_path, classes=names)
    field = Counted(labelled)
    labels = torch.tensor([1, 0, 1, 2, 1, 2, 0, 1])
    found = sample(field, range(8), steps=20, label=labels)
    assert [count for _, count in field.asked[:2]] == [8, 4]
    for number, label in enumerate(labels.tolist()):
        of_class = labelled.class_rows(label)
        images = all_images(labelled)[of_class]
        row = int(integrated(images, noise_of([number], field.shape), 20))
        wanted = images[row].view(field.shape).float()
        torch.testing.assert_close(found[number], wanted, rtol=0, atol=5e-6)


class Counted(EmpiricalVelocity):
    """The exact field, remembering at what time it was asked how many queries."""

    def __init__(self, store: ImageStore) -> None:
        exact = EmpiricalVelocity.exact(store, device="cpu")
        super().__init__(exact.support, store)
        self.asked: list[tuple[float, int]] = []

    def estimate(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Estimate:
        self.asked.append((float(t), len(x)))
        return super().estimate(x, t, label)

    @property
    def queries(self) -> int:
        return sum(count for _, count in self.asked)


def shares(images: Tensor, x: Tensor, t: float) -> Tensor:
    """Weights of images (n, D) at x (D,), float64, by the squared distances themselves."""
    return (-(x - t * images).square().sum(1) / (2 * (1 - t) ** 2)).softmax(0)


def integrated(images: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Euler in float64 with the sum over all images, then 1 - t halved to 1e-6; returns rows."""
    ends = [step / steps for step in range(steps)]
    while 1 - ends[-1] > 1e-6:
        ends.append((1 + ends[-1]) / 2)
    rows = []
    for x in noise.flatten(1).double():
        for start, stop in itertools.pairwise(ends):
            x = x + (stop - start) / (1 - start) * (shares(images, x, start) @ images - x)
        rows.append(int(shares(images, x, ends[-1]).argmax()))
    return torch.tensor(rows)


@pytest.mark.parametrize("seed", range(20))
def test_collapse_lasts_along_the_straight_path(seed: int) -> None:
    """Far images, one a grey level away in one pixel, any e: a share above 1/2 only grows."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (30, 12), generator=generator).double()
    images[1] = images[0]
    images[1, 3] += 1 if images[1, 3] < 128 else -1
    images = images / 127.5 - 1
    e = torch.randn(12, generator=generator).double() * 3
    times = 1 - torch.logspace(-0.05, -5, 200, dtype=torch.float64)
    own = torch.stack([shares(images, t * images[0] + (1 - t) * e, float(t))[0] for t in times])
    settled = own > 0.5
    assert bool(settled.any())
    assert not bool(settled.all())
    assert bool((own[settled].diff() >= -1e-12).all())


def gap(first: Tensor, other: Tensor, x: Tensor, t: float) -> Tensor:
    """log(weight of first / weight of other) at x, exact enough for images a grey level apart."""
    return t / (1 - t) ** 2 * (first - other).dot(x - t / 2 * (first + other))


@pytest.mark.parametrize("time", [0.2, 0.8, 0.99])
@pytest.mark.parametrize(("share", "lasts"), [(1e-6, True), (1 / 600, True), (1 / 400, False)])
def test_collapse_lasts_along_the_flow(time: float, share: float, lasts: bool) -> None:
    """The worst case of docs/field.md, section 7, where less than 1/510 of the mass may be left.

    One rival is a grey level away, the other in the far corner has all that share, and the mean pulls the
    sample towards both. It leaves the near one behind if its gap grows faster than s' = t / (1-t).
    """
    first = torch.full((12,), -1.0, dtype=torch.float64)
    near, far = first.clone(), -first
    near[3] += 1 / 127.5
    # two equations for e, from x = t first + (1-t) e: the gap to `near` is 14, that to `far` gives the share
    s = time / (1 - time)
    apart = first - torch.stack([near, far])
    gaps = torch.tensor([14.0, math.log(1 / share - 1)], dtype=torch.float64)
    e = torch.linalg.pinv(apart) @ (gaps / s - s * apart.square().sum(1) / 2)
    x = time * first + (1 - time) * e
    torch.testing.assert_close(torch.stack([gap(first, i, x, time) for i in (near, far)]), gaps)
    lead = []
    for start, stop in itertools.pairwise(torch.linspace(s, 1.1 * s, 20, dtype=torch.float64).tolist()):
        t, until = start / (1 + start), stop / (1 + stop)
        ahead = torch.stack([gap(first, i, x, t) for i in (first, near, far)])
        lead.append(float(ahead[1]) / start)
        x = x + (until - t) / (1 - t) * ((-ahead).softmax(0) @ torch.stack([first, near, far]) - x)
    assert all(early < late for early, late in itertools.pairwise(lead)) == lasts


@pytest.fixture
def apart(tmp_path: Path) -> ImageStore:
    """Images of independent bytes, which are told apart by t = 1/2."""
    generator = torch.Generator().manual_seed(0)
    return store_of(torch.randint(0, 256, (37, 3, 4, 4), generator=generator).byte(), tmp_path)


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "rk4", "dopri5", "bosh3"])
def test_finishing_early_ends_where_the_full_integration_does(
    apart: ImageStore, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, full = Counted(apart), Counted(apart)
    found = sample(early, range(6), steps=20, method=method)
    monkeypatch.setattr("nnflow.sampling._COLLAPSED", -1.0)
    torch.testing.assert_close(found, sample(full, range(6), steps=20, method=method), rtol=0, atol=5e-6)
    assert early.queries < 0.85 * full.queries


def test_euler_ends_on_the_images_of_a_loop_by_hand(apart: ImageStore) -> None:
    field, images = Counted(apart), all_images(apart)
    noise = noise_of(range(40), field.shape)
    found = sample(field, noise, steps=20)
    wanted = images[integrated(images, noise, 20)].view_as(noise).float()
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
    counts = [count for _, count in field.asked]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 40
    assert field.queries < 0.7 * 40 * 20


def test_near_duplicates_are_told_apart_before_finishing(tmp_path: Path) -> None:
    """Every image has a twin, a grey level away in one pixel: their mean is one of neither."""
    base = pixels_of(6).clamp(0, 254)
    twins = base.clone()
    twins[:, 1, 2, 3] += 1
    store = store_of(torch.cat([base, twins]), tmp_path)
    images, noise = all_images(store), noise_of(range(60), store.shape[1:])
    rows = integrated(images, noise, 12)
    assert len(rows.unique()) > 8  # of 12: both twins are met
    found = sample(EmpiricalVelocity.exact(store, device="cpu"), noise, steps=12)
    torch.testing.assert_close(found, images[rows].view_as(noise).float(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5"])
def test_a_blurred_mean_is_no_image(store: ImageStore, method: str) -> None:
    """All mass on one image that a far field knows roughly: not yet the end of the way."""

    class Rough(Counted):
        def estimate(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Estimate:
            found = super().estimate(x, t, label)
            if float(t) >= 0.4:
                return found
            mean = found.mean * 0.9
            one = torch.ones_like(found.ess)
            return replace(found, mean=mean, velocity=(mean - x) / (1 - t), ess=one, far_mass=one)

    field = Rough(store)
    found = sample(field, range(6), steps=20, method=method)
    rows = torch.tensor([_row(store, image) for image in to_uint8(found)])
    torch.testing.assert_close(found, store.images(rows), rtol=0, atol=5e-6)
    assert max(t for t, _ in field.asked) >= 0.4


@pytest.mark.parametrize("method", ["euler", "midpoint", "dopri5"])
def test_a_hybrid_finishes_its_first_part_at_tau(
    apart: ImageStore, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second field takes over at tau, at the points to which the full integration leads."""

    class Taken(_Still):
        def __init__(self) -> None:
            self.starts: list[Tensor] = []

        def __call__(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Tensor:
            if abs(float(t) - 0.9) < 1e-6:
                self.starts.append(x)
            return torch.zeros_like(x)

    def run() -> tuple[Tensor, int]:
        before, after = Counted(apart), Taken()
        after.shape = before.shape
        sample(HybridVelocity(before, after, 0.9), range(5), steps=20, method=method)
        return torch.cat(after.starts), before.queries

    early, few = run()
    monkeypatch.setattr("nnflow.sampling._COLLAPSED", -1.0)
    full, many = run()
    assert few < 0.8 * many
    torch.testing.assert_close(early, full, rtol=0, atol=1e-5)


def test_a_hybrid_finishes_its_second_part(apart: ImageStore) -> None:
    """From wherever the first field leads, and not before tau."""
    after = Counted(apart)
    still = _Still()
    still.shape = after.shape
    found = sample(HybridVelocity(still, after, 0.33), range(5), steps=20)
    rows = torch.tensor([_row(apart, image) for image in to_uint8(found)])
    torch.testing.assert_close(found, apart.images(rows), rtol=0, atol=5e-6)
    assert after.asked[0] == (0.33, 5)
    assert after.queries < 0.6 * 5 * 14


def test_bad_arguments_are_named(store: ImageStore) -> None:
    field = EmpiricalVelocity.exact(store, device="cpu")
    with pytest.raises(InputError, match="leapfrog"):
        sample(field, [0], method="leapfrog")
    with pytest.raises(InputError, match="steps = 0"):
        sample(field, [0], steps=0)
    with pytest.raises(InputError, match=r"noise of shape \(2, 1, 4, 4\)"):
        sample(field, torch.zeros(2, 1, 4, 4))
