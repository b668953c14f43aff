"""The coordinate matrix: one bfloat16 product gives logits; the file; the rounding it may and may not do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from contract import all_images
from refusals import refused
from stores import store_of
from torch import Tensor

from nnflow.coordinates import Coordinates, columns_of, edges_of, encoded, written
from nnflow.embedding import fit_embedding
from nnflow.errors import StoreError
from nnflow.index import NeighbourIndex

R = 100


def some(count: int = 50, rank: int = R, seed: int = 0) -> Tensor:
    """Coordinates as of images: the first long, the others ever shorter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rank, generator=generator) * (15 / torch.arange(1, rank + 1).sqrt())


@pytest.fixture(scope="module")
def coordinates(tmp_path_factory: pytest.TempPathFactory) -> Coordinates:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (150, 3, 8, 8), generator=generator, dtype=torch.uint8)
    store = store_of(pixels, tmp_path_factory.mktemp("coordinates"))
    embedding = fit_embedding(store, rank=20, budget=1 << 30)
    return Coordinates(encoded(embedding.project(all_images(store).float())), embedding)


def test_edges_double_up_to_all() -> None:
    assert edges_of(512) == (32, 64, 128, 256, 512)
    assert edges_of(33) == (32, 33)
    assert edges_of(32) == (32,)
    assert edges_of(5) == (5,)


@pytest.mark.parametrize("time", [0.0, 0.004, 0.1, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_one_product_gives_logits(coordinates: Coordinates, time: float, place: int) -> None:
    """Against |y - t z|^2 term by term, z as rounded to 8 bits, y not: the product may lose no more."""
    rank = coordinates.edges[place]
    z = coordinates.values(coordinates.rows.float())[:, :rank].double()
    generator = torch.Generator().manual_seed(2)
    t = torch.full((7,), time)
    y = (1 - time) * torch.randn(7, rank, generator=generator) + time * z[:7].float()
    squares = (y.double()[:, None] - time * z).square().sum(2)
    wanted = -(squares - y.double().square().sum(1)[:, None]) / (2 * (1 - time) ** 2)
    shift = wanted.amax(1)
    row = coordinates.query(y, t, shift)
    assert row.shape[1] == coordinates.width(rank)
    # in float64: what the rows hold; and the product as it is taken, rounded to 8 bits
    held = row.double() @ coordinates.rows[:, : row.shape[1]].double().T
    gain = time / (1 - time) ** 2
    scale = gain * (y.double().norm(dim=1) * z.norm(dim=1).max())[:, None]
    assert (
        (held - (wanted - shift[:, None])).abs() <= 2**-9 * scale + 1e-6 * shift[:, None].abs() + 1e-9
    ).all()
    taken = (row @ coordinates.rows[:, : row.shape[1]].T).double()
    assert ((taken - held).abs() <= 2**-8 * held.abs() + 1e-4 * (1 + scale)).all()


def test_the_head_of_a_query_keeps_sixteen_bits(coordinates: Coordinates) -> None:
    """A first coordinate of 100 that is rounded to 8 bits is off by up to 0.25."""
    y = torch.zeros(1, coordinates.edges[0])
    y[0, 0] = 100.3
    row = coordinates.query(y, torch.tensor([0.5]), torch.zeros(1).double()).double()
    z = torch.zeros(1, coordinates.rank)
    z[0, 0] = 1.0
    product = (row @ encoded(z)[:, : row.shape[1]].double().T).item()
    assert product == pytest.approx(2 * (100.3 - 0.5 * 1 / 2), abs=2e-3)


def test_values_are_what_was_encoded() -> None:
    z = some()
    store_free = Coordinates.__new__(Coordinates)
    store_free.edges = edges_of(R)
    assert torch.equal(store_free.values(encoded(z).float()), z.bfloat16().float())
    for edge in store_free.edges:
        cut = encoded(z)[:, : store_free.width(edge)].float()
        assert torch.equal(store_free.values(cut), z[:, :edge].bfloat16().float())
    assert encoded(z).shape[1] == columns_of(R) == store_free.width(R)


class TestFile:
    def test_what_was_written_is_read(self, coordinates: Coordinates, tmp_path: Path) -> None:
        path = tmp_path / "c.npy"
        count, width = coordinates.rows.shape
        with written(path, count, coordinates.rank) as held:
            held[:] = coordinates.rows.view(torch.uint16).numpy()
            assert not path.exists()
        again = Coordinates.open(path, coordinates.embedding, count)
        assert torch.equal(again.rows, coordinates.rows)
        assert path.stat().st_size == 2 * count * width + 128

    def test_a_write_that_fails_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), written(tmp_path / "c.npy", 10, 32):
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "content",
        [b"", b"PK\3\4", np.zeros(3).tobytes(), b"\x93NUMPY\x01\x00"],
    )
    def test_foreign_or_cut(self, coordinates: Coordinates, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "c\n.npy"
        path.write_bytes(content)
        with refused(StoreError, r"c\\n\.npy: not readable coordinates .*build the index again"):
            Coordinates.open(path, coordinates.embedding, 150)

    def test_of_other_images(self, coordinates: Coordinates, tmp_path: Path) -> None:
        path = tmp_path / "c.npy"
        np.save(path, coordinates.rows.view(torch.uint16).numpy())
        with refused(StoreError, r"wanted uint16 \(151, "):
            Coordinates.open(path, coordinates.embedding, 151)
        np.save(path, coordinates.rows.float().numpy())
        with refused(StoreError, "float32 of shape"):
            Coordinates.open(path, coordinates.embedding, 150)


def test_the_index_holds_the_coordinates_of_its_images(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (90, 3, 4, 4), generator=generator, dtype=torch.uint8)
    store = store_of(pixels, tmp_path)
    index = NeighbourIndex.build(store, store.folder, rank=3)
    principal = index.embedding.principal.double()
    wanted = (all_images(store) - index.embedding.mean.double()) @ principal.T
    found = index.coordinates.values(index.coordinates.rows.float()).double()
    torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-5)
    assert index.coordinates.rank == 48
    assert index.rank == 3


@pytest.mark.parametrize("time", [0.03, 0.137, 0.71])
def test_squared_norms_keep_sixteen_bits(time: float) -> None:
    """A query at the mean: its logits are -gain t |z|^2 / 2 and nothing else."""
    z = some()
    free = Coordinates.__new__(Coordinates)
    free.edges = edges_of(R)
    row = free.query(torch.zeros(1, R), torch.tensor([time]), torch.zeros(1).double()).double()
    found = (row @ encoded(z).double().T)[0]
    wanted = -0.5 * (time / (1 - time)) ** 2 * z.bfloat16().double().square().sum(1)
    torch.testing.assert_close(found, wanted, rtol=2**-14, atol=0)
