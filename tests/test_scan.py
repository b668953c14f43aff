"""nearest_images against distances one by one in float64. The exact field is tested in test_velocity."""

from pathlib import Path

import pytest
import torch
from contract import CHANNELS, SIDE, D, N, all_images, pixels_of
from refusals import refused
from stores import store_of
from torch import Tensor

from nnflow.errors import InputError
from nnflow.pixels import PixelRows
from nnflow.scan import _top_by_expansion, nearest_images
from nnflow.store import ImageStore

SHAPE = (CHANNELS, SIDE, SIDE)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return store_of(pixels_of(200), tmp_path_factory.mktemp("scan"))


def queries(count: int, scale: float = 0.5, seed: int = 1) -> Tensor:
    return scale * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def distances_to(store: ImageStore, x: Tensor) -> Tensor:
    return (x.flatten(1).double()[:, None] - all_images(store)).norm(dim=2)


@pytest.mark.parametrize("k", [1, 7, 200])
@pytest.mark.parametrize("blocks", ["few", "many", "one"])
@pytest.mark.parametrize("scale", [0.5, 30.0])
def test_nearest_are_those_of_brute_force(store: ImageStore, k: int, blocks: str, scale: float) -> None:
    """Ties within float32 may fall either way: distances are compared, and that no image comes twice."""
    least = 170_000 if k == 200 else 40_000  # one query's 200 images by difference, or 39, and scores
    x = queries(13, scale)
    found = nearest_images(
        store, x, k, memory={"few": 2 * least + 1357, "many": least, "one": 1 << 30}[blocks]
    )
    wanted = distances_to(store, x)
    torch.testing.assert_close(wanted.gather(1, found.ids), wanted.sort(1).values[:, :k], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.distances.double(), wanted.gather(1, found.ids), rtol=1e-6, atol=0)
    assert (found.distances.diff(dim=1) >= 0).all()
    assert all(len(set(ids)) == k for ids in found.ids.tolist())


@pytest.mark.parametrize("k", [1, 2, 9])
def test_mirror_images_are_as_near_as_their_image(store: ImageStore, k: int) -> None:
    """Each image once, at the smaller of its two distances; among the queries mirrored copies."""
    x = torch.cat(
        [queries(20, 0.3), store.images(torch.tensor([3, 50])), store.images(torch.arange(4)).flip(-1)]
    )
    found = nearest_images(store, x, k, flip=True)
    as_it_is, mirrored = distances_to(store, x), distances_to(store, x.flip(-1))
    wanted = torch.minimum(as_it_is, mirrored).sort(1).values[:, :k]
    torch.testing.assert_close(found.distances.double(), wanted, rtol=1e-6, atol=1e-6)
    either = torch.where(found.mirrored, mirrored.gather(1, found.ids), as_it_is.gather(1, found.ids))
    torch.testing.assert_close(either, wanted, rtol=1e-6, atol=1e-6)
    assert all(len(set(ids)) == k for ids in found.ids.tolist())
    assert found.ids[-4:, 0].tolist() == [0, 1, 2, 3]
    assert found.mirrored[-4:, 0].all()
    assert not found.mirrored[20:22, 0].any()
    torch.testing.assert_close(found.images(store)[20:], x[20:])
    assert 2 < int(found.mirrored[:20, 0].sum()) < 18
    assert not nearest_images(store, x, k).mirrored.any()


@pytest.mark.parametrize("count", [1, 6, 7, 8, 33, N])
def test_any_number_of_images_against_a_block_of_seven(tmp_path: Path, count: int) -> None:
    few = store_of(pixels_of(count), tmp_path)
    x = queries(3)
    found = nearest_images(few, x, min(5, count), memory=4 * 7 * 4 * D * 12)
    small = nearest_images(few, x, 1, memory=2 * (8 * 42 * D + 8 * 100))
    ids = distances_to(few, x).argsort(1)
    assert torch.equal(found.ids, ids[:, :5])
    assert torch.equal(small.ids, ids[:, :1])


def test_distances_of_near_copies_are_taken_by_difference(store: ImageStore) -> None:
    """The expansion in float32 is off by about 1e-6 |x|^2 on a square of 1e-8: it would see nothing."""
    x = store.images(torch.arange(200))
    x[:, 1, 2, 3] += 1e-4
    found = nearest_images(store, x, 2)
    assert torch.equal(found.ids[:, 0], torch.arange(200))
    moved = (x.double() - all_images(store).view_as(x)).flatten(1).norm(dim=1)
    torch.testing.assert_close(found.distances[:, 0].double(), moved, rtol=1e-3, atol=0)


def test_one_grey_level_decides(tmp_path: Path) -> None:
    """Thirty images that differ from the query by 0, 1, 2 ... levels in one pixel of 3,072."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8).repeat(30, 1, 1, 1)
    order = torch.randperm(30, generator=generator)
    pixels[order, 1, 5, 6] = torch.arange(30, dtype=torch.uint8)
    near = store_of(pixels, tmp_path)
    found = nearest_images(near, near.images(order[:1]), 30, memory=16 << 20)
    assert torch.equal(found.ids[0], order)
    torch.testing.assert_close(found.distances[0], torch.arange(30) / 127.5, rtol=1e-5, atol=1e-7)


def test_images_of_any_contrast_compete_fairly(tmp_path: Path) -> None:
    """Faint images have the least norm: weighing it wrongly would let them crowd out the others."""
    generator = torch.Generator().manual_seed(4)
    contrast = torch.linspace(0, 1, 600).square()[:, None, None, None]
    noise = torch.randint(-127, 128, (600, *SHAPE), generator=generator)
    mixed = store_of((128 + contrast * noise).to(torch.uint8), tmp_path)
    x = mixed.images(torch.arange(400, 600))
    x += 0.1 * torch.randn(x.shape, generator=generator)
    found = nearest_images(mixed, x, 1)
    assert torch.equal(found.ids, distances_to(mixed, x).argmin(1)[:, None])


def test_copies_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    copies = store_of(pixels_of(3).repeat(12, 1, 1, 1), tmp_path)
    found = nearest_images(copies, copies.images(torch.tensor([2])), 24)
    assert found.ids[0, :12].tolist() == list(range(2, 36, 3))
    assert (found.distances[0, :12] == 0).all()
    assert (found.distances[0, 12:] == found.distances[0, 12]).all()
    assert found.distances[0, 12] > 0
    assert found.ids[0, 12:].tolist() == sorted(found.ids[0, 12:].tolist())


def test_an_answer_does_not_depend_on_its_batch_and_leaves_x_alone(store: ImageStore) -> None:
    x = queries(9)
    before = x.clone()
    together = nearest_images(store, x, 3)
    alone = [nearest_images(store, x[i : i + 1], 3) for i in range(9)]
    assert torch.equal(together.ids, torch.cat([one.ids for one in alone]))
    assert torch.equal(together.distances, torch.cat([one.distances for one in alone]))
    assert torch.equal(x, before)


def test_no_queries_have_no_neighbours(store: ImageStore) -> None:
    assert nearest_images(store, queries(0), 3).ids.shape == (0, 3)


def test_types_other_than_float32(store: ImageStore) -> None:
    x = queries(4)
    assert torch.equal(nearest_images(store, x.double(), 3).ids, nearest_images(store, x, 3).ids)
    assert not nearest_images(store, x.requires_grad_(), 3).distances.requires_grad


@pytest.mark.parametrize("k", [0, -1, 201])
def test_neighbours_that_are_not_there_are_refused(store: ImageStore, k: int) -> None:
    with refused(InputError, f"k = {k} neighbours: wanted 1 to the 200 images"):
        nearest_images(store, queries(2), k)


@pytest.mark.parametrize(
    "x", [queries(2)[:, :2], queries(2)[0], queries(2)[..., None], torch.full((2, *SHAPE), torch.nan)]
)
def test_wrong_queries_are_refused(store: ImageStore, x: Tensor) -> None:
    with refused(InputError, r"wanted finite values of shape \(S, 3, 4, 4\)"):
        nearest_images(store, x, 1)


def test_a_budget_below_one_query_is_refused(store: ImageStore) -> None:
    with refused(InputError, "too small"):
        nearest_images(store, queries(2), 1, memory=500)
    with refused(InputError, "one row of the scores"):
        nearest_images(store, queries(2), 1, memory=10_000)


def test_candidates_are_sought_where_the_queries_are() -> None:
    """On a device without memory, which refuses nothing: what comes back must be there as well."""
    rows = PixelRows(torch.zeros(300, 12, dtype=torch.uint8), "meta")
    places = _top_by_expansion(rows, torch.zeros(5, 12, device="meta"), 4, 1 << 16)
    assert (places.device.type, places.shape) == ("meta", (5, 4))
