"""Indexes larger than memory stay in their file: the same answers, and pages that go after a search."""

from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused

from nnflow import faiss_backend
from nnflow.errors import StoreError
from nnflow.faiss_backend import Held, faiss, lists_of, make_index, open_index, write_index
from nnflow.filemap import let_go_of, maps_of
from nnflow.index import NeighbourIndex
from nnflow.memory import machine_memory
from nnflow.store import ImageStore

MIB = 1 << 20
COUNT, RANK = 24_000, 64  # 6 MiB of vectors


def resident(what: str) -> int:
    """Bytes of this process: RssFile of mapped files, RssAnon of its own."""
    lines = Path("/proc/self/status").read_text().split("\n")
    return int(next(line for line in lines if line.startswith(what)).split()[1]) << 10


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COUNT, RANK)).astype(np.float32)


def written(kind: str, points: np.ndarray, folder: Path) -> Path:
    index = make_index(kind, RANK, len(points))
    if not index.is_trained:
        index.train(points[:4_000])
    index.add(points)
    if (lists := lists_of(index)) is not None:
        lists.nprobe = 6
    path = folder / "index.faiss"
    write_index(index, path)
    return path


KINDS = [
    "flat",
    "IVF64,Flat",
    "IVF64,PQ16x8",
    "IVF64,SQfp16",
    "PCA32,IVF64,Flat",
    "IVF64,PQ16x4,RFlat",
    "SQ8",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapped_index_finds_the_same_and_its_pages_go(
    kind: str, points: np.ndarray, tmp_path: Path
) -> None:
    path = written(kind, points, tmp_path)
    size, queries = path.stat().st_size, points[:50] + 0.1
    own = resident("RssAnon")
    mapped = open_index(path, memory=size - 1)
    assert resident("RssAnon") - own < MIB
    assert mapped.mapped
    assert "mapped, read from the file as it is searched" in mapped.reason
    whole = open_index(path, memory=size)
    assert not whole.mapped
    assert whole.reason.startswith("in memory: ")
    for rows in (None, slice(3_000, 5_000)):
        if rows is None:
            wanted, found = (held.vectors.search(queries, 20) for held in (whole, mapped))
        else:
            wanted, found = (
                faiss_backend.search_within(held.vectors, queries, 20, rows) for held in (whole, mapped)
            )
        for one, other in zip(wanted, found, strict=True):
            assert np.array_equal(one, other)
    read = resident("RssFile")
    mapped.let_go()
    if size > 2 * MIB:
        assert read - resident("RssFile") > 0.2 * size
    assert np.array_equal(mapped.vectors.search(queries, 20)[1], whole.vectors.search(queries, 20)[1])


def test_by_default_half_of_the_machine_decides(
    points: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written("flat", points[:100], tmp_path)
    held = open_index(path)
    assert not held.mapped
    assert "half of the machine's memory" in held.reason
    monkeypatch.setattr(faiss_backend, "machine_memory", lambda: 2 * path.stat().st_size - 2)
    assert open_index(path).mapped
    assert machine_memory() > MIB


@pytest.mark.parametrize("kind", ["IVF64,Flat", "flat"])
def test_an_older_faiss_maps_lists(
    kind: str, points: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(kind, points, tmp_path)
    monkeypatch.delattr(faiss, "IO_FLAG_MMAP_IFC")
    held = open_index(path, memory=1)
    wanted = faiss.read_index(str(path)).search(points[:9], 5)
    assert np.array_equal(held.vectors.search(points[:9], 5)[1], wanted[1])


def test_a_damaged_file_is_refused_mapped_too(tmp_path: Path) -> None:
    path = tmp_path / "index.faiss"
    path.write_bytes(b"nonsense" * 50)
    with refused(StoreError, r"index\.faiss: faiss cannot read it; build the index again"):
        open_index(path, memory=1)


def test_maps_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a map"
    np.arange(1 << 16, dtype=np.uint8).tofile(path)
    assert maps_of(path) == ()
    held = np.memmap(path, np.uint8, "r")
    ((first, end),) = maps_of(path)
    assert first == held.ctypes.data
    assert end - first == 1 << 16
    let_go_of(maps_of(path))
    assert np.array_equal(held, np.arange(1 << 16, dtype=np.uint8))


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_an_index_opened_in_too_little_memory_answers_alike(kind: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(256, size=(400, 8, 8, 1), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    store = ImageStore.build(tmp_path / "images.npy", tmp_path / "out", size=8, grey=True)
    built = NeighbourIndex.build(store, tmp_path / "out", rank=16, kind=kind)
    assert built.held == Held(built.held.vectors, False, "in memory, where it was built")
    whole, mapped = NeighbourIndex.open(tmp_path / "out"), NeighbourIndex.open(tmp_path / "out", memory=1)
    assert (whole.held.mapped, mapped.held.mapped) == (False, True)
    x = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for one, other in zip(whole.search(x, 7), mapped.search(x, 7), strict=True):
        assert torch.equal(one, other)
    wanted, found = (index.candidates(x.flatten(1), 7, slice(50, 300)) for index in (whole, mapped))
    assert torch.equal(wanted.ids, found.ids)
    assert torch.equal(wanted.beyond, found.beyond)
