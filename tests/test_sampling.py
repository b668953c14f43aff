"""Solvers by their order and by closed forms; empirical samples by where they land."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from contract import pixels_of
from stores import store_of
from torch import Tensor

from nnflow.errors import InputError
from nnflow.index import NeighbourIndex
from nnflow.sampling import METHODS, noise_of, sample
from nnflow.store import ImageStore, to_uint8
from nnflow.velocity import EmpiricalVelocity, HybridVelocity, Velocity


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


def test_bad_arguments_are_named(store: ImageStore) -> None:
    field = EmpiricalVelocity.exact(store, device="cpu")
    with pytest.raises(InputError, match="leapfrog"):
        sample(field, [0], method="leapfrog")
    with pytest.raises(InputError, match="steps = 0"):
        sample(field, [0], steps=0)
    with pytest.raises(InputError, match=r"noise of shape \(2, 1, 4, 4\)"):
        sample(field, torch.zeros(2, 1, 4, 4))
