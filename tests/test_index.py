"""NeighbourIndex: searches against brute force in float64, and a folder that opens whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import all_images, pixels_of
from refusals import refused
from stores import store_of
from torch import Tensor

from nnflow import building, faiss_backend
from nnflow import index as module
from nnflow.errors import BusyError, DegradedWarning, InputError, StoreError
from nnflow.faiss_backend import faiss
from nnflow.files import file_mark, folder_lock, write_json
from nnflow.index import NeighbourIndex
from nnflow.store import ImageStore

N = 400
NAMES = ["ant"] * 90 + ["bee"] * 250 + ["cat"] * 60
PARTS = ("images.h5", "embedding.safetensors", "coordinates.npy", "index.faiss")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return store_of(pixels_of(N), tmp_path_factory.mktemp("index"), classes=NAMES)


def queries(count: int, scale: float = 1.0, seed: int = 1) -> Tensor:
    return scale * torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def build(store: ImageStore, rank: int | str = 12, kind: str = "flat", **other: int) -> NeighbourIndex:
    return NeighbourIndex.build(store, store.folder, rank=rank, kind=kind, **other)  # type: ignore[arg-type]


def coordinates(index: NeighbourIndex, x: Tensor) -> Tensor:
    """Of x (B, ...), in float64 from the map itself."""
    centred = x.flatten(1).double() - index.embedding.mean.double()
    directions = index.embedding.directions
    return centred if directions is None else centred @ directions.double().T


def squares_to(index: NeighbourIndex, x: Tensor) -> Tensor:
    """Squared distances in the coordinates to every stored image, one by one in float64."""
    stored = coordinates(index, all_images(index.store))
    return (coordinates(index, x)[:, None] - stored).square().sum(2)


def nearest_of(squares: Tensor, ids: Tensor, slack: Tensor | float = 0.0) -> bool:
    """Whether `ids` are the nearest by `squares`, up to ties and `slack`: no one left out is nearer."""
    mine = squares.gather(1, ids).amax(1)
    others = squares.scatter(1, ids, torch.inf).amin(1)
    distinct = all(len(set(row)) == ids.shape[1] for row in ids.tolist())
    return distinct and bool((mine <= others + slack).all())


class TestSearch:
    @pytest.mark.parametrize("k", [1, 7, N])
    @pytest.mark.parametrize("scale", [0.3, 3.0])
    def test_pixels_and_flat_give_the_true_neighbours(self, store: ImageStore, k: int, scale: float) -> None:
        x = queries(17, scale)
        ids, distances = build(store, "pixels").search(x, k)
        wanted = (x.flatten(1).double()[:, None] - all_images(store)).norm(dim=2)
        assert nearest_of(wanted, ids, 1e-5)
        torch.testing.assert_close(distances.double(), wanted.gather(1, ids), rtol=1e-6, atol=0)
        assert (distances.diff(dim=1) >= 0).all()

    @pytest.mark.parametrize("rank", [1, 12, 48])
    def test_coordinates_choose_and_pixels_order(self, store: ImageStore, rank: int) -> None:
        x, index = queries(17), build(store, rank)
        ids, distances = index.search(x, 9)
        assert nearest_of(squares_to(index, x), ids, 1e-4)
        wanted = (x.flatten(1).double()[:, None] - all_images(store)).norm(dim=2).gather(1, ids)
        torch.testing.assert_close(distances.double(), wanted, rtol=1e-6, atol=0)
        assert (distances.diff(dim=1) >= 0).all()

    def test_an_image_is_its_own_neighbour_at_no_distance(self, store: ImageStore) -> None:
        ids, distances = build(store).search(store.images(torch.arange(N)), 1)
        assert torch.equal(ids[:, 0], torch.arange(N))
        assert (distances == 0).all()

    @pytest.mark.parametrize("rows", [None, slice(0, 90), slice(90, 340), slice(340, 400), slice(5, 6)])
    def test_the_flat_scan_is_faiss_own_search(self, store: ImageStore, rows: slice | None) -> None:
        x, index = queries(33), build(store)
        k = 1 if rows == slice(5, 6) else 6
        found = index.candidates(x.flatten(1), k, rows)
        points = index.embedding(x.flatten(1)).numpy()
        selector = faiss.IDSelectorRange(*(rows.start, rows.stop) if rows else (0, N))
        _, ids = index._vectors.search(points, k, params=faiss.SearchParameters(sel=selector))
        squares = squares_to(index, x)
        theirs = squares.gather(1, torch.from_numpy(ids)).sort(1).values
        torch.testing.assert_close(squares.gather(1, found.ids).sort(1).values, theirs, rtol=1e-5, atol=1e-5)
        if rows:
            assert ((found.ids >= rows.start) & (found.ids < rows.stop)).all()

    def test_queries_in_chunks_are_queries_at_once(
        self, store: ImageStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, index = queries(33).flatten(1), build(store)
        whole = index.candidates(x, 6)
        for scores in (1, 2 * N, 5 * N + 1):
            monkeypatch.setattr(module, "_SCORES", scores)
            some = index.candidates(x, 6)
            assert torch.equal(some.ids.sort(1).values, whole.ids.sort(1).values)
            torch.testing.assert_close(some.beyond, whole.beyond, rtol=1e-6, atol=1e-4)

    @pytest.mark.parametrize("rank", [1, 3, 12, "pixels"])
    @pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
    @pytest.mark.parametrize("seed", range(3))
    def test_no_image_left_out_is_nearer_than_beyond(
        self, store: ImageStore, rank: int | str, scale: float, seed: int
    ) -> None:
        """With queries as large as x / t at t = .01 and beyond: float32 rounds them by whole units."""
        index = build(store, rank)
        x = queries(200, scale, seed)
        x[:50] += 0.5 * store.images(torch.arange(50))
        squares = squares_to(index, x)
        for k in (1, 5, N - 1):
            for rows in (slice(0, N), slice(90, 340)):
                some = min(k, rows.stop - rows.start - 1)
                found = index.candidates(x.flatten(1), some, rows)
                others = squares.scatter(1, found.ids, torch.inf)[:, rows].amin(1)
                assert (found.beyond <= others).all()
        # and is not so low that it says nothing
        tight = index.candidates(x.flatten(1), 5)
        reach = squares.amax(1).sqrt() + index.embedding.radius
        kth = squares.gather(1, tight.ids).amax(1)
        whole = (x.flatten(1) - index.embedding.mean).norm(dim=1).double()
        assert (kth - tight.beyond <= 1e-5 * reach * (reach + whole)).all()

    def test_the_answer_is_not_differentiable_and_x_is_left_alone(self, store: ImageStore) -> None:
        for kind in ("flat", "ivf"):
            x = queries(3).requires_grad_()
            before = x.detach().clone()
            ids, distances = build(store, kind=kind).search(x, 4)
            assert not distances.requires_grad
            assert torch.equal(x.detach(), before)
            assert ids.dtype == torch.int64

    def test_no_queries_have_no_neighbours(self, store: ImageStore) -> None:
        for kind in ("flat", "ivf"):
            ids, distances = build(store, kind=kind).search(queries(0), 4)
            assert ids.shape == distances.shape == (0, 4)


class TestApproximate:
    @pytest.mark.parametrize("kind", ["ivf", "IVF4,SQfp16", "HNSW8", "PQ4x4", "SQ8", "PCA8,IVF4,Flat"])
    def test_most_neighbours_are_found_and_nothing_is_promised(self, store: ImageStore, kind: str) -> None:
        index = build(store, 12, kind)
        assert not index.exact
        x = store.images(torch.arange(0, N, 7)) + queries(58, 0.02)
        found = index.candidates(x.flatten(1), 10)
        assert found.beyond.isneginf().all()
        own = (found.ids == torch.arange(0, N, 7)[:, None]).any(1)
        assert own.float().mean() > 0.9
        ids, distances = index.search(x, 10)
        there = ids >= 0
        wanted = (x.flatten(1).double()[:, None] - all_images(store)).norm(dim=2)
        torch.testing.assert_close(
            distances[there].double(), wanted.gather(1, ids.clamp_min(0))[there], rtol=1e-6, atol=0
        )
        finite = distances.nan_to_num(posinf=1e9)
        assert (finite.diff(dim=1) >= 0).all()

    @pytest.mark.parametrize("kind", ["ivf", "IVF4,SQfp16", "HNSW8", "PCA8,IVF4,Flat", "IVF4,PQ4x4,RFlat"])
    @pytest.mark.parametrize("label", [0, 1, 2])
    def test_candidates_within_a_class(self, store: ImageStore, kind: str, label: int) -> None:
        index, rows = build(store, 12, kind), store.class_rows(label)
        ids = index.candidates(queries(40).flatten(1), 5, rows).ids
        assert ((ids >= rows.start) & (ids < rows.stop)).all()

    def test_a_kind_that_cannot_search_within_a_class_says_so(self, store: ImageStore) -> None:
        index = build(store, 12, "PQ4x4")
        with refused(InputError, "cannot search within one class"):
            index.candidates(queries(2).flatten(1), 5, slice(0, 90))

    def test_what_an_index_does_not_find_is_no_image_at_distance_infinity(self, store: ImageStore) -> None:
        index = build(store, 12, "IVF40,Flat")
        index._vectors.nprobe = 1
        ids, distances = index.search(queries(30), 100)
        missing = ids == -1
        assert missing.any(1).all()
        assert (~missing).any(1).all()
        assert torch.equal(distances.isposinf(), missing)

    def test_holes_anywhere_in_an_answer(self, store: ImageStore) -> None:
        class Holes:
            def search(self, points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
                ids = np.array([[-1, 7, -1, 3]], dtype=np.int64).repeat(len(points), 0)
                return np.zeros(ids.shape, np.float32), ids

        index = build(store, 12, "ivf")
        index._vectors = Holes()
        x = store.images(torch.tensor([3]))
        ids, distances = index.search(x, 4)
        assert ids.tolist() == [[3, 7, -1, -1]]
        between = (x - store.images(torch.tensor([7]))).norm()
        torch.testing.assert_close(distances, torch.tensor([[0, between, torch.inf, torch.inf]]))

    def test_the_seed_decides_training(self, store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """IVF4 is trained on 256 of the 400 images here."""
        monkeypatch.setattr(building, "_TRAIN_AT_MOST", 1)

        def centroids(seed: int) -> np.ndarray:
            (store.folder / "manifest.json").unlink(missing_ok=True)
            index = build(store, 12, "IVF4,Flat", seed=seed)
            return index._vectors.quantizer.reconstruct_n(0, 4)

        assert np.array_equal(centroids(0), centroids(0))
        assert not np.array_equal(centroids(0), centroids(1))


class TestRefusals:
    @pytest.mark.parametrize("kind", ["flat", "ivf"])
    @pytest.mark.parametrize("k", [0, -2])
    def test_no_neighbours(self, store: ImageStore, kind: str, k: int) -> None:
        with refused(InputError, f"k = {k}: wanted at least 1"):
            build(store, kind=kind).search(queries(2), k)

    def test_more_neighbours_than_images_are_clamped_and_said(self, store: ImageStore) -> None:
        with pytest.warns(DegradedWarning, match="k = 500 neighbours asked of 400 images") as caught:
            ids, _ = build(store).search(queries(2), 500)
        assert len(caught) == 1
        assert torch.equal(ids.sort(1).values, torch.arange(N).expand(2, -1))
        with pytest.warns(DegradedWarning, match="k = 100 neighbours asked of 60 images"):
            found = build(store).candidates(queries(2).flatten(1), 100, store.class_rows(2))
        assert torch.equal(found.ids.sort(1).values, torch.arange(340, 400).expand(2, -1))

    @pytest.mark.parametrize(
        "x",
        [
            queries(2)[:, :2],
            queries(2)[0],
            queries(2)[..., None],
            torch.tensor(1.0),
            queries(2).double(),
            queries(2).half(),
            queries(2).masked_fill(queries(2) > 1, torch.nan),
            queries(2).masked_fill(queries(2) > 1, torch.inf),
        ],
        ids=["channels", "one", "axes", "number", "double", "half", "nan", "inf"],
    )
    def test_wrong_queries(self, store: ImageStore, x: Tensor) -> None:
        with refused(InputError, r"queries of shape .*: wanted finite float32 \(B, 3, 4, 4\)"):
            build(store).search(x, 3)

    def test_more_than_a_gpu_answers(self, store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
        index = build(store)
        index._on_gpu = index._vectors
        monkeypatch.setattr(module, "MAX_GPU_K", 5)
        with refused(InputError, "k = 6: faiss on a GPU answers at most 5"):
            index.search(queries(2), 6)
        ids, _ = index.search(queries(2), 5)
        assert torch.equal(ids, build(store).search(queries(2), 5)[0])

    @pytest.mark.parametrize(
        ("rank", "kind", "match"),
        [
            (12, "nonsense", "faiss refuses it .*wanted flat, ivf, or"),
            (12, "PQ5", "with 12 coordinates: faiss refuses it"),
            ("pixels", "PQ5", "with 48 coordinates: faiss refuses it"),
            (12, "SQ8_direct", "SQ8_direct"),
            (12, "IVF500,Flat", "with 12 coordinates and 400 images: faiss refuses it"),
            (12, "IDMap,Flat", "and 400 images: faiss refuses it"),
            (0, "flat", "rank 0: wanted at least 1"),
        ],
    )
    def test_what_cannot_be_built_costs_nothing(
        self, store: ImageStore, rank: int | str, kind: str, match: str
    ) -> None:
        """The index that stands there still opens."""
        build(store)
        before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
        with refused(InputError, match):
            build(store, rank, kind)
        with refused(InputError, "too small"):
            build(store, 13, memory=1000)
        assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before
        assert len(NeighbourIndex.open(store.folder)) == N

    def test_a_kind_is_judged_by_the_coordinates_there_are(self, store: ImageStore) -> None:
        """Rank 128 comes to 48 here, which PQ12 divides and 128 it does not."""
        assert build(store, 128, "PQ12x4").rank == 48

    def test_another_folder_than_the_images(self, store: ImageStore, tmp_path: Path) -> None:
        with refused(StoreError, "an index is built beside its images"):
            NeighbourIndex.build(store, tmp_path)

    def test_two_builds_at_once(self, store: ImageStore) -> None:
        with folder_lock(store.folder), refused(BusyError, "another process is building here"):
            build(store)

    def test_a_folder_that_may_not_be_written(self, store: ImageStore) -> None:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        store.folder.chmod(0o500)
        try:
            with refused(StoreError, "choose a folder you may write to"):
                build(store, 5)
        finally:
            store.folder.chmod(0o700)


class TestBuild:
    @pytest.mark.parametrize(("rank", "kind"), [(12, "flat"), ("pixels", "flat"), (12, "ivf"), (500, "flat")])
    def test_an_opened_index_is_the_built_one(self, store: ImageStore, rank: int | str, kind: str) -> None:
        built, x = build(store, rank, kind), queries(9)
        opened = NeighbourIndex.open(str(store.folder))
        for one, other in zip(built.search(x, 8), opened.search(x, 8), strict=True):
            assert torch.equal(one, other)
        assert (opened.rank, opened.exact, len(opened)) == (built.rank, kind == "flat", N)
        assert opened.manifest == built.manifest

    def test_the_same_again_is_reused_untouched(self, store: ImageStore) -> None:
        build(store, 12, "ivf")
        before = {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()}
        build(store, 12, "ivf", memory=1 << 29)
        assert {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before

    @pytest.mark.parametrize(
        ("rank", "kind", "seed"), [(11, "flat", 0), (12, "SQ8", 0), (12, "flat", 1), ("pixels", "flat", 0)]
    )
    def test_other_settings_build_again(
        self, store: ImageStore, rank: int | str, kind: str, seed: int
    ) -> None:
        first = build(store)
        again = build(store, rank, kind, seed=seed)
        assert again.manifest["kind"] == kind
        assert again.manifest["seed"] == seed
        assert again.rank == (48 if rank == "pixels" else rank)
        opened = NeighbourIndex.open(store.folder)
        assert opened.manifest == again.manifest != first.manifest
        assert not list(store.folder.glob("*.partial"))

    def test_two_builds_give_the_same_bytes(self, store: ImageStore) -> None:
        contents = []
        for _ in range(2):
            (store.folder / "manifest.json").unlink(missing_ok=True)
            build(store, 12, "ivf")
            contents.append({path.name: path.read_bytes() for path in store.folder.iterdir()})
        assert contents[0] == contents[1]

    @pytest.mark.parametrize("budget", [100_000, 123_457])
    def test_any_budget_gives_the_same_index(self, store: ImageStore, budget: int) -> None:
        (store.folder / "manifest.json").unlink(missing_ok=True)
        small = build(store, 12, memory=budget)
        matrix = small._vectors.reconstruct_n(0, N)
        wanted = coordinates(small, all_images(store))
        torch.testing.assert_close(torch.from_numpy(matrix).double(), wanted, rtol=1e-5, atol=1e-5)

    def test_the_manifest_says_what_is_there(self, store: ImageStore) -> None:
        index = build(store, 12)
        manifest = json.loads((store.folder / "manifest.json").read_text())
        assert manifest["count"] == N
        assert manifest["shape"] == [N, 3, 4, 4]
        assert manifest["coordinates"] == 12
        assert manifest["captured"] == pytest.approx(index.embedding.captured)
        assert 0 < manifest["collapse_time"] < 1
        assert manifest["files"] == {name: file_mark(store.folder / name) for name in PARTS}

    def test_many_images_on_few_lists_train_within_the_budget(self, store: ImageStore) -> None:
        rows = store.rows()
        embedding = build(store, "pixels").embedding
        lists = faiss_backend.make_index("IVF2,Flat", 48, N)
        few = building._training_vectors(lists, rows, embedding, 8 * 48 * 300, 0)
        assert few.shape == (300, 48)
        assert building._training_vectors(lists, rows, embedding, 4 * 4 * 48 * 7, 0).shape == (256, 48)
        many = faiss_backend.make_index("IVF6,Flat", 48, N)
        assert building._training_vectors(many, rows, embedding, 4 * 4 * 48 * 7, 0).shape == (384, 48)
        torch.testing.assert_close(
            torch.from_numpy(few).double().mean(0), torch.zeros(48).double(), rtol=0, atol=0.1
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished folders of the same shape and different images."""
    stores = [store_of(pixels_of(50, seed), tmp_path_factory.mktemp("folder")) for seed in (0, 1)]
    return build(stores[0], 6).folder, build(stores[1], 6).folder


class TestFolder:
    """A folder that is not what a finished build left is refused in one line that names the file."""

    @pytest.fixture
    def folder(self, made: tuple[Path, Path], tmp_path: Path) -> Path:
        return Path(shutil.copytree(made[0], tmp_path / "out\n"))

    @pytest.fixture
    def edit(self, folder: Path) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        return manifest

    def test_a_copy_opens(self, folder: Path) -> None:
        assert len(NeighbourIndex.open(folder)) == 50

    @pytest.mark.parametrize("name", PARTS)
    @pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "head", "tail", "folder"])
    def test_a_damaged_part(
        self, folder: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = folder / name
        content = bytearray(path.read_bytes())
        if damage in ("missing", "folder"):
            path.unlink()
        if damage == "folder":
            path.mkdir()
        if damage in ("head", "tail"):
            content[12 if damage == "head" else -9] ^= 4
        changed = {"empty": b"", "cut": content[: len(content) // 2], "longer": content + b"\0"}
        if not path.is_dir() and damage != "missing":
            path.write_bytes(changed.get(damage, content))
        self.never_parses(monkeypatch)
        with refused(StoreError, rf"out\\n/{name}: .*build the index again"):
            NeighbourIndex.open(folder)

    @pytest.mark.parametrize("name", PARTS)
    def test_a_part_of_another_index(
        self, made: tuple[Path, Path], folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copy(made[1] / name, folder / name)
        self.never_parses(monkeypatch)
        with refused(StoreError, rf"out\\n/{name}: .*; build the index again"):
            NeighbourIndex.open(folder)

    @staticmethod
    def never_parses(monkeypatch: pytest.MonkeyPatch) -> None:
        """On hostile bytes faiss.read_index may crash: it must not be reached."""

        def reached(*arguments: object) -> None:
            raise AssertionError("faiss was given a file that is not the one built")

        monkeypatch.setattr(faiss, "read_index", reached)

    @pytest.mark.parametrize("name", PARTS[:2])
    def test_parts_that_a_forged_manifest_vouches_for(
        self, made: tuple[Path, Path], folder: Path, edit: dict[str, Any], name: str
    ) -> None:
        """The marks agree; what the files say of each other does not. (Vectors of faiss say nothing.)"""
        shutil.copy(made[1] / name, folder / name)
        edit["files"][name] = file_mark(folder / name)
        write_json(folder / "manifest.json", edit)
        with refused(StoreError, "come from different builds"):
            NeighbourIndex.open(folder)

    @pytest.mark.parametrize("content", [b"", b"nonsense", b"IxFl" + b"\xff" * 80])
    def test_an_index_that_faiss_cannot_parse(
        self, folder: Path, edit: dict[str, Any], content: bytes
    ) -> None:
        (folder / "index.faiss").write_bytes(content)
        edit["files"]["index.faiss"] = file_mark(folder / "index.faiss")
        write_json(folder / "manifest.json", edit)
        with refused(StoreError, r"index\.faiss: faiss cannot read it; build the index again"):
            NeighbourIndex.open(folder)

    @pytest.mark.parametrize(("count", "rank"), [(0, 6), (49, 6), (51, 6), (50, 5), (50, 7)])
    def test_an_index_of_other_size(self, folder: Path, edit: dict[str, Any], count: int, rank: int) -> None:
        vectors = faiss.IndexFlatL2(rank)
        vectors.add(np.ones((count, rank), np.float32))
        faiss.write_index(vectors, str(folder / "index.faiss"))
        edit["files"]["index.faiss"] = file_mark(folder / "index.faiss")
        write_json(folder / "manifest.json", edit)
        with refused(StoreError, "come from different builds"):
            NeighbourIndex.open(folder)

    def test_another_map_of_the_same_images(self, folder: Path, edit: dict[str, Any]) -> None:
        """The same number of coordinates of the same store, and yet not those of these vectors."""
        path = folder / "embedding.safetensors"
        found = module.Embedding.open(path)
        other = module.Embedding(**found.__dict__ | {"principal": found.principal.flip(0)})
        other.save(path)
        edit["files"][path.name] = file_mark(path)
        write_json(folder / "manifest.json", edit)
        with refused(StoreError, "come from different builds"):
            NeighbourIndex.open(folder)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'"text"'])
    def test_a_manifest_that_is_none(self, folder: Path, content: bytes) -> None:
        (folder / "manifest.json").write_bytes(content)
        with refused(StoreError, r"out\\n/manifest\.json: .*an index manifest"):
            NeighbourIndex.open(folder)

    @pytest.mark.parametrize("value", ["nnflow-index-0", None, 7, ["nnflow-index-3"]])
    def test_a_manifest_of_another_version(self, folder: Path, edit: dict[str, Any], value: object) -> None:
        write_json(folder / "manifest.json", edit | {"format": value})
        with refused(StoreError, r"manifest\.json: format .*, wanted nnflow-index-3"):
            NeighbourIndex.open(folder)
        # and the fix it names works
        assert len(build(ImageStore.open(folder), 6)) == 50
        assert NeighbourIndex.open(folder).manifest["format"] == "nnflow-index-3"

    def test_a_manifest_without_any_one_of_its_keys(self, folder: Path, edit: dict[str, Any]) -> None:
        for key in edit.keys() - {"format"}:
            for broken in ({k: v for k, v in edit.items() if k != key}, edit | {key: {"a": 1}}):
                write_json(folder / "manifest.json", broken)
                with refused(StoreError, f"{key}|images.h5"):
                    NeighbourIndex.open(folder)
        for name in PARTS:
            for broken in ({}, 7, {"bytes": "many\n"}, {"bytes": edit["files"][name]["bytes"]}):
                write_json(folder / "manifest.json", edit | {"files": edit["files"] | {name: broken}})
                with refused(StoreError, f"{name}.*build the index again"):
                    NeighbourIndex.open(folder)

    def test_no_folder_and_no_build(self, folder: Path, tmp_path: Path) -> None:
        with refused(StoreError, "no such folder; run: nnflow index"):
            NeighbourIndex.open(tmp_path / "absent")
        (folder / "manifest.json").unlink()
        with refused(StoreError, "a build that has not ended; run: nnflow index"):
            NeighbourIndex.open(folder)

    @pytest.mark.parametrize("step", ["fit_embedding", "set_probes", "write_index", "file_mark"])
    def test_a_build_that_dies_before_its_parts_leaves_the_old_index(
        self, folder: Path, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def dies(*arguments: object, **keywords: object) -> None:
            raise KeyboardInterrupt

        before = {name: (folder / name).read_bytes() for name in PARTS}
        with monkeypatch.context() as patch:
            patch.setattr(building, step, dies)
            with pytest.raises(KeyboardInterrupt):
                build(ImageStore.open(folder), 7)
        assert {name: (folder / name).read_bytes() for name in PARTS} == before
        assert NeighbourIndex.open(folder).rank == 6
        assert build(ImageStore.open(folder), 7).rank == NeighbourIndex.open(folder).rank == 7

    @pytest.mark.parametrize("name", PARTS[1:])
    def test_a_build_that_dies_between_the_parts_never_opens(
        self, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Parts of the old build lie beside those of the new one."""
        store, real = ImageStore.open(folder), Path.replace

        def dies(path: Path, target: Path) -> Path:
            if target == folder / name:
                raise KeyboardInterrupt
            return real(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dies)
            with pytest.raises(KeyboardInterrupt):
                build(store, 7)
        with refused(StoreError, "a build that has not ended"):
            NeighbourIndex.open(folder)
        assert build(store, 7).rank == NeighbourIndex.open(folder).rank == 7

    @pytest.mark.parametrize("name", PARTS[1:])
    def test_a_damaged_part_is_built_again(self, folder: Path, name: str) -> None:
        wanted = (folder / name).read_bytes()
        (folder / name).write_bytes(wanted[:100])
        assert len(build(ImageStore.open(folder), 6)) == 50
        assert (folder / name).read_bytes() == wanted

    def test_a_manifest_that_is_none_is_built_again(self, folder: Path) -> None:
        (folder / "manifest.json").write_text("{")
        assert len(build(ImageStore.open(folder), 6)) == 50
        assert len(NeighbourIndex.open(folder)) == 50
