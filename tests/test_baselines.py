"""scripts/baselines.py: each estimator where it must be exact, and its error where theory gives it.

The theory (float64, from the posterior weights w alone): M draws from a proposal q, self-normalised, err by
|m - m_hat|^2 = 1/M sum_i w_i^2 / q_i |x_i - m|^2 in the mean, to first order in 1/M.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from contract import all_images, oracle, pixels_of
from stores import store_of
from torch import Tensor

from nnflow import ImageStore, NeighbourIndex

N, B = 97, 13  # more than the 32 images that every sum weighs by difference
DRAWS, CALLS = 1500, 30

SCRIPT = Path(__file__).parents[1] / "scripts" / "baselines.py"
spec = importlib.util.spec_from_file_location("baselines", SCRIPT)
assert spec is not None
assert spec.loader is not None
baselines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(baselines)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> NeighbourIndex:
    store = store_of(pixels_of(N), tmp_path_factory.mktemp("images"))
    return NeighbourIndex.build(store, store.folder, rank=8)


@pytest.fixture(scope="module")
def store(index: NeighbourIndex) -> ImageStore:
    return index.store


@pytest.fixture(scope="module")
def scan(store: ImageStore):
    """Blocks of 10 rows, and queries a few at a time."""
    return baselines.Scan(store, memory=16 * store.pixels.shape[1] * 10)


def path_queries(store: ImageStore, time: float, seed: int = 1, count: int = B) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(len(store), (count,), generator=generator)
    x0 = torch.randn(count, *store.shape[1:], generator=generator)
    return (1 - time) * x0 + time * store.images(own), torch.full((count,), time), own


def posterior(store: ImageStore, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, n) of all images and |x_i - m|^2 (B, n), float64."""
    images, time = all_images(store), t.double()[:, None]
    squares = (x.flatten(1).double()[:, None] - time[..., None] * images).square().sum(-1)
    weights = (-squares / (2 * (1 - time) ** 2)).softmax(1)
    return weights, (images - (weights @ images)[:, None]).square().sum(-1)


def of_sample(weights: Tensor, away: Tensor, proposal: Tensor) -> Tensor:
    return (weights.square() / proposal * away).sum(1) / DRAWS


def expected_draws(store: ImageStore, x: Tensor, t: Tensor) -> Tensor:
    weights, away = posterior(store, x, t)
    return of_sample(weights, away, torch.full_like(weights, 1 / N))


def expected_snis(store: ImageStore, x: Tensor, t: Tensor, k: int) -> Tensor:
    """The proposal: the posterior of the k nearest, the k-th's for all others."""
    weights, away = posterior(store, x, t)
    proposal = torch.maximum(weights, weights.sort(1, descending=True).values[:, k - 1 : k])
    return of_sample(weights, away, proposal / proposal.sum(1, keepdim=True))


def expected_deann(store: ImageStore, x: Tensor, t: Tensor, near: Tensor) -> Tensor:
    """Only the images not in `near` (B, n) are drawn: about their share of M, each for all of them."""
    weights, _ = posterior(store, x, t)
    images = all_images(store)
    delta = images - (weights @ images)[:, None]
    far = ~near
    each = far.sum(1)[:, None, None] * (weights * far)[..., None] * delta  # its mean is the sum over the far
    spread = (each * far[..., None]).square().sum((1, 2)) / far.sum(1)
    middle = ((weights * far)[..., None] * delta).sum(1).square().sum(1)
    return (spread - middle) / (DRAWS * far.sum(1) / N)


def check_error(method, store: ImageStore, time: float, expected) -> None:
    """Over many calls: as large as expected, and without bias."""
    x, t, own = path_queries(store, time)
    wanted = (1 - time) * oracle(all_images(store), x, t) + x  # the mean
    errors = torch.stack([x + (1 - time) * method(x, t, own) - wanted for _ in range(CALLS)]).flatten(2)
    squares = errors.square().sum(2).mean(0)
    ratio = (squares / expected(x, t)).mean()
    assert 0.8 < ratio < 1.25
    # the mean of the errors falls with the number of calls; a bias would stay
    assert (errors.mean(0).square().sum(1) / squares).mean() < 3 / CALLS


@pytest.mark.parametrize("time", [0.1, 0.4])
def test_draws_err_as_draws_do(store: ImageStore, scan, time: float) -> None:
    method = baselines.Draws(scan, draws=DRAWS, seed=0, with_own=False)
    check_error(method, store, time, lambda x, t: expected_draws(store, x, t))


@pytest.mark.parametrize("k", [1, 20, N])
@pytest.mark.parametrize("time", [0.1, 0.4])
def test_importance_sampling_errs_as_its_proposal_says(store: ImageStore, scan, time: float, k: int) -> None:
    method = baselines.Snis(scan, k=k, draws=DRAWS, seed=0)
    check_error(method, store, time, lambda x, t: expected_snis(store, x, t, k))


@pytest.mark.parametrize("time", [0.1, 0.4])
def test_deann_errs_as_its_far_part_does(store: ImageStore, scan, time: float) -> None:
    method = baselines.Deann(scan, k=20, draws=DRAWS, seed=0)

    def expected(x: Tensor, t: Tensor) -> Tensor:
        weights, _ = posterior(store, x, t)
        return expected_deann(store, x, t, weights >= weights.sort(1, descending=True).values[:, 19:20])

    check_error(method, store, time, expected)


class Asked:
    """An index that remembers what it was asked."""

    def __init__(self, index: NeighbourIndex) -> None:
        self.index, self.queries = index, torch.empty(0)

    def candidates(self, x: Tensor, k: int):
        self.queries = x
        return self.index.candidates(x, k)


def test_deann_with_an_index_has_the_neighbours_of_x_over_t(index: NeighbourIndex, scan) -> None:
    asked = Asked(index)
    method = baselines.Deann(scan, k=3, draws=DRAWS, seed=0, index=asked)

    def expected(x: Tensor, t: Tensor) -> Tensor:
        torch.testing.assert_close(t[:, None] * asked.queries, x.flatten(1))
        ids = index.candidates(asked.queries, 3).ids
        near = torch.zeros(len(x), N, dtype=torch.bool).scatter_(1, ids, value=True)
        return expected_deann(index.store, x, t, near)

    check_error(method, index.store, 0.6, expected)


def test_efm_m_is_unbiased_for_the_posterior_of_x1(store: ImageStore, scan) -> None:
    """One x_t, x1 drawn from its posterior, five draws: far from u* each time, and not in the mean."""
    x, t, _ = path_queries(store, 0.4, count=1)
    weights, _ = posterior(store, x, t)
    own = weights[0].multinomial(2000, replacement=True, generator=torch.Generator().manual_seed(2))
    found = {}
    for with_own in (True, False):
        method = baselines.Draws(scan, draws=5, seed=0, with_own=with_own)
        found[with_own] = torch.cat([method(x, t, one) for one in own[:, None]]).flatten(1).double()
    wanted = oracle(all_images(store), x, t).flatten(1)
    bias = {key: (some.mean(0) - wanted).norm() for key, some in found.items()}
    error = found[True].var(0).sum().sqrt() / len(own) ** 0.5
    assert bias[True] < 1.5 * error
    assert bias[False] > 5 * error  # without x1 it is another estimator


@pytest.mark.parametrize("time", [0.0, 0.02, 0.3, 0.9, 0.99])
def test_the_whole_sum_by_halves(store: ImageStore, scan, time: float) -> None:
    """A query in two halves is known to 2^-17, a logit at t = .3 to 1e-5; one half alone to 2^-9."""
    x, t, own = path_queries(store, time)
    found = baselines.Halves(scan)(x, t, own)
    wanted = all_images(store).mean(0).view_as(x[0]) - x if time == 0 else oracle(all_images(store), x, t)
    error = (found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert error.max() < 2e-5


def test_a_product_of_halves_is_one_of_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, 500, generator=generator)
    b = torch.randint(0, 256, (500, 40), generator=generator)
    found = baselines._product(baselines._split(a), b.bfloat16())
    size = a.norm(dim=1)[:, None] * b.float().norm(dim=0)
    assert ((found - a.double() @ b.double()).abs() / size).max() < 2**-16


@pytest.mark.parametrize("time", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("k", [1, 7, N, 2 * N])
def test_top_k_is_the_sum_over_the_k_nearest_in_pixels(store: ImageStore, scan, time: float, k: int) -> None:
    x, t, own = path_queries(store, time)
    found = baselines.Top(scan, k=k)(x, t, own)
    images = all_images(store)
    for row in range(B):
        far = (x[row].flatten().double() - time * images).norm(dim=1)
        nearest = images[far.argsort()[:k]]
        wanted = oracle(nearest, x[row : row + 1], t[row : row + 1])
        torch.testing.assert_close(found[row : row + 1].double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("time", [0.02, 0.3, 0.9])
def test_deann_with_all_images_near_is_the_sum(store: ImageStore, scan, time: float) -> None:
    x, t, own = path_queries(store, time)
    found = baselines.Deann(scan, k=N, draws=5, seed=0)(x, t, own)
    torch.testing.assert_close(found.double(), oracle(all_images(store), x, t), rtol=2e-5, atol=2e-5)


def test_past_the_collapse_all_find_the_one_image(index: NeighbourIndex, scan) -> None:
    x, t, own = path_queries(index.store, 0.95)
    wanted = oracle(all_images(index.store), x, t)
    size = wanted.flatten(1).norm(dim=1)
    methods = {
        "halves": baselines.Halves(scan),
        "top": baselines.Top(scan, k=3),
        "draws": baselines.Draws(scan, draws=20, seed=0),
        "deann": baselines.Deann(scan, k=3, draws=20, seed=0),
        "snis": baselines.Snis(scan, k=3, draws=20, seed=0),
    }
    for name, method in methods.items():
        error = (method(x, t, own) - wanted).flatten(1).norm(dim=1) / size
        assert error.max() < 1e-5, name


def test_near_duplicates_are_told_apart(tmp_path: Path) -> None:
    """Two images two grey levels apart in one pixel, at t = .99: too near for the logits of a scan."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=generator).to(torch.uint8)
    pixels[7] = pixels[4]
    pixels[7, 1, 5, 6] ^= 2
    store = store_of(pixels, tmp_path)
    scan = baselines.Scan(store)
    own = torch.full((16,), 4)
    x = 0.01 * torch.randn(16, 3, 32, 32, generator=generator) + 0.99 * store.images(own)
    pair = store.images(torch.tensor([4, 7]))[:, 1, 5, 6]
    x[:, 1, 5, 6] = 0.99 * pair.mean() + 0.002 * torch.randn(16, generator=generator)  # between the two
    t = torch.full((16,), 0.99)
    wanted = oracle(all_images(store), x, t)[:, 1, 5, 6]
    methods = (
        (baselines.Halves(scan), 5e-3),
        (baselines.Top(scan, k=5), 5e-3),
        (baselines.Deann(scan, k=5, draws=20, seed=0), 5e-3),
        (baselines.Snis(scan, k=5, draws=4000, seed=0), 4 * 0.5 * 4000**-0.5),
    )
    for method, most in methods:
        # in units of a weight: u differs by gap / (1 - t) from one image to the other
        error = (method(x, t, own)[:, 1, 5, 6] - wanted).abs() * 0.01 / (pair[0] - pair[1]).abs()
        assert error.max() < most, type(method).__name__


@pytest.mark.parametrize("kind", ["Draws", "Deann", "Snis"])
def test_a_seed_fixes_the_draws(store: ImageStore, scan, kind: str) -> None:
    x, t, own = path_queries(store, 0.3)
    more = {} if kind == "Draws" else {"k": 5}
    one, same, other = (getattr(baselines, kind)(scan, draws=9, seed=s, **more)(x, t, own) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-3)
