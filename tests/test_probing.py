"""How many lists are searched: recall against a sort in float64; which kind suits how many images."""

from typing import Any

import numpy as np
import pytest
import torch
from contract import all_images
from stores import store_of
from torch import Tensor

from nnflow import calibrating, measuring, probing
from nnflow.calibrating import calibrate
from nnflow.errors import InputError
from nnflow.faiss_backend import Choice, choose_kind, lists_of, make_index, search_lists
from nnflow.index import NeighbourIndex
from nnflow.memory import parse_bytes
from nnflow.pixels import PixelRows
from nnflow.planned import support_of
from nnflow.probing import Probing, set_probes
from nnflow.store import ImageStore

N, LISTS = 900, 23
WHOLE = slice(0, N)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """Photo-like images: no clusters that would make one list enough."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(N, 3, 3, 3, generator=generator)
    images = 128 + 50 * torch.nn.functional.interpolate(coarse, 8, mode="bilinear")
    return store_of(images.clamp(0, 255).to(torch.uint8), tmp_path_factory.mktemp("probing"))


@pytest.fixture(scope="module")
def index(store: ImageStore) -> NeighbourIndex:
    return NeighbourIndex.build(store, store.folder, rank=24, kind=f"IVF{LISTS},Flat")


def recall_by_hand(index: NeighbourIndex, probes: int) -> float:
    """Images in the `probes` lists nearest to each query, the rest in float64 from coordinates and a sort."""
    inner = lists_of(index._vectors)
    centres = inner.quantizer.reconstruct_n(0, inner.nlist)
    coordinates = index.embedding(all_images(index.store).float()).double()
    home = torch.from_numpy(((coordinates.numpy()[:, None] - centres) ** 2).sum(2)).argmin(1)
    queries, gain = probing._queries(index.store, index.embedding, 0)
    shares = []
    for query, factor in zip(torch.from_numpy(queries).double(), gain, strict=True):
        squares = (coordinates - query).square().sum(1)
        nearest = squares.argsort()[:100]
        weights = (-0.5 * factor * squares[nearest]).softmax(0)
        searched = torch.from_numpy(((query.numpy() - centres) ** 2).sum(1)).argsort()[:probes]
        shares.append(weights[torch.isin(home[nearest], searched)].sum().item())
    return sum(shares) / len(shares)


def test_recall_is_the_weight_found(index: NeighbourIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = index._vectors
    for wanted in (0.5, 0.9, 0.99):
        monkeypatch.setattr(probing, "_RECALL", wanted)
        found = set_probes(vectors, index.store, index.embedding, 0)
        assert found is not None
        assert found.probes == lists_of(vectors).nprobe
        # Images that are found only because all 100 places are not taken by nearer ones count as found.
        assert found.recall >= wanted
        assert found.recall == pytest.approx(recall_by_hand(index, found.probes), abs=0.01)
        if found.probes > 1:
            assert recall_by_hand(index, found.probes // 2) < wanted


def test_what_was_measured_is_kept(index: NeighbourIndex, store: ImageStore) -> None:
    kept = NeighbourIndex.open(store.folder)
    found = Probing(**kept.manifest["probing"])
    assert found.lists == LISTS
    assert found.recall >= 0.999
    assert found.probes & (found.probes - 1) == 0 or found.probes == LISTS
    assert lists_of(kept._vectors).nprobe == found.probes


def test_an_index_without_lists(store: ImageStore, index: NeighbourIndex) -> None:
    flat = make_index("flat", 3, N)
    flat.add(np.zeros((4, 3), np.float32))
    assert set_probes(flat, store, index.embedding, 0) is None


@pytest.mark.parametrize(
    ("kind", "count", "memory", "wanted"),
    [
        ("auto", 200_000, "64MiB", "flat"),
        ("auto", 200_001, "1GiB", "ivf"),
        ("auto", 1_281_167, "1GiB", "ivf"),
        ("auto", 10_000_000, "1GiB", "ivfpq"),
        ("Flat", 10, "1GiB", "flat"),
        ("ivf", 10, "1GiB", "ivf"),
        ("IVF16,SQ8", 10, "1GiB", "IVF16,SQ8"),
    ],
)
def test_the_kind_that_suits(kind: str, count: int, memory: str, wanted: str) -> None:
    choice = choose_kind(kind, 128, count, parse_bytes(memory))
    assert choice.kind == wanted
    assert (choice == Choice(wanted, "as asked")) == (kind != "auto")


def test_the_reason_names_the_numbers() -> None:
    assert "200,000" in choose_kind("auto", 128, 5, 1).reason
    choice = choose_kind("auto", 128, 10_000_000, parse_bytes("1GiB"))
    assert choice.reason == "vectors of 4.8 GiB are more than the 1.0 GiB of memory"


@pytest.mark.parametrize(("rank", "parts"), [(128, 32), (24, 6), (25, 5), (7, 1), (3, 1)])
def test_a_product_quantiser_divides_the_coordinates(rank: int, parts: int) -> None:
    vectors = make_index("ivfpq", rank, 10_000)
    assert lists_of(vectors).code_size == parts
    assert lists_of(vectors).nlist == 256


def test_what_the_index_finds_by_itself_is_calibrated(
    store: ImageStore, index: NeighbourIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "LADDERS", ("64/30",))
    monkeypatch.setattr(calibrating, "_ALWAYS", {"index/8"})  # not only where no other is found cheaper
    monkeypatch.setattr(calibrating, "_TIMES", (0.005, 0.9))
    monkeypatch.setattr(calibrating, "_COLLAPSE", ())
    table = calibrate(index, queries=64, seconds=1.0)
    late = {entry.ladder: entry for entry in table.entries if entry.t == 0.9}
    early = {entry.ladder for entry in table.entries if entry.t == 0.005}
    assert "index/8" in late
    assert late["index/8"].held_in.upper < 0.01
    assert not early & set(measuring.SEARCHES)
    exact = support_of("exact", index, PixelRows(store.pixels), 1 << 28)
    found = support_of("index/8", index, PixelRows(store.pixels), 1 << 28)
    x = 0.1 * torch.randn(5, store.pixels.shape[1]) + 0.9 * store.images(torch.arange(5)).flatten(1)
    t = torch.full((5,), 0.9)
    means = [way.part(x, t, slice(0, N)).weighted.mean for way in (found, exact)]
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-4)
    assert found.part(x, t, slice(0, N)).ladders == ("index/8",) * 5


def homes(index: NeighbourIndex) -> tuple[Tensor, Tensor]:
    """Centres of the lists, float64, and which of them each image is nearest to."""
    inner = lists_of(index._vectors)
    centres = torch.from_numpy(inner.quantizer.reconstruct_n(0, inner.nlist)).double()
    coordinates = index.embedding(all_images(index.store).float()).double()
    return centres, torch.cdist(coordinates, centres).argmin(1)


@pytest.mark.parametrize("lists", [1, 2, 8])
def test_a_search_of_few_lists_finds_what_is_in_them(index: NeighbourIndex, lists: int) -> None:
    centres, home = homes(index)
    x = index.store.images(torch.arange(0, N, 9)).flatten(1)
    x += 2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    name = f"index/6 in {lists} lists"
    part = support_of(name, index, index.store.rows(), 1 << 28).part(x, torch.full((len(x),), 0.9), WHOLE)
    nearest = torch.cdist(index.embedding(x / 0.9).double(), centres).topk(lists, largest=False).indices
    inside = (home[part.ids.clamp_min(0)][:, :, None] == nearest[:, None]).any(2) | (part.ids < 0)
    assert inside.all()
    assert part.ladders == (name,) * len(x)
    assert part.log_tail.isposinf().all()
    whole = support_of("index/6", index, index.store.rows(), 1 << 28)
    assert (whole.part(x, torch.full((len(x),), 0.9), WHOLE).ids != part.ids).any(), "all lists were searched"


def test_where_few_lists_are_empty_more_are_searched(
    index: NeighbourIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, t = index.store.images(torch.arange(40)).flatten(1), torch.full((40,), 0.9)
    wanted = support_of("index/6", index, index.store.rows(), 1 << 28).part(x, t, WHOLE).ids

    def lost(vectors: Any, queries: np.ndarray, k: int, lists: int) -> tuple[np.ndarray, np.ndarray]:
        squares, ids = search_lists(vectors, queries, k, lists)
        ids[::3] = -1
        return squares, ids

    few = support_of("index/6 in 2 lists", index, index.store.rows(), 1 << 28)
    found = few.part(x, t, WHOLE).ids
    monkeypatch.setattr("nnflow.index.search_lists", lost)
    again = few.part(x, t, WHOLE).ids
    assert torch.equal(again[::3], wanted[::3])
    assert torch.equal(again[1::3], found[1::3])


def test_no_more_lists_are_tried_than_are_searched_anyway(
    index: NeighbourIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    for probes, wanted in ((16, measuring.SEARCHES), (8, ("index/8 in 2 lists", *measuring.SEARCHES[2:]))):
        monkeypatch.setitem(index.manifest["probing"], "probes", probes)
        ways = measuring.Bench(index, None, 1 << 28, 0).ways
        assert [name for name in ways if name.startswith("index")] == list(wanted)


@pytest.mark.parametrize("name", ["index/", "index/x", "index/8/8", "nearest/8", "index/8 in lists"])
def test_no_such_way(index: NeighbourIndex, name: str) -> None:
    with pytest.raises(InputError, match="ladder"):
        support_of(name, index, PixelRows(index.store.pixels), 1 << 28)
