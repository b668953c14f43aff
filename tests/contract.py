"""What every empirical field passes, however it takes its sum. Subclass and give the two hooks."""

import dataclasses
import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import velocity_from_score
from stores import store_of
from torch import Tensor

from nnflow import velocity
from nnflow.errors import InputError
from nnflow.store import ImageStore
from nnflow.targets import EmpiricalFlowMatcher
from nnflow.velocity import EmpiricalVelocity

# Where fields live, whatever device a test asks for; scripts/check_gpu names a GPU. The tests make their
# queries on the CPU and check the answers there.
DEVICE = os.environ.get("NNFLOW_TEST_DEVICE", "cpu")


def moved(value: Any, device: torch.device | str) -> Any:
    """`value` with all of its tensors on `device`, but for those of the device meta."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: moved(getattr(value, part.name), device) for part in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def asked_there(call: Callable[..., Any]) -> Callable[..., Any]:
    """A method asked with tensors of DEVICE, its answer where its first argument was."""

    @functools.wraps(call)
    def asked(self: Any, x: Tensor, *rest: Any, **named: Any) -> Any:
        there = {name: moved(value, DEVICE) for name, value in named.items()}
        return moved(call(self, moved(x, DEVICE), *moved(rest, DEVICE), **there), x.device)

    return asked


if DEVICE != "cpu":
    velocity._rows = lambda store, device: store.rows(DEVICE)
    EmpiricalVelocity.estimate = asked_there(EmpiricalVelocity.estimate)
    EmpiricalFlowMatcher.sample_location_and_conditional_flow = asked_there(
        EmpiricalFlowMatcher.sample_location_and_conditional_flow
    )

N, CHANNELS, SIDE, B = 37, 3, 4, 11  # distinct, so that a swapped axis cannot pass
D = CHANNELS * SIDE * SIDE
NAMES = ["ant"] * 10 + ["bee"] * 27


def pixels_of(count: int = N, seed: int = 0) -> Tensor:
    """Random images that share a base, so that early times mix many of them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (CHANNELS, SIDE, SIDE)
    base = torch.randint(60, 196, shape, generator=generator)
    noise = torch.randint(-60, 60, (count, *shape), generator=generator)
    return (base + noise).to(torch.uint8)


def queries(store: ImageStore, time: float, seed: int = 1, count: int = B) -> tuple[Tensor, Tensor]:
    """x_t on the straight paths from noise to images of `store`."""
    generator = torch.Generator().manual_seed(seed)
    x1 = store.images(torch.randint(len(store), (count,), generator=generator))
    x0 = torch.randn(x1.shape, generator=generator)
    return (1 - time) * x0 + time * x1, torch.full((count,), time)


def all_images(store: ImageStore) -> Tensor:
    """(n, D) float64."""
    return store.images(torch.arange(len(store))).flatten(1).double()


def oracle(images: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Velocity of `images` at x, in the shape of x."""
    return velocity_from_score(images, x.flatten(1), t).view_as(x)


class FieldContract(ABC):
    """The whole sum, whichever way: `complete` must give it; `make` may leave images out."""

    @abstractmethod
    def make(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        """The field under test, in its usual setting."""

    @abstractmethod
    def complete(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        """The same way of summing, set so that no image is left out."""

    def keep(self, pixels: Tensor, folder: Path, *, classes: list[str] | None = None) -> ImageStore:
        """A store of images p / 127.5 - 1, whatever it keeps them in."""
        return store_of(pixels, folder, classes=classes)

    @pytest.fixture
    def store(self, tmp_path: Path) -> ImageStore:
        return self.keep(pixels_of(), tmp_path, classes=NAMES)

    @pytest.mark.parametrize("time", [0.004, 0.05, 0.3, 0.6, 0.9, 0.99, 0.999])
    def test_velocity_is_that_of_the_score(self, store: ImageStore, time: float) -> None:
        x, t = queries(store, time)
        estimate = self.complete(store).estimate(x, t)
        wanted = oracle(all_images(store), x, t)
        # The oracle cancels x against the score: it loses eps_64 |x| / t, far below float32. The field
        # rounds mean and x to float32 and divides by 1 - t.
        torch.testing.assert_close(
            estimate.velocity.double(), wanted, rtol=2e-5, atol=3e-7 * D**0.5 / (1 - time)
        )
        assert (estimate.tail_mass == 0).all()
        assert (estimate.bound == 0).all()

    def test_start_is_the_way_to_the_mean(self, store: ImageStore) -> None:
        x, t = queries(store, 0.0)
        wanted = all_images(store).mean(0).view(1, *x.shape[1:]) - x.double()
        torch.testing.assert_close(self.complete(store)(x, t).double(), wanted, rtol=0, atol=1e-6)

    def test_two_images_by_hand(self, tmp_path: Path) -> None:
        """x_i = +-1 in one pixel gives m = tanh(t x / (1-t)^2), on paper."""
        pixels = torch.tensor([255, 0], dtype=torch.uint8).view(2, 1, 1, 1)
        field = self.complete(self.keep(pixels, tmp_path))
        x = torch.tensor([0.0, 0.3, -2.0]).view(3, 1, 1, 1)
        wanted = (torch.tanh(0.6 * x / 0.16) - x) / 0.4
        torch.testing.assert_close(field(x, 0.6), wanted, rtol=1e-5, atol=1e-6)

    def test_far_from_every_image_the_nearest_wins(self, store: ImageStore) -> None:
        """Off the data every weight underflows, and the mean is 0/0, unless the softmax is shifted."""
        x, t = torch.full((B, CHANNELS, SIDE, SIDE), 4.0), torch.full((B,), 0.999)
        images = all_images(store)
        nearest = images[(x[:1].flatten(1) - 0.999 * images).square().sum(1).argmin()]
        wanted = (nearest.view_as(x[0]) - x.double()) / (1 - t.double())[:, None, None, None]
        torch.testing.assert_close(self.make(store)(x, t).double(), wanted, rtol=1e-5, atol=1e-3)

    @pytest.mark.parametrize("time", [0.02, 0.1, 0.3, 0.6, 0.9])
    def test_bound_covers_the_error(self, store: ImageStore, time: float) -> None:
        x, t = queries(store, time)
        estimate = self.make(store).estimate(x, t)
        error = (estimate.velocity - oracle(all_images(store), x, t)).flatten(1).norm(dim=1)
        assert (error <= estimate.bound + 1e-5 / (1 - time)).all()

    @pytest.mark.parametrize(("side", "darkest", "time"), [(32, 0, 0.99), (64, 200, 0.997)])
    def test_near_duplicates_are_told_apart(
        self, tmp_path: Path, side: int, darkest: int, time: float
    ) -> None:
        """Two images two grey levels apart in one pixel, late: the expansion in float32 fails here.

        The larger and brighter the images, the more it loses: what is enough at 32 x 32 is not at 64 x 64.
        """
        generator = torch.Generator().manual_seed(3)
        shape = (20, 3, side, side)
        pixels = torch.randint(darkest, 256, shape, generator=generator).to(torch.uint8)
        pixels[7] = pixels[4]
        pixels[7, 1, 5, 6] ^= 2
        store = self.keep(pixels, tmp_path)
        x1 = store.images(torch.full((16,), 4))
        x0 = torch.randn(x1.shape, generator=generator)
        x, t = (1 - time) * x0 + time * x1, torch.full((16,), time)
        x[:, 1, 5, 6] = time * store.images(torch.tensor([4, 7]))[:, 1, 5, 6].mean()  # between the two
        x[8:, 1, 5, 6] += (1 - time) * 0.3 * x0[8:, 1, 5, 6]
        wanted = oracle(all_images(store), x, t)[:, 1, 5, 6]
        gap = (
            store.images(torch.tensor([4]))[0, 1, 5, 6] - store.images(torch.tensor([7]))[0, 1, 5, 6]
        ).abs()
        error = (self.complete(store)(x, t)[:, 1, 5, 6] - wanted).abs()
        # in units of a weight: u differs by gap / (1 - t) from one image to the other
        assert (error * (1 - time) / gap).max() < 5e-3

    def test_a_crowd_of_near_duplicates(self, tmp_path: Path) -> None:
        """64 images, each one bit from the same base in a pixel of its own: more than are weighed first."""
        generator = torch.Generator().manual_seed(4)
        base = torch.randint(0, 256, (3 * 32 * 32,), generator=generator).to(torch.uint8)
        pixels = base.repeat(70, 1)
        for number in range(64):
            pixels[number, 40 * number] ^= 1
        pixels[64:] = torch.randint(0, 256, (6, len(base)), generator=generator)
        store = self.keep(pixels.view(70, 3, 32, 32), tmp_path)
        time = 0.99
        x1 = store.images(torch.arange(8))
        x0 = torch.randn(x1.shape, generator=generator)
        x, t = (1 - time) * x0 + time * x1, torch.full((8,), time)
        estimate = self.complete(store).estimate(x, t)
        squares = (x.flatten(1).double()[:, None] - t.double()[0] * all_images(store)).square().sum(-1)
        ess = 1 / (-squares / (2 * (1 - t.double()[0]) ** 2)).softmax(1).square().sum(1)
        assert ess.min() > 8
        torch.testing.assert_close(estimate.ess.double(), ess, rtol=0.01, atol=0)
        error = (estimate.velocity - oracle(all_images(store), x, t)).flatten(1).norm(dim=1)
        assert error.max() < 2e-3

    def test_order_of_images_is_irrelevant(self, tmp_path: Path) -> None:
        pixels = pixels_of()
        shuffled = pixels[torch.randperm(N, generator=torch.Generator().manual_seed(5))]
        one, other = (self.keep(p, tmp_path / name) for name, p in (("a", pixels), ("b", shuffled)))
        x, t = queries(one, 0.3)
        torch.testing.assert_close(self.complete(one)(x, t), self.complete(other)(x, t), rtol=1e-5, atol=1e-5)

    def test_storing_every_image_twice_changes_nothing(self, tmp_path: Path) -> None:
        pixels = pixels_of()
        one = self.keep(pixels, tmp_path / "a")
        twice = self.keep(pixels.repeat(2, 1, 1, 1), tmp_path / "b")
        x, t = queries(one, 0.3)
        once, double = self.complete(one).estimate(x, t), self.complete(twice).estimate(x, t)
        torch.testing.assert_close(once.velocity, double.velocity, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(2 * once.ess, double.ess, rtol=1e-4, atol=1e-4)

    def test_translation(self, tmp_path: Path) -> None:
        """Images moved by c, queries by t c: velocities move by c."""
        pixels = pixels_of().clamp(60, 195)
        one = self.keep(pixels, tmp_path / "a")
        moved = self.keep(pixels + 51, tmp_path / "b")
        x, t = queries(one, 0.3)
        shift = 51 / 127.5
        there = self.complete(moved)(x + 0.3 * shift, t)
        torch.testing.assert_close(there, self.complete(one)(x, t) + shift, rtol=1e-5, atol=1e-5)

    def test_rotation(self, tmp_path: Path) -> None:
        """A permutation of the pixels is a rotation; so is a change of sign, which grey levels allow."""
        pixels = pixels_of()
        one = self.keep(pixels, tmp_path / "a")
        rotated = self.keep((255 - pixels).rot90(1, (2, 3)), tmp_path / "b")
        x, t = queries(one, 0.4)
        there = self.complete(rotated)(-x.rot90(1, (2, 3)), t)
        wanted = -self.complete(one)(x, t).rot90(1, (2, 3))
        torch.testing.assert_close(there, wanted, rtol=1e-5, atol=1e-5)

    def test_one_class_is_the_field_of_its_images(self, store: ImageStore) -> None:
        x, t = queries(store, 0.25)
        label = torch.arange(B) % 2
        images = all_images(store)
        velocity = self.complete(store)(x, t, label)
        for value, name in enumerate(store.classes):
            chosen = [i for i, other in enumerate(NAMES) if other == name]
            rows = label == value
            wanted = oracle(images[chosen], x[rows], t[rows])
            torch.testing.assert_close(velocity[rows].double(), wanted, rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(self.complete(store)(x, t, 1)[rows], velocity[rows], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("time", [0.02, 0.3, 0.9])
    def test_flip_is_the_field_of_both_orientations(self, store: ImageStore, time: float) -> None:
        x, t = queries(store, time)
        images = all_images(store)
        mirrored = images.view(-1, *x.shape[1:]).flip(-1).flatten(1)
        wanted = oracle(torch.cat([images, mirrored]), x, t)
        estimate = self.complete(store, flip=True).estimate(x, t)
        torch.testing.assert_close(estimate.velocity.double(), wanted, rtol=2e-5, atol=1e-5 / (1 - time))
        error = (self.make(store, flip=True).estimate(x, t).velocity - wanted).flatten(1).norm(dim=1)
        assert (error <= self.make(store, flip=True).estimate(x, t).bound + 1e-5 / (1 - time)).all()

    def test_effective_sample_size(self, store: ImageStore) -> None:
        x, t = queries(store, 0.3)
        images = all_images(store)
        squares = (x.flatten(1).double()[:, None] - 0.3 * images).square().sum(-1)
        weights = (-squares / (2 * 0.7**2)).softmax(1)
        wanted = 1 / weights.square().sum(1)
        assert wanted.max() > 1.5, "every query has one image: the test would prove nothing"
        ess = self.complete(store).estimate(x, t).ess
        torch.testing.assert_close(ess.double(), wanted, rtol=1e-4, atol=1e-4)

    def test_score_and_denoiser_say_the_same(self, store: ImageStore) -> None:
        x, t = queries(store, 0.4)
        field = self.complete(store)
        velocity = oracle(all_images(store), x, t)
        mean = x + 0.6 * velocity
        torch.testing.assert_close(field.score(x, t).double(), (0.4 * mean - x) / 0.36, rtol=1e-5, atol=1e-4)
        sigma = torch.full((B,), 0.6 / 0.4)
        torch.testing.assert_close(field.denoiser(x / 0.4, sigma).double(), mean, rtol=1e-5, atol=1e-5)

    def test_times_may_differ_within_a_batch(self, store: ImageStore) -> None:
        field = self.complete(store)
        one, other = queries(store, 0.1), queries(store, 0.8)
        together = field(torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]]))
        apart = torch.cat([field(*one), field(*other)])
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("label", [None, 1])
    def test_no_queries_have_no_velocities(self, store: ImageStore, label: int | None) -> None:
        none = torch.empty(0, *store.shape[1:])
        for flip in {False, store.codec.of_pixels}:
            estimate = self.make(store, flip=flip).estimate(none, 0.1, label)
            assert estimate.velocity.shape == (0, *store.shape[1:])
            assert estimate.ess.shape == estimate.error.shape == (0,)
            assert estimate.ladder == ()

    def test_the_query_is_left_alone(self, store: ImageStore) -> None:
        x, t = queries(store, 0.3)
        before = x.clone(), t.clone()
        self.make(store, flip=True).estimate(x, t, 0)
        assert torch.equal(x, before[0])
        assert torch.equal(t, before[1])

    @pytest.mark.parametrize("time", [-0.1, 1.0, float("nan"), float("inf")])
    def test_time_outside_the_flow_is_refused(self, store: ImageStore, time: float) -> None:
        x, _ = queries(store, 0.5)
        with pytest.raises(InputError, match=r"\[0, 1\)"):
            self.make(store)(x, torch.full((B,), time))
        with pytest.raises(InputError, match=r"\[0, 1\)"):
            self.make(store)(x, time)

    def test_wrong_queries_are_refused(self, store: ImageStore) -> None:
        x, t = queries(store, 0.5)
        field = self.make(store)
        for wrong, match in [
            (x[:, :2], "shape"),
            (x[0], "shape"),
            (x.double(), "float32"),
            (x.to("meta"), "meta"),
            (x.masked_fill(x > 0, torch.nan), "NaN"),
            (x * 1e20, "overflow"),
        ]:
            with pytest.raises(InputError, match=match):
                field(wrong, t)
        for sigma in (0.0, -1.0, 5e-8, float("inf"), float("nan")):
            with pytest.raises(InputError, match="noise level"):
                field.denoiser(x, sigma)
        with pytest.raises(InputError, match="one for each of 11"):
            field(x, t[:5])
        with pytest.raises(InputError, match="label 2"):
            field(x, t, 2)
        with pytest.raises(InputError, match="one integer"):
            field(x, t, torch.zeros(B))
