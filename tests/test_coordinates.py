"""The coordinates in bytes: logits against distances in float64, what rounding may do, the file."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import all_images
from logits import logits_of
from refusals import refused
from stores import store_of
from torch import Tensor

from nnflow import integers
from nnflow.coordinates import CoordinateFile, Coordinates, edges_of
from nnflow.errors import StoreError
from nnflow.fitting import fit_embedding
from nnflow.index import NeighbourIndex
from nnflow.laidout import LaidOut, Rows
from nnflow.products import Buffer, scores_of

N = 150


def smooth(count: int = N) -> Tensor:
    """Images of 8 x 8 whose principal coordinates are ever shorter."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 3, 3, generator=generator)
    fine = 8 * torch.randn(count, 3, 8, 8, generator=generator)
    images = 128 + 60 * torch.nn.functional.interpolate(coarse, 8, mode="bilinear") + fine
    return images.round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Coordinates, Tensor]:
    """Coordinates as bytes, and before."""
    store = store_of(smooth(), tmp_path_factory.mktemp("coordinates"))
    embedding = fit_embedding(store, rank=20, budget=1 << 30)
    z = embedding.project(all_images(store).float())
    return Coordinates(Coordinates.empty(embedding).encoded(z), embedding), z


def test_edges_double_up_to_all() -> None:
    assert edges_of(512) == (32, 64, 128, 256, 512)
    assert edges_of(33) == (32, 33)
    assert edges_of(32) == (32,)
    assert edges_of(5) == (5,)


@pytest.mark.parametrize("time", [0.0, 0.004, 0.1, 0.3, 0.7, 0.95, 0.99])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_products_give_logits(projected: tuple[Coordinates, Tensor], time: float, place: int) -> None:
    """Against |y - t z|^2 term by term, z as held in bytes, y not rounded at all."""
    coordinates, _ = projected
    rank = coordinates.edges[place]
    z = coordinates.values(coordinates.rows)[:, :rank].double()
    generator = torch.Generator().manual_seed(2)
    t = torch.full((7,), time)
    y = (1 - time) * torch.randn(7, rank, generator=generator) + time * z[:7].float()
    squares = (y.double()[:, None] - time * z).square().sum(2)
    wanted = -(squares - y.double().square().sum(1)[:, None]) / (2 * (1 - time) ** 2)
    row, fall = coordinates.query(y, t)
    scores = scores_of(
        row,
        fall,
        coordinates.scanned(slice(0, len(coordinates.rows)), budget=1 << 30),
        coordinates.squares(rank),
        Buffer(),
    )
    found = logits_of(scores)
    allowed = 0.504 * scores.unit * coordinates.widest(rank)
    assert ((found - wanted).abs() <= allowed[:, None] + 1e-6 * wanted.abs().amax() + 1e-12).all()
    assert ((found - wanted).abs().mean(1) <= 0.1 * allowed + 1e-6 * wanted.abs().amax()).all()


def test_bytes_hold_coordinates_to_half_a_step(projected: tuple[Coordinates, Tensor]) -> None:
    coordinates, z = projected
    held = coordinates.values(coordinates.rows)
    assert ((held - z).abs() <= 0.501 * coordinates.steps).all()
    for rank in coordinates.edges:
        moved = (held - z)[:, :rank].double().norm(dim=1)
        assert 0.3 * coordinates.rounding(rank) < moved.max() <= coordinates.rounding(rank)
    # a step of its own for each of the first 64; of these every byte is used
    assert (coordinates.rows[:, :64].abs().amax(0) == 127).all()
    assert len(coordinates.steps[64:].unique()) == 1
    assert coordinates.rows[:, 64:].abs().max() == 127


def test_sums_over_the_coordinates(
    projected: tuple[Coordinates, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnflow.coordinates._BLOCK_ROWS", 40)
    coordinates, _ = projected
    fresh = Coordinates(coordinates.rows, coordinates.embedding)
    z = fresh.values(fresh.rows).double()
    for rank in fresh.edges:
        torch.testing.assert_close(
            fresh.squares(rank).double(), z[:, :rank].square().sum(1), rtol=1e-5, atol=0
        )
        assert fresh.widest(rank) == fresh.rows[:, :rank].long().abs().sum(1).max()


def test_all_images_are_laid_out_once_and_only_within_the_budget(
    projected: tuple[Coordinates, Tensor],
) -> None:
    coordinates, _ = projected
    fresh = Coordinates(coordinates.rows, coordinates.embedding)
    every, size = slice(0, len(fresh.rows)), fresh.rows.nbytes
    kept = fresh.scanned(every, size)
    assert isinstance(kept, LaidOut) == bool(integers.factor_levels())
    assert (fresh.scanned(every, size) is kept) == bool(integers.factor_levels())
    assert type(fresh.scanned(every, size - 1)) is Rows
    part = fresh.scanned(slice(20, 90), size)
    assert type(part) is Rows
    assert torch.equal(part.rows, fresh.rows[20:90])


def test_images_all_alike(tmp_path: Path) -> None:
    store = store_of(torch.full((40, 1, 3, 3), 77, dtype=torch.uint8), tmp_path)
    index = NeighbourIndex.build(store, store.folder, rank=3)
    assert index.coordinates.steps.isfinite().all()
    assert index.coordinates.values(index.coordinates.rows).abs().max() < 1e-5


class TestFile:
    def test_what_was_written_is_read(self, projected: tuple[Coordinates, Tensor], tmp_path: Path) -> None:
        coordinates, _ = projected
        path = tmp_path / "c.npy"
        with CoordinateFile(path, *coordinates.rows.shape) as held:
            held.put(100, coordinates.rows[100:])
            held.put(0, coordinates.rows[:40])
        with CoordinateFile(path, *coordinates.rows.shape) as held:  # goes on where that one stopped
            held.put(40, coordinates.rows[40:100])
            held.sync()
        again = Coordinates.open(path, coordinates.embedding, N)
        assert torch.equal(again.rows, coordinates.rows)
        np.save(tmp_path / "d.npy", coordinates.rows.numpy())
        assert path.read_bytes() == (tmp_path / "d.npy").read_bytes()

    def test_a_full_disk_is_told_before_the_work_and_gets_its_room_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As ext4 does it: what room there was is taken, then the rest is refused."""

        def full(descriptor: int, start: int, size: int) -> None:
            os.ftruncate(descriptor, size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        with refused(StoreError, r"writing .*c\.npy: no space left on device; free space"):
            CoordinateFile(tmp_path / "c.npy", 1000, 512)
        assert (tmp_path / "c.npy").stat().st_size == 0

    @pytest.mark.parametrize(
        "content",
        [b"", b"PK\3\4", np.zeros(3).tobytes(), b"\x93NUMPY\x01\x00"],
    )
    def test_foreign_or_cut(
        self, projected: tuple[Coordinates, Tensor], tmp_path: Path, content: bytes
    ) -> None:
        path = tmp_path / "c\n.npy"
        path.write_bytes(content)
        with refused(StoreError, r"c\\n\.npy: not readable coordinates .*build the index again"):
            Coordinates.open(path, projected[0].embedding, N)

    def test_of_other_images(self, projected: tuple[Coordinates, Tensor], tmp_path: Path) -> None:
        coordinates, _ = projected
        path = tmp_path / "c.npy"
        np.save(path, coordinates.rows.numpy())
        with refused(StoreError, r"wanted int8 \(151, "):
            Coordinates.open(path, coordinates.embedding, N + 1)
        np.save(path, coordinates.rows.float().numpy())
        with refused(StoreError, "float32 of shape"):
            Coordinates.open(path, coordinates.embedding, N)


def test_the_index_holds_the_coordinates_of_its_images(tmp_path: Path) -> None:
    store = store_of(smooth(90)[:, :, ::2, ::2], tmp_path)
    index = NeighbourIndex.build(store, store.folder, rank=3)
    principal = index.embedding.principal.double()
    wanted = (all_images(store) - index.embedding.mean.double()) @ principal.T
    found = index.coordinates.values(index.coordinates.rows).double()
    assert ((found - wanted).abs() <= 0.501 * index.coordinates.steps).all()
    assert index.coordinates.rank == 48
    assert index.rank == 3
