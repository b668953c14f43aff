"""Every empirical field through the contract, and what is special to each."""

from pathlib import Path

import pytest
import torch
from contract import DEVICE, D, FieldContract, N, all_images, oracle, pixels_of, queries
from peaks import peak_of
from refusals import refused
from stores import store_of

from nnflow import memory
from nnflow.errors import DegradedWarning, InputError
from nnflow.index import NeighbourIndex
from nnflow.store import ImageStore
from nnflow.velocity import EmpiricalVelocity, HybridVelocity


class TestExact(FieldContract):
    """All images in one sum."""

    def make(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        return EmpiricalVelocity.exact(store, flip=flip, device="cpu")

    complete = make


class TestExactInSmallBlocks(FieldContract):
    """The same within a budget of a few rows: blocks and query chunks of odd sizes."""

    def make(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        row = 4 * store.pixels.shape[1]
        return EmpiricalVelocity.exact(store, flip=flip, device="cpu", memory=4 * 7 * row)

    complete = make


class TestNearestInPixels(FieldContract):
    """The k nearest in all pixels."""

    def make(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        index = NeighbourIndex.build(store, store.folder, rank="pixels")
        return EmpiricalVelocity.nearest(index, k=6, flip=flip, device="cpu")

    def complete(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        index = NeighbourIndex.build(store, store.folder, rank="pixels")
        return _all_of(index, flip)


class TestNearestInCoordinates(FieldContract):
    """The k nearest in a few PCA coordinates."""

    def make(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        index = NeighbourIndex.build(store, store.folder, rank=5)
        return EmpiricalVelocity.nearest(index, k=6, flip=flip, device="cpu")

    def complete(self, store: ImageStore, *, flip: bool = False) -> EmpiricalVelocity:
        return _all_of(NeighbourIndex.build(store, store.folder, rank=5), flip)


class _Quiet(EmpiricalVelocity):
    """k = n clamps within a class, and says so: expected here."""

    def estimate(self, *arguments, **keywords):  # type: ignore[no-untyped-def]
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DegradedWarning)
            return super().estimate(*arguments, **keywords)


def _all_of(index: NeighbourIndex, flip: bool) -> EmpiricalVelocity:
    field = EmpiricalVelocity.nearest(index, k=len(index), flip=flip, device="cpu")
    return _Quiet(field.support, field.store, flip=flip)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return store_of(pixels_of(), tmp_path)


@pytest.mark.parametrize("count", [1, 2, 6, 7, 8, 14, 15])
def test_any_number_of_images_against_a_block_of_seven(tmp_path: Path, count: int) -> None:
    small = store_of(pixels_of(count), tmp_path)
    field = EmpiricalVelocity.exact(small, memory=4 * 7 * 4 * D, device="cpu")
    x, t = queries(small, 0.2)
    wanted = oracle(all_images(small), x, t)
    torch.testing.assert_close(field(x, t).double(), wanted, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "time"), [("pixels", 0.6), ("pixels", 0.9), (5, 0.9)])
def test_certificate_is_not_vacuous(store: ImageStore, rank: int | str, time: float) -> None:
    """A bound of infinity would pass the contract."""
    index = NeighbourIndex.build(store, store.folder, rank=rank)
    x, t = queries(store, time)
    estimate = EmpiricalVelocity.nearest(index, k=12, device="cpu").estimate(x, t)
    assert estimate.bound.median() < 0.1 * estimate.velocity.flatten(1).norm(dim=1).median()
    assert estimate.tail_mass.max() <= 1


def test_certificate_in_pixels_is_sharp(tmp_path: Path) -> None:
    """Images left out all at the distance of the k-th: the tail mass is the bound on it."""
    pixels = torch.zeros(9, 1, 3, 3, dtype=torch.uint8)
    pixels.view(9, 9).fill_diagonal_(255)  # nine images, at equal distances from each other
    equal = store_of(pixels, tmp_path)
    index = NeighbourIndex.build(equal, equal.folder, rank="pixels")
    estimate = EmpiricalVelocity.nearest(index, k=3, device="cpu").estimate(torch.zeros(1, 1, 3, 3), 0.5)
    assert estimate.tail_mass.item() == pytest.approx(6 / 9, rel=1e-4)


def test_approximate_index_knows_nothing_of_the_rest(store: ImageStore) -> None:
    index = NeighbourIndex.build(store, store.folder, rank=5, kind="HNSW8")
    estimate = EmpiricalVelocity.nearest(index, k=6, device="cpu").estimate(*queries(store, 0.9))
    assert estimate.bound.isposinf().all()
    assert (estimate.tail_mass == 1).all()


def test_flat_in_the_words_of_faiss_is_exact_too(store: ImageStore) -> None:
    index = NeighbourIndex.build(store, store.folder, rank=5, kind="Flat")
    estimate = EmpiricalVelocity.nearest(index, k=6, device="cpu").estimate(*queries(store, 0.9))
    assert index.exact
    assert estimate.bound.isfinite().all()


def test_ids_are_the_images_summed(store: ImageStore) -> None:
    index = NeighbourIndex.build(store, store.folder, rank="pixels")
    x, t = queries(store, 0.5)
    estimate = EmpiricalVelocity.nearest(index, k=6, flip=True, device="cpu").estimate(x, t)
    images = all_images(store)
    both = torch.cat([images, images.view(-1, *x.shape[1:]).flip(-1).flatten(1)])
    squares = (x.flatten(1).double()[:, None] / 0.5 - both).square().sum(-1)
    straight = squares[:, :N].topk(6, largest=False).indices.sort(1).values
    mirrored = squares[:, N:].topk(6, largest=False).indices.sort(1).values + N
    assert estimate.ids is not None
    assert torch.equal(estimate.ids[:, :6].sort(1).values, straight)
    assert torch.equal(estimate.ids[:, 6:].sort(1).values, mirrored)


def test_more_neighbours_than_images_are_said_and_clamped(store: ImageStore) -> None:
    index = NeighbourIndex.build(store, store.folder, rank=5)
    x, t = queries(store, 0.3)
    with pytest.warns(DegradedWarning, match="all 37"):
        velocity = EmpiricalVelocity.nearest(index, k=99, device="cpu")(x, t)
    torch.testing.assert_close(velocity.double(), oracle(all_images(store), x, t), rtol=2e-5, atol=1e-5)


def test_no_neighbours_are_refused(store: ImageStore) -> None:
    index = NeighbourIndex.build(store, store.folder, rank=5)
    with pytest.raises(InputError, match="k = 0"):
        EmpiricalVelocity.nearest(index, k=0, device="cpu")


def test_a_budget_below_one_row_is_refused(store: ImageStore) -> None:
    with pytest.raises(InputError, match="too small"):
        EmpiricalVelocity.exact(store, memory=100, device="cpu")


def test_labels_of_images_without_classes_are_refused(store: ImageStore) -> None:
    field = EmpiricalVelocity.exact(store, device="cpu")
    with pytest.raises(InputError, match="no classes"):
        field(*queries(store, 0.3), 0)


@pytest.mark.skipif(DEVICE != "cpu", reason="it is the CPU's memory that is measured")
def test_peak_memory_keeps_the_budget_whatever_n(tmp_path: Path) -> None:
    """Three times the images, the same budget: the field's working memory stays within it."""
    budget = memory.parse_bytes("24MiB")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6000, 3, 16, 16), generator=generator, dtype=torch.uint8)
    big = store_of(pixels, tmp_path)
    field = EmpiricalVelocity.exact(big, memory=budget, device="cpu")
    x, t = queries(big, 0.05, count=600)  # unrestricted, the logits alone would take 14.4 MB three times
    field(x[:2], t[:2])
    peak = peak_of(lambda: field(x, t))
    assert 4e6 < peak < budget + 4 * x.nbytes  # the answer and its parts come on top


def test_hybrid_switches_at_tau(store: ImageStore) -> None:
    first, second = (
        EmpiricalVelocity.exact(store, device="cpu"),
        EmpiricalVelocity.exact(store, flip=True, device="cpu"),
    )
    hybrid = HybridVelocity(first, second, 0.4)
    x, _ = queries(store, 0.3)
    for time, ruling in [(0.0, first), (0.3999, first), (0.4, second), (0.8, second)]:
        assert torch.equal(hybrid(x, time), ruling(x, time))
    t = torch.linspace(0, 0.9, len(x))
    wanted = torch.where((t < 0.4)[:, None, None, None], first(x, t), second(x, t))
    torch.testing.assert_close(hybrid(x, t), wanted, rtol=1e-5, atol=1e-5)


def test_hybrid_refuses_what_does_not_fit(store: ImageStore, tmp_path: Path) -> None:
    field = EmpiricalVelocity.exact(store, device="cpu")
    with pytest.raises(InputError, match=r"tau = 1\.2"):
        HybridVelocity(field, field, 1.2)
    other = EmpiricalVelocity.exact(
        store_of(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), tmp_path / "b"), device="cpu"
    )
    with pytest.raises(InputError, match="same shape"):
        HybridVelocity(field, other, 0.2)


def test_a_class_far_from_the_query_is_found_by_an_approximate_index(tmp_path: Path) -> None:
    """Two classes far apart and IVF lists that hold one each: the lists next to the query hold no `bee`."""
    generator = torch.Generator().manual_seed(0)
    dark = torch.randint(0, 30, (300, 1, 4, 4), generator=generator)
    pixels = torch.cat([dark, 225 + dark]).to(torch.uint8)
    apart = store_of(pixels, tmp_path, classes=["ant"] * 300 + ["bee"] * 300)
    index = NeighbourIndex.build(apart, apart.folder, rank=4, kind="IVF8,Flat")
    x = apart.images(torch.arange(5))
    estimate = EmpiricalVelocity.nearest(index, k=20, device="cpu").estimate(x, 0.9, 1)
    assert estimate.ids is not None
    assert ((estimate.ids >= 300) & (estimate.ids < 600)).all()


def test_nothing_of_a_field_pretends_to_be_differentiable(tmp_path: Path) -> None:
    """A gradient through x alone, the mean held fixed, would be a plausible and wrong divergence."""
    field = EmpiricalVelocity.exact(store_of(pixels_of(5), tmp_path))
    x = torch.randn(2, *field.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for found in (field(x, 0.3), field.mean(x, 0.3), field.score(x, 0.3), field.denoiser(x, 0.7)):
        assert not found.requires_grad


def test_a_solver_that_asks_the_other_way_round_is_told(tmp_path: Path) -> None:
    field = EmpiricalVelocity.exact(store_of(pixels_of(5), tmp_path))
    x = torch.zeros(2, *field.shape)
    with refused(InputError, "lambda t, x: field"):
        field(torch.tensor(0.3), x)
    with refused(InputError, "step_t"):
        field(x, 1.2)
