"""The parts of an index, built in one folder: in bounded memory, and where a killed build stopped.

    1  the embedding                        (fitting)
    2  a faiss index, trained where its kind wants that
    3  one pass over the images: their coordinates into a file, their vectors into that index
    4  how many lists a search looks into   (probing)

Until all is done it lies in OUT/index.building, and an index that stands in OUT stays as it is. Then its
manifest goes, the parts change places, and the new manifest comes last: a folder without one is a build that
has not ended.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnflow.coordinates import CoordinateFile, Coordinates
from nnflow.embedding import FORMAT as EMBEDDING_FORMAT
from nnflow.embedding import Embedding, collapse_time, embedding_digest
from nnflow.errors import InputError, StoreError
from nnflow.faiss_backend import (
    Choice,
    filling,
    lists_of,
    make_index,
    read_index,
    remembers_additions,
    reserve,
    write_index,
)
from nnflow.files import disk_errors, file_mark, read_json, sync_folder, write_json
from nnflow.fitting import fit_embedding, fitting_of
from nnflow.manifest import COORDINATES, EMBEDDING, INDEX, MANIFEST, PARTS, check_part
from nnflow.pixels import PixelRows
from nnflow.precision import full_float32
from nnflow.probing import set_probes
from nnflow.projection import centred
from nnflow.store import ImageStore
from nnflow.unfinished import Unfinished

_TRAIN_AT_MOST = 65_536  # vectors, unless the lists need more
_TRAIN_PER_CENTROID = 64  # faiss wants 39 to 256 vectors per k-means centroid
_VECTORS = "vectors"  # the faiss index, trained and filled as far as the pass has come


@dataclass(frozen=True)
class Order:
    """What is to be built, of which images.

    Attributes:
        store: the images; the index goes into their folder.
        settings: what the manifest says of it, and what tells one index of these images from another.
        rank: coordinates asked for, or "pixels".
        choice: the kind of faiss index.
        memory: bytes, of which the faiss index is one part and working memory the other.
        seed: of random choices.
        progress: show bars on stderr.
    """

    store: ImageStore
    settings: dict[str, Any]
    rank: int | Literal["pixels"]
    choice: Choice
    memory: int
    seed: int
    progress: bool


@dataclass(frozen=True)
class Parts:
    """A built index, as it is in memory."""

    embedding: Embedding
    coordinates: Coordinates
    vectors: Any
    manifest: dict[str, Any]


@full_float32()
def build_parts(order: Order) -> Parts | None:
    """Builds what `order` asks for, or the rest of it; None where only places were left to be changed.

    Takes no lock: the caller holds `files.folder_lock` of the folder.

    Raises:
        InputError: what faiss refuses, or memory too small; nothing is kept.
        StoreError: the disk refuses; what is built so far is kept.
    """
    store = order.store
    make_index(order.choice.kind, coordinate_count(store, order.rank), len(store))  # whether faiss can
    fitting = asdict(fitting_of(store, order.memory))
    kept = Unfinished(store.folder, order.settings | {"embedding": EMBEDDING_FORMAT, "fitting": fitting})
    try:
        parts = None if kept.find(MANIFEST) else _built(order, kept)
    except InputError:
        kept.remove()
        raise
    manifest = _changed_places(store.folder, kept)
    if parts is None:
        return None
    embedding, vectors = parts
    coordinates = Coordinates.open(store.folder / COORDINATES, embedding, len(store))
    return Parts(embedding, coordinates, vectors, manifest)


def coordinate_count(store: ImageStore, rank: int | Literal["pixels"]) -> int:
    """What `rank` comes to: no more than the pixels, nor than the images.

    Raises:
        InputError: a rank below 1.
    """
    if rank == "pixels":
        return store.pixels.shape[1]
    if rank < 1:
        raise InputError(f"rank {rank}: wanted at least 1, or 'pixels' for no projection")
    return min(rank, *store.pixels.shape)


def _built(order: Order, kept: Unfinished) -> tuple[Embedding, Any]:
    """All parts and the manifest, in the folder of what is unfinished."""
    embedding = _embedding(order, kept)
    whole = kept.find(INDEX)
    vectors = read_index(whole) if whole else _filled(order, embedding, kept)
    probing = set_probes(vectors, order.store, embedding, order.seed)
    if not whole:
        kept.keep(INDEX, lambda path: write_index(vectors, path))
    files = {name: kept.find(name) for name in (EMBEDDING, INDEX)}
    files |= {"images.h5": order.store.folder / "images.h5", COORDINATES: kept.folder / COORDINATES}
    manifest = order.settings | {
        "reason": order.choice.reason,
        "probing": {} if probing is None else asdict(probing),
        "count": len(order.store),
        "shape": list(order.store.shape),
        "coordinates": embedding.rank,
        "captured": embedding.captured,
        "fitted_on": embedding.fitted_on,
        "collapse_time": collapse_time(embedding.spectrum, len(order.store)),
        "embedding": embedding_digest(embedding),
        "files": {name: file_mark(path) for name in PARTS if (path := files[name])},
    }
    kept.keep(MANIFEST, lambda path: write_json(path, manifest))
    return embedding, vectors


def _changed_places(folder: Path, kept: Unfinished) -> dict[str, Any]:
    """Puts the parts where they belong, also after a kill between two of them; the manifest."""
    found = kept.find(MANIFEST)
    assert found is not None
    manifest = read_json(found, "the manifest of an unfinished build")
    with disk_errors(folder, "building in"):
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
        for name in PARTS[1:]:
            source = kept.folder / name if name == COORDINATES else kept.find(name)
            if source and source.exists():
                source.replace(folder / name)
        sync_folder(folder)
    try:
        for name in PARTS:
            check_part(folder / name, manifest["files"][name])
    except StoreError:
        kept.remove()  # the next build begins anew
        raise
    write_json(folder / MANIFEST, manifest)
    kept.remove()
    return manifest


def _embedding(order: Order, kept: Unfinished) -> Embedding:
    found = kept.find(EMBEDDING)
    if found is not None:
        return Embedding.open(found)
    embedding = fit_embedding(
        order.store,
        rank=order.rank,
        budget=order.memory,
        seed=order.seed,
        progress=order.progress,
        kept=kept,
    )
    kept.keep(EMBEDDING, embedding.save)
    kept.forget("axes", "extent")
    return embedding


def _filled(order: Order, embedding: Embedding, kept: Unfinished) -> Any:
    """The faiss index of all images, and beside it the file of their coordinates."""
    rows, kind = order.store.rows(), order.choice.kind
    empty, path = Coordinates.empty(embedding), kept.folder / COORDINATES
    vectors = _begun(order, embedding, kept)
    with (
        CoordinateFile(path, rows.count, len(embedding.peaks)) as held,
        filling(kind, embedding.rank, rows.count),
    ):
        reserve(vectors, rows.count)
        for start, stop, block in _shown(rows, order, vectors.ntotal):
            x = centred(block, rows.codec, embedding.mean)
            z = x @ embedding.principal.T
            held.put(start, empty.encoded(z))
            searched = x if embedding.searched is None else z[:, : embedding.searched]
            vectors.add(np.ascontiguousarray(searched.numpy()))
            if kept.due and stop < rows.count and remembers_additions(vectors):
                held.sync()  # first: the vectors say how many of its rows there are
                kept.keep(_VECTORS, lambda path: write_index(vectors, path))
        held.sync()
    return vectors


def _shown(rows: PixelRows, order: Order, start: int) -> Iterator[tuple[int, int, Tensor]]:
    step = rows.cached_rows(order.memory)
    yield from tqdm(
        rows.blocks(order.memory, start, rows=step),
        "indexing",
        initial=start // step,
        total=-(-rows.count // step),
        disable=not order.progress,
        unit="block",
    )


def _begun(order: Order, embedding: Embedding, kept: Unfinished) -> Any:
    """The faiss index as a killed build left it, else an empty one, trained where its kind wants that."""
    found = kept.find(_VECTORS)
    if found is not None:
        vectors = read_index(found)
        if not vectors.ntotal or (kept.folder / COORDINATES).exists():
            return vectors
    vectors = make_index(order.choice.kind, embedding.rank, len(order.store))
    if not vectors.is_trained:
        rows = order.store.rows()
        with filling(order.choice.kind, embedding.rank, len(order.store)):
            vectors.train(_training_vectors(vectors, rows, embedding, order.memory, order.seed))
        kept.keep(_VECTORS, lambda path: write_index(vectors, path))
    return vectors


def _training_vectors(
    vectors: Any, rows: PixelRows, embedding: Embedding, budget: int, seed: int
) -> np.ndarray:
    """Coordinates of random images: half the budget of them, or as many as the lists of `vectors` need."""
    lists = lists_of(vectors)
    needed = _TRAIN_PER_CENTROID * (1 if lists is None else lists.nlist)
    affordable = min(_TRAIN_AT_MOST, budget // (8 * embedding.rank))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(rows.count, generator=generator)[: max(needed, affordable, 256)].sort().values
    coordinates = np.empty((len(chosen), embedding.rank), np.float32)
    step = rows.block_rows(budget)
    for start in range(0, len(chosen), step):
        x = rows.values(chosen[start : start + step], budget)
        coordinates[start : start + step] = embedding(x).numpy()
    return coordinates
