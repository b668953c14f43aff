"""Every field on stores of floats: the contract, and what held because bytes are bytes, by other oracles."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import test_farfield
import test_settling
import test_velocity
import torch
from contract import B, FieldContract, all_images, oracle, queries
from oracles import velocity_from_score
from peaks import peak_of
from refusals import refused
from stores import latents_of, store_of
from torch import Tensor

from nnflow.errors import InputError
from nnflow.evaluation import evaluate
from nnflow.index import NeighbourIndex
from nnflow.nearfield import weigh
from nnflow.sampling import noise_of, sample
from nnflow.scan import nearest_images
from nnflow.settling import settling_times
from nnflow.store import ImageStore
from nnflow.targets import make_matcher
from nnflow.velocity import EmpiricalVelocity

N, SHAPE = 41, (5, 3, 7)  # any number of channels, not square
DTYPES = [torch.float16, torch.float32]


class Floats(FieldContract):
    """The contract's images as floats that are no grey levels, and scaled back."""

    def keep(self, pixels: Tensor, folder: Path, *, classes: list[str] | None = None) -> ImageStore:
        latents = (0.731 * (pixels.double() / 127.5 - 1)).float()
        return latents_of(latents, folder, classes=classes, scaling=1 / 0.731)

    @pytest.mark.parametrize("time", [0.3])
    def test_flip_is_the_field_of_both_orientations(self, store: ImageStore, time: float) -> None:
        with refused(InputError, "a mirrored latent is not the latent of the mirrored image"):
            self.make(store, flip=True)

    def test_the_query_is_left_alone(self, store: ImageStore) -> None:
        x, t = queries(store, 0.3)
        before = x.clone(), t.clone()
        self.make(store).estimate(x, t, 0)
        assert torch.equal(x, before[0])
        assert torch.equal(t, before[1])


class Halves(Floats):
    """In float16, which holds (p - 127.5) / 8 exactly."""

    def keep(self, pixels: Tensor, folder: Path, *, classes: list[str] | None = None) -> ImageStore:
        return latents_of(((pixels.float() - 127.5) / 8).half(), folder, classes=classes, scaling=8 / 127.5)


class Indexed(Halves):
    """Halves with an index; fitting 3,072 values takes 8 s, so crowds of them are the exact field's alone."""

    test_a_crowd_of_near_duplicates = None

    @pytest.mark.parametrize(("side", "darkest", "time"), [(64, 200, 0.997)])
    def test_near_duplicates_are_told_apart(
        self, tmp_path: Path, side: int, darkest: int, time: float
    ) -> None:
        super().test_near_duplicates_are_told_apart(tmp_path, side, darkest, time)


class TestExactOfFloats(Floats, test_velocity.TestExactInSmallBlocks):
    """All images in one sum."""


class TestNearAndFarOfHalves(Indexed, test_farfield.TestNearAndFar):
    """Six images as they are, the others by their coordinates."""


class TestNearestOfHalves(Indexed, test_velocity.TestNearestInCoordinates):
    """The k nearest in a few coordinates."""


def latents(dtype: torch.dtype, count: int = N, seed: int = 0) -> Tensor:
    """Far from 0 and not in their own units: what a scaling and a mean have to deal with."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SHAPE, generator=generator)
    return (20 + 6 * base + 3 * torch.randn(count, *SHAPE, generator=generator)).to(dtype)


@pytest.fixture(params=DTYPES, ids=str)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ImageStore:
    return latents_of(latents(request.param), tmp_path, scaling=0.2)


@pytest.mark.parametrize("time", [0.004, 0.05, 0.3, 0.6, 0.95, 0.999])
def test_every_field_is_that_of_the_scaled_latents(store: ImageStore, time: float) -> None:
    """The oracle's images are the arrays' own, scaled in float64."""
    given = latents(store.codec.dtype).flatten(1).double() * 0.2
    x, t = queries(store, time)
    wanted = velocity_from_score(given, x.flatten(1), t).view_as(x)
    index = NeighbourIndex.build(store, store.folder, rank=9)
    far = EmpiricalVelocity.near_and_far(index, levels=[(40, 12)], device="cpu")
    for field in (
        EmpiricalVelocity.exact(store, device="cpu"),
        EmpiricalVelocity.nearest(index, k=N, device="cpu"),
    ):
        torch.testing.assert_close(field(x, t).double(), wanted, rtol=3e-5, atol=3e-5 / (1 - time))
    error = (far(x, t) - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert error.max() < 0.02  # 41 images have 40 directions: bytes for coordinates are all that is lost


def test_unit_root_mean_square_and_a_given_scaling(tmp_path: Path) -> None:
    raw = latents(torch.float16)
    one, other = latents_of(raw, tmp_path / "a"), latents_of(raw, tmp_path / "b", scaling=0.18215)
    wanted = 1 / raw.double().square().mean().sqrt().item()
    assert one.codec.scaling == pytest.approx(wanted, rel=1e-5)
    assert one.codec.scaling == pytest.approx(float(f"{wanted:.6g}"), rel=1e-12)  # said in six digits
    assert all_images(one).square().mean().sqrt().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(all_images(other), raw.flatten(1).double() * 0.18215, rtol=2e-7, atol=0)
    longest = raw.flatten(1).double().norm(dim=1).max().item() * one.codec.scaling
    assert longest <= one.codec.longest(105) <= longest * (1 + 1e-5)
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_latents_by_hand(tmp_path: Path, dtype: torch.dtype) -> None:
    """Stored +-3 with scaling 1/2 are +-1.5: m = 1.5 tanh(1.5 t x / (1-t)^2), on paper."""
    raw = torch.tensor([3.0, -3.0], dtype=dtype).view(2, 1, 1, 1)
    field = EmpiricalVelocity.exact(latents_of(raw, tmp_path, scaling=0.5), device="cpu")
    x = torch.tensor([0.0, 0.2, -2.0]).view(3, 1, 1, 1)
    wanted = (1.5 * torch.tanh(1.5 * 0.6 * x / 0.16) - x) / 0.4
    torch.testing.assert_close(field(x, 0.6), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apart", [1e-2, 1e-3])
def test_floats_closer_than_any_bytes_are_told_apart(tmp_path: Path, apart: float) -> None:
    """Twins share the mass where s' |delta| is about 1: there the expansion is off by hundreds."""
    raw = torch.randn(30, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    raw[9] = raw[8]
    raw[9, 2, 3, 4] += apart
    store = latents_of(raw, tmp_path, scaling=1.0)
    time = 1 / (1 + apart)
    x1, x0 = store.images(torch.full((16,), 8)), noise_of(range(16), store.shape[1:])
    x, t = (1 - time) * x0 + time * x1, torch.full((16,), time)
    images = all_images(store)
    squares = (x.flatten(1).double()[:, None] - t.double()[0] * images[8:10]).square().sum(2)
    weight = (-squares / (2 * (1 - t.double()[0]) ** 2)).softmax(1)[:, 1]
    assert 0.05 < weight.min() < weight.max() < 0.95
    mean = EmpiricalVelocity.exact(store, device="cpu").mean(x, t)[:, 2, 3, 4].double()
    found = (mean - images[8].view(4, 16, 16)[2, 3, 4]) / (images[9] - images[8]).sum()
    # the mean is a float32 of values up to 3: 2e-7, of `apart`
    assert (found - weight).abs().max() < 5e-3 + 3e-7 / apart


@pytest.mark.parametrize("kind", ["bytes", "floats"])
@pytest.mark.parametrize("plain", [0.0, 1e9])
def test_candidates_are_weighed_alike_with_norms_and_without(tmp_path: Path, kind: str, plain: float) -> None:
    """Stores larger than their budget have no norms at hand: a stored 0 then is the origin."""
    if kind == "bytes":
        store = store_of(test_settling.photos(20), tmp_path)
    else:
        store = latents_of(latents(torch.float32, 20), tmp_path, scaling=0.2)
    rows, images = store.rows(), all_images(store)
    x, t = queries(store, 0.3, count=5)
    x, ids = x.flatten(1), torch.arange(20).expand(5, -1)
    squares = (x.double()[:, None] - 0.3 * images).square().sum(2)
    wanted = (-squares / (2 * 0.7**2)).softmax(1)
    for norms in (None, rows.squared_norms(1 << 20).float()):
        near = weigh(rows, ids, x, t, budget=1 << 20, norms=norms, plain_gain=plain)
        found = near.logits.double().softmax(1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(near.mean.double(), wanted @ images, rtol=0, atol=1e-4)


def test_samples_are_stored_latents_and_counted_as_copies(store: ImageStore) -> None:
    found = sample(EmpiricalVelocity.exact(store, device="cpu"), range(12), steps=20)
    near = nearest_images(store, found, 2)
    distances = (found.flatten(1).double()[:, None] - all_images(store)).norm(dim=2)
    assert torch.equal(near.ids[:, 0], distances.argmin(1))
    torch.testing.assert_close(near.distances.double(), distances.sort(1).values[:, :2], rtol=1e-4, atol=1e-6)
    assert len(near.ids[:, 0].unique()) > 3
    result = evaluate(store, samples=found)
    assert result.samples is not None
    assert result.samples.copies == 12
    assert result.scaling == pytest.approx(0.2)
    spacing = torch.finfo(store.codec.dtype).eps
    moved = found * (1 + 8 * max(spacing, 1e-7))
    assert evaluate(store, samples=moved).samples.copies == 0  # type: ignore[union-attr]


def full(images: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Where the field of `images` leads to, by Euler's steps in float64 and to the very end."""
    x = noise.flatten(1).double()
    for step in range(steps):
        time = step / steps
        weights = (-torch.cdist(x, time * images).square() / (2 * (1 - time) ** 2)).softmax(1)
        x = x + (weights @ images - x) / (steps - step)
    return x


@pytest.mark.parametrize("apart", [1e-2, 1e-7])
def test_finishing_early_ends_where_all_steps_do(tmp_path: Path, apart: float) -> None:
    """Also where images have twins far nearer than grey levels, and nearer than a float32 tells apart."""
    raw = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    twins = raw.clone()
    twins[:, 1, 2, 3] *= 1 + apart
    store = latents_of(torch.cat([raw, twins]).float(), tmp_path, scaling=1.0)
    noise = noise_of(range(40), store.shape[1:])
    images = all_images(store)
    wanted = full(images, noise, 500 if apart > 1e-3 else 40)
    found = sample(EmpiricalVelocity.exact(store, device="cpu"), noise, steps=40).flatten(1).double()
    # 500 steps and not 40, so that the oracle's last step does not start while twins share the mass
    original = torch.cdist(found, images[:8]).argmin(1) == torch.cdist(wanted, images[:8]).argmin(1)
    assert original.float().mean() >= 0.95
    ends = torch.cdist(found, images).amin(1)
    assert ends.max() < 5e-6


def test_a_near_image_that_is_estimated_is_not_the_end(store: ImageStore) -> None:
    """All mass on one image known in few coordinates: the sample goes on, though no grey level says so."""

    class Rough(EmpiricalVelocity):
        def estimate(self, x, t, label=None):  # type: ignore[no-untyped-def]
            found = super().estimate(x, t, label)
            if float(t) >= 0.4:
                return found
            one, mean = torch.ones_like(found.ess), 0.9 * found.mean
            return replace(found, mean=mean, velocity=(mean - x) / (1 - t), ess=one, far_mass=one)

    field = Rough(EmpiricalVelocity.exact(store, device="cpu").support, store)
    found = sample(field, range(5), steps=20)
    ends = (found.flatten(1).double()[:, None] - all_images(store)).norm(dim=2).amin(1)
    assert ends.max() < 1e-5


def test_settling_knows_no_mirror_images(tmp_path: Path) -> None:
    """Times of the same values as bytes are later: there the mirror images compete as well."""
    pixels = test_settling.photos(40)
    plain = store_of(pixels, tmp_path / "bytes")
    raw = torch.cat([(pixels.float() - 127.5) / 8, (pixels[:1].float() - 127.5) / 8]).half()  # and a copy
    store = latents_of(raw, tmp_path / "halves", scaling=8 / 127.5)
    with_mirrors, times = (
        settling_times(NeighbourIndex.build(one, one.folder, rank=4), risk=0.03, tolerance=0.02)
        for one in (plain, store)
    )
    assert with_mirrors is not None
    assert times is not None
    assert times[40] == pytest.approx(times[0].item(), abs=1e-4)  # copies do not keep each other from it
    assert (times[:40] <= with_mirrors + 1e-4).all()
    assert (times[:40] < with_mirrors - 1e-3).any()
    images = all_images(store)[:40]
    for own in range(0, 40, 9):
        moved = test_settling.share_moved(images, own, times[own].item(), draws=1000)
        assert moved <= 0.03 + 3 * math.sqrt(0.03 / 1000)


def test_near_latents_settle_late(tmp_path: Path) -> None:
    raw = test_settling.photos(30).float() / 64 - 2
    near = raw[:1].clone()
    near[0, 0, 0, 0] += 1e-3
    store = latents_of(4 * torch.cat([raw, near]), tmp_path, scaling=0.25)
    times = settling_times(NeighbourIndex.build(store, store.folder, rank=4))
    assert times is not None
    images = all_images(store)
    distances = (images[:1] - images[1:]).norm(dim=1)

    def bound(t: float) -> float:
        """Eq. 18, term by term."""
        spread = t * distances / (1 - t)
        each = (distances / (0.01 * math.sqrt(192) * (1 - t))).sqrt() / spread * (-spread.square() / 8).exp()
        return 4 / math.sqrt(2 * math.pi) * each.sum().item()

    low, high = 0.5, 1.0
    for _ in range(40):
        t = (low + high) / 2
        low, high = (t, high) if bound(t) > 0.01 else (low, t)
    for row in (0, 30):
        assert 1 - times[row].item() == pytest.approx(1 - high, rel=0.01)
    assert times[1:30].median() < 0.9


@pytest.mark.parametrize("budget", [400_000, 1_500_000])
def test_the_exact_field_keeps_within_its_memory(tmp_path: Path, budget: int) -> None:
    store = latents_of(latents(torch.float16, 1000), tmp_path)
    field = EmpiricalVelocity.exact(store, memory=budget, device="cpu")
    x, t = queries(store, 0.05, count=300)
    field(x[:2], t[:2])
    assert peak_of(lambda: field(x, t)) < budget + 4 * x.nbytes


def test_mirror_images_are_refused_everywhere(store: ImageStore) -> None:
    with refused(InputError, "a mirrored latent"):
        make_matcher("efm-m", store, flip=True)
    with refused(InputError, "a mirrored latent"):
        EmpiricalVelocity.exact(store, flip=True)


@pytest.mark.parametrize("name", ["efm-m", "efm", "efm-unbiased"])
def test_targets_are_means_of_scaled_latents(store: ImageStore, name: str) -> None:
    """With every image drawn or summed each target is the whole sum's."""
    field = EmpiricalVelocity.exact(store, device="cpu")
    matcher = make_matcher(name, store, field=field, samples=4000)
    ids = torch.arange(B)
    x1, x0 = store.images(ids), noise_of(range(B), store.shape[1:])
    draws = torch.Generator().manual_seed(0)
    t, xt, ut = matcher.sample_location_and_conditional_flow(
        x0, x1, torch.full((B,), 0.15), ids=ids, generator=draws
    )
    wanted = oracle(all_images(store), xt, t)
    error = (ut - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert error.max() < (0.05 if name == "efm-m" else 1e-5)


def test_held_out_latents_must_have_the_same_scaling(tmp_path: Path) -> None:
    one, other = (latents_of(latents(torch.float32, seed=s), tmp_path / f"{s}") for s in (1, 2))
    with refused(InputError, rf"held-out images are latents times .*--scaling {one.codec.scaling:.9g}\)"):
        evaluate(one, held_out=other)
    same = latents_of(latents(torch.float16, seed=2), tmp_path / "3", scaling=one.codec.scaling)
    assert evaluate(one, held_out=same).held_out is not None
