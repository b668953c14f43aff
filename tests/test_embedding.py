"""The PCA of the stored images against singular values in float64; the file; the collapse time."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import all_images
from refusals import refused
from safetensors.torch import load_file, save_file
from stores import store_of
from torch import Tensor

from nnflow import covariance, integers
from nnflow import fitting as module
from nnflow.embedding import FORMAT, Embedding, collapse_time, embedding_digest
from nnflow.errors import DegradedWarning, InputError, StoreError
from nnflow.fitting import fit_embedding
from nnflow.pixels import PixelRows
from nnflow.store import ImageStore

N, SIDE = 300, 8
D = 3 * SIDE * SIDE
ROOMY = 1 << 30


def correlated(count: int, side: int = SIDE, seed: int = 0) -> Tensor:
    """Images of few strong directions and many weak ones, some pixels saturated."""
    generator = torch.Generator().manual_seed(seed)
    dim = 3 * side * side
    strength = torch.linspace(0, 4, 12).neg().exp() * 80
    latent = torch.randn(count, 12, generator=generator) * strength
    pixels = 128 + latent @ torch.randn(12, dim, generator=generator) / 3
    pixels += 6 * torch.randn(count, dim, generator=generator)
    return pixels.round().clamp(0, 255).to(torch.uint8).view(count, 3, side, side)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return store_of(correlated(N), tmp_path_factory.mktemp("embedding"))


def principal(store: ImageStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variances and directions by singular values of the centred images, in float64."""
    images = all_images(store).numpy()
    mean = images.mean(0)
    _, singular, directions = np.linalg.svd(images - mean, full_matrices=False)
    variances = np.zeros(images.shape[1])
    variances[: len(singular)] = singular**2 / len(images)
    return mean, variances, directions


def fit(store: ImageStore, rank: int | str = 20, budget: int = ROOMY, seed: int = 0) -> Embedding:
    return fit_embedding(store, rank=rank, budget=budget, seed=seed)  # type: ignore[arg-type]


def check_against_svd(found: Embedding, store: ImageStore, rank: int) -> None:
    mean, variances, directions = principal(store)
    np.testing.assert_allclose(found.mean.double().numpy(), mean, rtol=0, atol=2e-7)
    np.testing.assert_allclose(
        found.spectrum.double().numpy(), variances, rtol=1e-6, atol=1e-7 * variances[0]
    )
    assert found.directions is not None
    cosines = (found.directions[:rank].double().numpy() * directions[:rank]).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1, rtol=0, atol=1e-6)


def test_mean_spectrum_and_directions_are_those_of_the_svd(store: ImageStore) -> None:
    found = fit(store, 20)
    check_against_svd(found, store, 12)  # beyond the twelve strong ones, neighbours nearly tie
    assert found.fitted_on == N
    assert found.store_fingerprint == store.fingerprint


@pytest.mark.parametrize("rank", [1, 20, D])
def test_directions_are_orthonormal(store: ImageStore, rank: int) -> None:
    directions = fit(store, rank).directions
    assert directions is not None
    gram = directions.double() @ directions.double().T
    torch.testing.assert_close(gram, torch.eye(rank).double(), rtol=0, atol=1e-6)


def test_total_and_captured_variance(store: ImageStore) -> None:
    found, images = fit(store, 5), all_images(store)
    total = images.var(0, correction=0).sum().item()
    assert found.spectrum.double().sum().item() == pytest.approx(total, rel=1e-6)
    assert (found.spectrum[:-1] >= found.spectrum[1:]).all()
    assert (found.spectrum >= 0).all()
    coordinates = found(images.float()).double()
    assert found.captured == pytest.approx(coordinates.var(0, correction=0).sum().item() / total, rel=1e-5)
    assert fit(store, "pixels").captured == pytest.approx(1, abs=1e-6)


def test_coordinates_are_projections_on_the_directions(store: ImageStore) -> None:
    found = fit(store, 7)
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    assert found.directions is not None
    wanted = (x.double() - found.mean.double()) @ found.directions.double().T
    torch.testing.assert_close(found(x).double(), wanted, rtol=1e-5, atol=1e-5)
    pixels = fit(store, "pixels")
    assert pixels.directions is None
    torch.testing.assert_close(pixels(x), x - pixels.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 40, D, "pixels"])
def test_radii_bound_every_image_and_not_by_much(store: ImageStore, rank: int | str) -> None:
    found = fit(store, rank)
    centred = all_images(store) - found.mean.double()
    distances = centred.norm(dim=1)
    assert distances.max() <= found.radius <= distances.max() * 1.001
    if found.directions is None:
        assert found.residual_radius == 0
        return
    directions = found.directions.double()
    along = centred @ found.principal.double().T
    peaks = along.abs().amax(0)
    assert (peaks <= found.peaks).all()
    assert (found.peaks <= peaks + 1e-4 * found.radius).all()
    outside = (centred - (centred @ directions.T) @ directions).norm(dim=1)
    assert outside.max() <= found.residual_radius <= outside.max() * 1.001 + 0.01 * found.radius


@pytest.mark.parametrize("block", [1, 7])
@pytest.mark.parametrize("last", [True, False])
def test_the_furthest_image_is_found_in_whatever_block_it_is(block: int, last: bool) -> None:
    """Images a hundredth further out than those before them: only they are looked at closely."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (60, D), generator=generator) * 2 - 1
    order = torch.arange(40, 100) if last else torch.arange(99, 39, -1)
    rows = PixelRows((127 + order[:, None] * signs).to(torch.uint8))
    directions = torch.linalg.qr(torch.randn(D, 4, generator=generator))[0].T.contiguous()
    stream = covariance.Stream(rows, ROOMY, module.Fitting(block, 60, None), None, False)
    found = module._measure(stream, torch.zeros(D), directions, 4)
    x = rows.pixels.double() / 127.5 - 1
    outside = (x - (x @ directions.double().T) @ directions.double()).norm(dim=1).max().item()
    assert outside <= found.residual_radius <= outside + 1e-4


@pytest.mark.parametrize("block", [1, 1024])
def test_a_small_residual_of_strong_images_is_bounded(block: int) -> None:
    """|x|^2 - |P x|^2 cancels where one direction holds nearly all: the bound must not be short of it."""
    short = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        pattern = torch.randint(0, 2, (D,), generator=generator) * 2 - 1
        strength = torch.randint(-100, 101, (3, 1), generator=generator)
        weak = torch.randint(0, 2, (3, D), generator=generator)
        rows = PixelRows((127 + strength * pattern + weak).to(torch.uint8))
        directions = pattern[None].float() / math.sqrt(D)
        mean = torch.zeros(D)
        stream = covariance.Stream(rows, ROOMY, module.Fitting(block, 3, None), None, False)
        found = module._measure(stream, mean, directions, 1)
        radius, residual = found.radius, found.residual_radius
        x = rows.pixels.double() / 127.5 - 1
        along = (x @ directions.double().T) @ directions.double()
        outside = (x - along).norm(dim=1).max().item()
        assert x.norm(dim=1).max() <= radius
        assert found.peaks.item() == pytest.approx((x @ directions.double().T).abs().max().item(), rel=1e-5)
        assert outside <= residual <= 1.01 * outside
        centred = rows.pixels / 127.5 - 1
        plain = centred.square().sum(1) - (centred @ directions.T).square().sum(1)
        short += plain.max().sqrt().item() < outside
    assert short > 3, "the plain difference never fell short: the test would prove nothing"


def test_rank_is_clamped_to_values_and_images(store: ImageStore, tmp_path: Path) -> None:
    assert fit(store, 10_000).rank == D
    few = store_of(correlated(9), tmp_path)
    assert fit(few, 50).rank == 9
    assert fit(few, "pixels").rank == D
    assert fit(few, 50).captured == pytest.approx(1, abs=1e-6)


def test_one_image_has_no_variance(tmp_path: Path) -> None:
    lone = store_of(correlated(1), tmp_path)
    found = fit(lone, 3)
    assert found.rank == 1
    assert found.captured == pytest.approx(1)
    assert (found.spectrum.double() < 1e-12).all()
    torch.testing.assert_close(found.mean.double(), all_images(lone)[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("budget", [36 * D * D, 36 * D * D + 4321, 3_000_000])
def test_any_budget_gives_the_same_answer(
    store: ImageStore, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRAM_ROWS", 71)  # four blocks and sixteen rows
    found, wanted = fit(store, 6, budget), fit(store, 6)
    check_against_svd(found, store, 6)
    assert torch.equal(found.mean, wanted.mean)
    torch.testing.assert_close(found.spectrum, wanted.spectrum, rtol=1e-5, atol=1e-9)


def test_a_budget_below_the_covariance_fits_a_subset_and_says_so(store: ImageStore) -> None:
    with pytest.warns(DegradedWarning, match=r"192 values takes 1\.3 MiB, .* those of 287 of 300 images"):
        found = fit(store, 6, 36 * D * D - 3000)
    assert found.fitted_on == 287
    held = (all_images(store) - found.mean).mm(found.principal[:6].double().T).square().mean(0).sum().item()
    best = principal(store)[1][:6].sum()
    assert 0.97 * best < held <= best * (1 + 1e-6)
    assert fit(store, 6, 36 * D * D).fitted_on == N


def test_sums_do_not_depend_on_integer_products(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert D >= covariance._INTEGER_DIM, "the integer products are not used: the test would prove nothing"
    wanted = fit(store, 6)
    monkeypatch.setattr(integers, "are_fast", lambda: False)
    monkeypatch.setattr(covariance, "_EXACT_ROWS", 71)
    found = fit(store, 6)
    assert torch.equal(found.spectrum, wanted.spectrum)
    assert embedding_digest(found) == embedding_digest(wanted)


@pytest.mark.parametrize("rows", [1, 71, 1024, 3000])
@pytest.mark.parametrize("dim", [1, 63, 64, 100])
@pytest.mark.parametrize("whole", [True, False])
def test_products_of_extreme_bytes_are_exact(
    rows: int, dim: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(integers, "are_fast", lambda: False)
    generator = torch.Generator().manual_seed(0)
    choices = torch.tensor([-128, 127, 127, -127])
    block = choices[torch.randint(4, (rows, dim), generator=generator)].to(torch.int8)
    block[:, 0] = -128
    wide = block.numpy().astype(np.int64)
    found = torch.ones(dim, dim, dtype=torch.float64)
    covariance._add_gram(block, found)
    assert torch.equal(found.triu(), torch.from_numpy(1.0 + wide.T @ wide).triu())


@pytest.mark.parametrize("count", [2, 40, 96, 97])
def test_few_images_by_their_inner_products(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MIN_PRODUCTS_DIM", 100)
    monkeypatch.setattr(module, "PRINCIPAL", 12)  # the other variances are not measured again
    few = store_of(correlated(count), tmp_path)
    assert (module.fitting_of(few, ROOMY).together is None) == (count <= D // 2)
    rank = min(count - 1, 12)  # beyond, neighbours nearly tie
    check_against_svd(fit(few, rank), few, rank)


@pytest.mark.parametrize(("enough", "kept"), [(0.5, 12), (0.999, 24), (1.0, 24)])
def test_twice_as_many_directions_where_half_of_them_hold_too_little(
    store: ImageStore, enough: float, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PRINCIPAL", 12)
    monkeypatch.setattr(module, "_ENOUGH", enough)
    assert 0.5 < principal(store)[1][:12].sum() / principal(store)[1].sum() < 0.999
    assert fit(store, 5).principal.shape == (kept, D)
    assert fit(store, 30).principal.shape == (30, D)


class TestWideImages:
    """Above 4,096 values a subset of the images is decomposed; here that limit is 100."""

    @pytest.fixture(autouse=True)
    def _narrow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_MAX_COVARIANCE_DIM", 100)

    def test_a_subset_of_all_images_is_the_svd(self, tmp_path: Path) -> None:
        few = store_of(correlated(150), tmp_path)
        found = fit(few, 12)
        assert found.fitted_on == 150
        mean, variances, directions = principal(few)
        np.testing.assert_allclose(found.mean.double().numpy(), mean, rtol=0, atol=2e-7)
        np.testing.assert_allclose(found.spectrum.numpy(), variances, rtol=1e-4, atol=2e-6 * variances[0])
        assert found.directions is not None
        cosines = (found.directions.double().numpy() * directions[:12]).sum(1)
        np.testing.assert_allclose(np.abs(cosines), 1, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("seed", range(3))
    def test_a_part_of_the_images_gives_nearly_their_leading_space(
        self, store: ImageStore, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_SUBSET", 120)
        found, whole = fit(store, 8, seed=seed), fit(store, "pixels", seed=seed)
        assert found.fitted_on == whole.fitted_on == 120
        images = all_images(store)
        total = images.var(0, correction=0).sum().item()
        for one in (found, whole):
            assert one.spectrum.double().sum().item() == pytest.approx(total, rel=1e-5)
            along = (images - one.mean).mm(one.principal.double().T).square().mean(0)
            torch.testing.assert_close(one.spectrum[: len(along)].double(), along, rtol=1e-4, atol=1e-9)
            assert (along[:-1] >= along[1:]).all()
        directions = found.directions.double()  # type: ignore[union-attr]
        torch.testing.assert_close(directions @ directions.T, torch.eye(8).double(), rtol=0, atol=1e-6)
        held = (images - found.mean).mm(directions.T).square().mean(0).sum().item()
        best = principal(store)[1][:8].sum()
        assert 0.97 * best < held <= best * (1 + 1e-6)
        assert found.captured == pytest.approx(held / total, abs=0.05)
        centred = images - found.mean.double()
        outside = (centred - (centred @ directions.T) @ directions).norm(dim=1).max()
        assert outside <= found.residual_radius <= outside * 1.01

    def test_the_seed_chooses_the_subset(self, store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_SUBSET", 50)
        digests = [embedding_digest(fit(store, 8, seed=seed)) for seed in (0, 0, 1)]
        assert digests[0] == digests[1] != digests[2]

    @pytest.mark.parametrize("count", [1, 3])
    def test_images_that_do_not_differ(self, tmp_path: Path, count: int) -> None:
        same = store_of(correlated(1).repeat(count, 1, 1, 1), tmp_path)
        found = fit(same, 2)
        assert found.directions is not None
        assert found.rank >= 1
        torch.testing.assert_close(found.directions.norm(dim=1), torch.ones(found.rank))
        assert (found.spectrum.double() < 1e-10).all()
        assert found.radius < 1e-4

    def test_a_budget_for_less_than_a_few_images_is_refused(self, store: ImageStore) -> None:
        with refused(InputError, r"192 values on at least 256 images; give 1\.1 MiB"):
            fit(store, 6, 256 * 24 * D - 1)
        assert fit(store, 6, 260 * 24 * D).fitted_on == 260


@pytest.mark.parametrize("rank", [0, -3])
def test_no_coordinates_are_refused(store: ImageStore, rank: int) -> None:
    with refused(InputError, f"rank {rank}: wanted at least 1"):
        fit(store, rank)


def test_the_same_images_give_the_same_bytes(store: ImageStore, tmp_path: Path) -> None:
    """Several times, because an order that hashing chooses differs only now and then."""
    for name in "abcdefgh":
        fit(store, 9).save(tmp_path / name)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("rank", [9, "pixels"])
def test_what_is_saved_is_what_is_opened(store: ImageStore, tmp_path: Path, rank: int | str) -> None:
    found = fit(store, rank)
    found.save(tmp_path / "e")
    again = Embedding.open(tmp_path / "e")
    for name, value in found.__dict__.items():
        other = getattr(again, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name
    assert embedding_digest(again) == embedding_digest(found)


def test_the_digest_tells_maps_apart(store: ImageStore) -> None:
    digests = {embedding_digest(fit(store, rank)) for rank in (8, 9, "pixels")}
    assert len(digests) == 3
    found = fit(store, 8)
    moved = Embedding(**found.__dict__ | {"mean": found.mean + 1e-6})
    other = Embedding(**found.__dict__ | {"store_fingerprint": "other"})
    assert len({embedding_digest(e) for e in (found, moved, other)}) == 3


class TestFile:
    @pytest.fixture
    def path(self, store: ImageStore, tmp_path: Path) -> Path:
        path = tmp_path / "e\n.safetensors"
        fit(store, 9).save(path)
        return path

    @pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
    def test_truncated(self, path: Path, keep: int) -> None:
        path.write_bytes(path.read_bytes()[:keep])
        with refused(StoreError, r"e\\n\.safetensors: not a readable embedding .*build the index again"):
            Embedding.open(path)

    @pytest.mark.parametrize("content", [b"PK\3\4" * 100, b"\x89HDF\r\n\x1a\n" + bytes(99), b"\xff" * 64])
    def test_foreign(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with refused(StoreError, r"e\\n\.safetensors: not a readable embedding"):
            Embedding.open(path)

    def test_absent_or_a_folder(self, path: Path) -> None:
        with refused(StoreError, "absent: not a readable embedding"):
            Embedding.open(path.parent / "absent")
        with refused(StoreError, "not a readable embedding"):
            Embedding.open(path.parent)

    @pytest.mark.parametrize("metadata", [None, {"format": "nnflow-embedding-0"}, {"format": "pt\n"}])
    def test_of_another_version_or_program(self, path: Path, metadata: dict[str, str] | None) -> None:
        save_file(load_file(path), path, metadata)
        with refused(StoreError, f"format .*, wanted {FORMAT}"):
            Embedding.open(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"mean": None},
            {"numbers": None},
            {"numbers": torch.ones(2)},
            {"numbers": torch.full((4,), torch.nan)},
            {"numbers": torch.tensor([1.0, 1.0, 9.0, 1000.0], dtype=torch.float64)},
            {"spectrum": torch.ones(D - 1)},
            {"mean": torch.ones(D).double()},
            {"mean": torch.ones(1, D)},
            {"principal": torch.ones(2, D + 1)},
            {"principal": torch.ones(0, D)},
            {"principal": torch.ones(D)},
            {"store": None},
            {"store": torch.ones(8)},
        ],
    )
    def test_of_parts_that_do_not_fit(self, path: Path, change: dict[str, Tensor | None]) -> None:
        tensors = {name: value for name, value in (load_file(path) | change).items() if value is not None}
        save_file(tensors, path, {"format": FORMAT})
        with refused(StoreError, "that fit each other; build the index again"):
            Embedding.open(path)


@pytest.mark.parametrize(("dim", "variance", "count"), [(2, 0.5, 10), (48, 0.1, 1000), (3072, 0.2, 50_000)])
def test_collapse_of_an_isotropic_gaussian_by_hand(dim: int, variance: float, count: int) -> None:
    """D/2 log(1 + v / s^2) = log n at s^2 = v / (n^(2/D) - 1), and t = 1 / (1 + s)."""
    spread = math.sqrt(variance / (count ** (2 / dim) - 1))
    found = collapse_time(torch.full((dim,), variance), count)
    assert found == pytest.approx(1 / (1 + spread), rel=1e-6)


def test_collapse_of_two_scales_between_two_counts() -> None:
    """Variances 4, 4, 1/4, 1/4 at s = 1 carry log(5 * 5/4) nats: half-time is that of 6.25 images."""
    spectrum = torch.tensor([4.0, 4.0, 0.25, 0.25])
    assert collapse_time(spectrum, 6) < 0.5 < collapse_time(spectrum, 7)


def test_collapse_where_there_is_nothing_to_tell_apart() -> None:
    spectrum = torch.tensor([1.0, 0.5])
    assert collapse_time(spectrum, 1) == pytest.approx(0, abs=1e-9)
    assert collapse_time(torch.zeros(4), 10) == pytest.approx(1, abs=1e-9)
    assert collapse_time(spectrum, 10) < collapse_time(spectrum, 1000) < 1
    assert collapse_time(10 * spectrum, 10) < collapse_time(spectrum, 10)
