"""NeighbourIndex: images, their PCA coordinates and a faiss index over them, in one folder.

    OUT/images.h5  embedding.safetensors  coordinates.npy  index.faiss  manifest.json

faiss gives ids and a lower bound on distances, never a logit: its float32 expansion |q|^2 - 2 q.z + |z|^2
is off by 5.6e-4 at t = .99, which is 2.8 in a logit (docs/field.md, section 4).
"""

import contextlib
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnflow.building import Order, build_parts, coordinate_count
from nnflow.coordinates import Coordinates
from nnflow.embedding import Embedding, embedding_digest
from nnflow.errors import DegradedWarning, InputError, StoreError
from nnflow.faiss_backend import (
    MAX_GPU_K,
    Held,
    choose_kind,
    faiss,
    on_all_gpus,
    open_index,
    search_lists,
    search_within,
)
from nnflow.files import folder_lock, quoted, shown
from nnflow.manifest import (
    COORDINATES,
    EMBEDDING,
    FORMAT,
    INDEX,
    MANIFEST,
    PARTS,
    check_part,
    is_built,
    read_manifest,
)
from nnflow.memory import DEFAULT_BUDGET
from nnflow.store import ImageStore
from nnflow.unfinished import FOLDER as UNFINISHED
from nnflow.unfinished import discard

_NORM_ROWS = 1 << 13  # vectors squared at once
_SCORES = 1 << 24  # scores of a flat scan held at once: 64 MiB


@dataclass(frozen=True)
class Candidates:
    """What a search found for B queries.

    Attributes:
        ids: rows of the store, -1 where the index found fewer than K.
        beyond: squared L2 distance in the coordinates that no image left out undercuts, after
            allowance for faiss' rounding; -inf where the index is approximate.
    """

    ids: Int[Tensor, "B K"]
    beyond: Float[Tensor, " B"]


class NeighbourIndex:
    """Answers "which stored images are near x", and owns the images it answers about."""

    def __init__(
        self,
        store: ImageStore,
        embedding: Embedding,
        coordinates: Coordinates,
        held: Held,
        manifest: dict[str, Any],
    ) -> None:
        self.store = store
        self.embedding = embedding
        self.coordinates = coordinates
        self.manifest = manifest
        self.folder = store.folder
        self.held = held
        vectors = self._vectors = held.vectors
        self._on_gpu = None if held.mapped else on_all_gpus(vectors)
        self._flat: tuple[Tensor, Tensor] | None = None
        if self.exact:
            # A view of the vectors faiss holds, not a copy; `_vectors` keeps them alive.
            view = faiss.rev_swig_ptr(vectors.get_xb(), vectors.ntotal * vectors.d)
            matrix = torch.from_numpy(view.reshape(vectors.ntotal, vectors.d))
            self._flat = matrix, 0.5 * torch.cat([rows.square().sum(1) for rows in matrix.split(_NORM_ROWS)])
            held.let_go()

    def __len__(self) -> int:
        return len(self.store)

    @property
    def exact(self) -> bool:
        """Whether a search compares every stored image in the coordinates."""
        return bool(self.manifest["kind"] == "flat")

    @property
    def rank(self) -> int:
        """Coordinates of an embedded image."""
        return self.embedding.rank

    @classmethod
    def build(
        cls,
        store: ImageStore,
        path: str | Path,
        *,
        rank: int | Literal["pixels"] = 128,
        kind: str = "auto",
        memory: int = DEFAULT_BUDGET,
        seed: int = 0,
        progress: bool = False,
    ) -> "NeighbourIndex":
        """Embeds every image of `store` and indexes the coordinates, in the store's own folder.

        A folder built with the same arguments is opened as it is; with others it is built again.

        Args:
            store: the images.
            path: the folder that holds them.
            rank: PCA coordinates, or "pixels" for all pixels unrotated.
            kind: "flat" (exact), "ivf", "ivfpq", any faiss factory string such as "IVF4096,PQ64x4fs", or
                "auto" for what suits the number of images and `memory`; how many lists a search looks into is
                measured (`probing`).
            memory: working memory in bytes, beside the index itself.
            seed: of random choices.
            progress: show bars on stderr.

        Raises:
            InputError: a rank or kind that does not exist, a memory budget too small.
            StoreError: `path` is not the store's folder, or cannot be written.
            BusyError: another process is building there.
        """
        folder = Path(path)
        if folder.resolve() != store.folder.resolve():
            raise StoreError(
                f"{shown(folder)}: the images lie in {shown(store.folder)}; an index is built beside its "
                "images, in one folder"
            )
        choice = choose_kind(kind, coordinate_count(store, rank), len(store), memory)
        settings = {
            "format": FORMAT,
            "rank": rank,
            "kind": choice.kind,
            "seed": seed,
            "store": store.fingerprint,
        }
        with folder_lock(folder):
            if is_built(folder, settings):
                # A part that this version cannot read is no reason to refuse: the command builds it again.
                with contextlib.suppress(StoreError):
                    opened = cls.open(folder)
                    discard(folder)
                    return opened
            parts = build_parts(Order(store, settings, rank, choice, memory, seed, progress))
            if parts is None:
                return cls.open(folder)
            held = Held(parts.vectors, False, "in memory, where it was built")
            return cls(store, parts.embedding, parts.coordinates, held, parts.manifest)

    @classmethod
    def open(cls, path: str | Path, *, memory: int | None = None) -> "NeighbourIndex":
        """Opens a folder that `build` finished, after checking that its parts belong together.

        Args:
            path: the folder.
            memory: bytes that the vectors searched may take; more stay in their file (`held.reason` says
                which). By default half of what the machine has.

        Raises:
            StoreError: unfinished, truncated, of another version, or parts of different builds.
        """
        folder = Path(path)
        if not (folder / MANIFEST).exists():
            raise StoreError(_absent(folder))
        manifest = read_manifest(folder)
        for name in PARTS:
            check_part(folder / name, manifest["files"][name])
        store = ImageStore.open(folder)
        embedding = Embedding.open(folder / EMBEDDING)
        held = open_index(folder / INDEX, memory)
        vectors = held.vectors
        same = (
            store.fingerprint == embedding.store_fingerprint == manifest["store"]
            and embedding_digest(embedding) == manifest["embedding"]
            and vectors.ntotal == len(store)
            and vectors.d == embedding.rank
        )
        if not same:
            raise StoreError(
                f"{shown(folder)}: images, embedding and index come from different builds; remove "
                f"{MANIFEST} and run nnflow index again"
            )
        coordinates = Coordinates.open(folder / COORDINATES, embedding, len(store))
        return cls(store, embedding, coordinates, held, manifest)

    def search(self, x: Tensor, k: int) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """The `k` stored images nearest to `x` in the coordinates, ordered by distance in pixels.

        Args:
            x: float32 (B, C, H, W).
            k: neighbours, clamped to the number of images with a `DegradedWarning`.

        Returns:
            ids and L2 distances in units of the values, computed by difference; an index that finds fewer
            than `k` fills with id -1 at distance inf.

        Raises:
            InputError: wrong shape or type, NaN, k below 1, or above 2,048 on a GPU.
        """
        shape = (len(x) if x.ndim else 0, *self.store.shape[1:])
        if tuple(x.shape) != shape or x.dtype != torch.float32 or not bool(x.isfinite().all()):
            raise InputError(
                f"queries of shape {tuple(x.shape)}, {x.dtype}: wanted finite float32 (B, "
                f"{', '.join(map(str, shape[1:]))})"
            )
        flat = x.detach().flatten(1).cpu()
        ids = self.candidates(flat, k).ids
        rows = self.store.rows()
        distances = torch.full(ids.shape, torch.inf)
        for row, (query, mine) in enumerate(zip(flat, ids, strict=True)):
            known = mine >= 0
            images = rows.values(mine[known])
            distances[row, known] = torch.linalg.vector_norm(images - query, dim=1)
        order = distances.argsort(dim=1, stable=True)
        return ids.gather(1, order), distances.gather(1, order)

    def candidates(
        self, x: Float[Tensor, "B D"], k: int, rows: slice | None = None, *, lists: int | None = None
    ) -> Candidates:
        """Ids of the `k` images nearest to `x` in the coordinates, among `rows` of the store.

        An index with inverted lists looks into `lists` of them, or as many as were measured to be enough;
        into all for a slice, and into no fewer on a GPU.

        Raises:
            InputError: k below 1, or above 2,048 on a GPU.
        """
        k = self._checked_k(k, len(range(*rows.indices(len(self)))) if rows else len(self))
        coordinates = self.embedding(x.cpu())
        if self._flat is not None and self._on_gpu is None:
            squares, ids = self._scan(coordinates, k, rows or slice(0, len(self)))
        else:
            queries = np.ascontiguousarray(coordinates.numpy())
            if rows is not None:  # faiss' GPU indexes would ignore the slice
                found, places = search_within(self._vectors, queries, k, rows)
            elif lists is not None and self._on_gpu is None:
                found, places = search_lists(self._vectors, queries, k, lists)
            else:
                found, places = (self._on_gpu or self._vectors).search(queries, k)
            squares, ids = torch.from_numpy(found[:, -1]).double(), torch.from_numpy(places)
        self.held.let_go()
        if self.exact:
            return Candidates(ids, squares - self._rounding(x.cpu(), coordinates))
        return Candidates(ids, torch.full_like(squares, -torch.inf))

    def _scan(
        self, coordinates: Float[Tensor, "B r"], k: int, rows: slice
    ) -> tuple[Float[Tensor, " B"], Int[Tensor, "B k"]]:
        """Exact search over the vectors of a flat index: squared distance of the k-th, and all ids.

        128 queries among 50,000 images in 128 coordinates take 24 ms, faiss' own flat search 38 ms.
        """
        assert self._flat is not None
        vectors, half_norms = self._flat[0][rows], self._flat[1][rows]
        last, ids = [], []
        for queries in coordinates.split(max(1, _SCORES // len(vectors))):
            scores = torch.addmm(half_norms, queries, vectors.T, beta=-1)
            best, places = scores.topk(k, dim=1)
            last.append(queries.double().square().sum(1) - 2 * best[:, -1].double())
            ids.append(places + rows.start)
        return torch.cat(last), torch.cat(ids)

    def _rounding(self, x: Float[Tensor, "B D"], coordinates: Float[Tensor, "B r"]) -> Float[Tensor, " B"]:
        # A float32 dot product of r terms errs by about sqrt(r) half-ulps of |q||z|; four of them.
        reach = coordinates.double().norm(dim=1) + self.embedding.radius
        scale = reach.square()
        if self.embedding.directions is not None:
            # The coordinates are rounded in proportion to all of x: at rank 1 and values of 1e4 the
            # allowance above was exceeded eightfold.
            whole = torch.linalg.vector_norm(x - self.embedding.mean, dim=1).double()
            scale = scale + reach * (whole + self.embedding.radius)
        return math.sqrt(self.rank) * 2**-22 * scale

    def _checked_k(self, k: int, available: int) -> int:
        if k < 1:
            raise InputError(f"k = {k}: wanted at least 1 neighbour")
        if k > available:
            warnings.warn(
                f"k = {k} neighbours asked of {available} images: all {available} are used",
                DegradedWarning,
                stacklevel=3,
            )
            k = available
        if self._on_gpu is not None and k > MAX_GPU_K:
            raise InputError(f"k = {k}: faiss on a GPU answers at most {MAX_GPU_K}; lower k")
        return k


def _absent(folder: Path) -> str:
    """Why there is no index in `folder`, and what makes one."""
    if not folder.is_dir():
        return f"{shown(folder)}: no such folder; run: nnflow index SOURCE {quoted(folder)}"
    if any(folder.glob("images.h5*")) or (folder / UNFINISHED).exists():
        return f"{shown(folder)}: a build that has not ended; run: nnflow index SOURCE {quoted(folder)}"
    return f"{shown(folder)}: no index in this folder; name what nnflow index wrote, its OUT"
