"""Imports faiss, or says which extra to install or remove; makes, keeps and asks its indexes.

faiss answers what it cannot do with a RuntimeError of its own words: here they become nnflow's.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from nnflow.errors import InputError, MissingExtraError, StoreError
from nnflow.filemap import let_go_of, maps_of
from nnflow.files import shown, whole_file
from nnflow.memory import format_bytes, machine_memory

_CPU = ("faiss-cpu",)
_GPU = ("faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs", "faiss-gpu-cuvs-cu12")


def _installed(names: tuple[str, ...]) -> list[str]:
    found = []
    for name in names:
        try:
            distribution(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    return found


def check_faiss() -> None:
    """Refuses to start with two faiss wheels: they overwrite each other's files silently.

    Raises:
        MissingExtraError: both a CPU and a GPU wheel are installed.
    """
    cpu, gpu = _installed(_CPU), _installed(_GPU)
    if cpu and gpu:
        raise MissingExtraError(
            f"{cpu[0]} and {gpu[0]} are both installed and overwrite each other's files; remove both, "
            f"then install one: pip uninstall {cpu[0]} {' '.join(gpu)}; pip install 'nnflow[gpu]' (or "
            "'nnflow[cpu]' without an NVIDIA GPU)"
        )


check_faiss()
try:
    import faiss
except ModuleNotFoundError as error:
    raise MissingExtraError(
        "nnflow needs faiss and finds none: pip install 'nnflow[cpu]', or 'nnflow[gpu]' with an NVIDIA GPU"
    ) from error

# Above, lists pay: 128 late queries take 6 ms in bytes at 50,000 images and 130 ms at 1,281,167.
_FLAT_AT_MOST = 200_000
# Lists grow by doubling: vectors of 626 MiB took 818 MiB once 1,281,167 had been added.
_GROWING = 1.5
MAX_GPU_K = 2048  # faiss' GPU kernels answer no more neighbours than this


def gpu_count() -> int:
    """GPUs that this faiss can use; 0 with the CPU wheel."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def on_all_gpus(vectors: Any) -> Any:
    """A copy of `vectors` on every GPU; None without one, or where faiss keeps this kind on the CPU."""
    if not gpu_count():
        return None
    try:
        return faiss.index_cpu_to_all_gpus(vectors)
    except RuntimeError:  # HNSW and many others have no GPU version
        return None


def make_index(kind: str, rank: int, count: int) -> Any:
    """The empty faiss index of `rank` coordinates that `kind` names, meant for `count` images.

    Raises:
        InputError: faiss knows no such kind, or it is one that answers wrongly on these data.
    """
    if kind == "flat":
        return faiss.IndexFlatL2(rank)
    if kind in ("ivf", "ivfpq"):
        lists = max(1, min(4 * round(math.sqrt(count)), count // 39))
        kind = f"IVF{lists},{'Flat' if kind == 'ivf' else f'PQ{_subvectors(rank)}x8'}"
    elif "SQ8_direct" in kind:
        raise InputError(
            "index kind with SQ8_direct: it stores bytes, and coordinates are not bytes; use SQ8 or SQfp16"
        )
    with _said_of(kind, rank):
        vectors = faiss.index_factory(rank, kind)
    lists = lists_of(vectors)
    if lists is not None:
        lists.nprobe = max(1, lists.nlist // 16)
    return vectors


def _subvectors(rank: int) -> int:
    """Of a product quantiser: a byte for every four coordinates, or what divides them next."""
    return next(parts for parts in range(max(1, rank // 4), 0, -1) if rank % parts == 0)


@dataclass(frozen=True)
class Choice:
    """A kind of index, and why."""

    kind: str
    reason: str


def choose_kind(kind: str, rank: int, count: int, memory: int) -> Choice:
    """`kind`, or for "auto" what suits `count` images and `memory` bytes; says where they cannot hold it."""
    size = 4 * rank * count
    words = f"vectors of {format_bytes(size)}"
    more = f"more than the {format_bytes(memory)} of memory"
    beyond = f"; {words} alone are {more}" if size > memory else ""
    if kind != "auto":
        kind = "flat" if kind == "Flat" else kind  # faiss' own word for it
        return Choice(kind, "as asked" + (beyond if kind in ("flat", "ivf") else ""))
    if count <= _FLAT_AT_MOST:
        return Choice("flat", f"at most {_FLAT_AT_MOST:,} images: all are compared" + beyond)
    if _GROWING * size <= memory:
        return Choice("ivf", f"more than {_FLAT_AT_MOST:,} images, and {words}")
    growing = "" if beyond else ", and half as much again while they are added,"
    return Choice("ivfpq", f"{words}{growing} are {more}")


@contextlib.contextmanager
def filling(kind: str, rank: int, count: int) -> Iterator[None]:
    """Turns faiss' refusal to train or add into an `InputError`."""
    with _said_of(kind, rank, f" and {count} images"):
        yield


@contextlib.contextmanager
def _said_of(kind: str, rank: int, images: str = "") -> Iterator[None]:
    try:
        yield
    except StoreError:  # a RuntimeError of ours
        raise
    except RuntimeError as error:
        cause = shown(str(error).strip().split("\n")[0].rsplit("Error: ", 1)[-1].rsplit(" failed: ", 1)[-1])
        raise InputError(
            f"index kind {shown(kind)!r} with {rank} coordinates{images}: faiss refuses it ({cause}); wanted "
            "flat, ivf, or a factory string such as IVF4096,SQfp16"
        ) from error


def lists_of(vectors: Any) -> Any:
    """The inverted lists within `vectors`, also behind a rotation or a refinement; None without."""
    return faiss.try_extract_index_ivf(vectors)


def remembers_additions(vectors: Any) -> bool:
    """Whether `vectors` written, read and added to are what they would be had they stayed in memory.

    Graphs are not: each vector's level comes from random numbers that faiss does not write.
    """
    inner = faiss.downcast_index(vectors)
    if isinstance(inner, faiss.IndexPreTransform):
        return remembers_additions(inner.index)
    if isinstance(inner, faiss.IndexRefine):
        return remembers_additions(inner.base_index) and remembers_additions(inner.refine_index)
    return isinstance(inner, faiss.IndexIVF | faiss.IndexFlatCodes)


def reserve(vectors: Any, count: int) -> None:
    """Room for `count` vectors at once where they lie in one piece, which else would double as it grows."""
    inner = faiss.downcast_index(vectors)
    if isinstance(inner, faiss.IndexFlatCodes):
        inner.codes.resize(count * inner.code_size)
        inner.codes.resize(inner.ntotal * inner.code_size)  # keeps what it has been given


def search_within(vectors: Any, queries: Any, k: int, rows: slice) -> tuple[Any, Any]:
    """Squared distances and ids of the `k` nearest among the ids of a slice. Not on a GPU, which ignores it.

    Raises:
        InputError: an index of this kind can only search all images.
    """
    try:
        found: tuple[Any, Any] = vectors.search(queries, k, params=_within(vectors, rows))
    except RuntimeError as error:
        name = type(faiss.downcast_index(vectors)).__name__
        raise InputError(
            f"faiss' {name} cannot search within one class; build the index with kind flat, ivf or "
            "IVF4096,SQfp16"
        ) from error
    return found


def search_lists(vectors: Any, queries: Any, k: int, lists: int) -> tuple[Any, Any]:
    """Squared distances and ids of the `k` nearest in the `lists` inverted lists nearest to each query."""
    nearest = faiss.SearchParametersIVF(nprobe=lists)  # type: ignore[call-arg]
    found: tuple[Any, Any] = vectors.search(queries, k, params=_asking(vectors, lambda _: nearest))
    return found


def _within(vectors: Any, rows: slice) -> Any:
    selector = faiss.IDSelectorRange(rows.start, rows.stop)

    def innermost(inner: Any) -> Any:
        if isinstance(inner, faiss.IndexIVF):
            # all lists: those nearest to the query may hold no image of the slice
            return faiss.SearchParametersIVF(sel=selector, nprobe=inner.nlist)  # type: ignore[call-arg]
        return faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]

    return _asking(vectors, innermost)


def _asking(vectors: Any, innermost: Callable[[Any], Any]) -> Any:
    """What asks an index for what its innermost is asked by `innermost`."""
    inner = faiss.downcast_index(vectors)
    if isinstance(inner, faiss.IndexPreTransform):
        below = _asking(inner.index, innermost)
        return faiss.SearchParametersPreTransform(index_params=below)  # type: ignore[call-arg]
    if isinstance(inner, faiss.IndexRefine):
        below, more = _asking(inner.base_index, innermost), inner.k_factor
        return faiss.IndexRefineSearchParameters(  # type: ignore[call-arg]
            k_factor=more, base_index_params=below
        )
    return innermost(inner)


def write_index(vectors: Any, path: Path) -> None:
    """Writes `vectors` to `path`, whole or not at all.

    Raises:
        StoreError: the disk is full or refuses.
    """
    try:
        with whole_file(path) as partial:
            faiss.write_index(vectors, str(partial))
    except RuntimeError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"writing {shown(path)}: faiss could not write all of it; free space or name another disk"
        ) from error


def read_index(path: Path) -> Any:
    """The index in `path`. Only for files known to be ours: on hostile bytes faiss may crash.

    Raises:
        StoreError: faiss cannot make an index of it.
    """
    return _read(path, 0)


def _read(path: Path, flags: int) -> Any:
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise StoreError(f"{shown(path)}: faiss cannot read it; build the index again") from error


@dataclass(frozen=True)
class Held:
    """An index from a file.

    Attributes:
        vectors: faiss' own.
        mapped: whether they stay in the file, and are read as they are searched; nothing can be added then.
        reason: why, in words.
        maps: addresses of the file's pages.
    """

    vectors: Any
    mapped: bool
    reason: str
    maps: tuple[tuple[int, int], ...] = ()

    def let_go(self) -> None:
        """Takes the pages that a search read out of this process: the kernel keeps what it has room for."""
        let_go_of(self.maps)


def open_index(path: Path, memory: int | None = None) -> Held:
    """The index in `path`, in memory, or mapped where it is larger than `memory` bytes.

    A search of a mapped one finds the same, bit for bit. faiss maps any kind since IO_FLAG_MMAP_IFC, and only
    inverted lists before (IO_FLAG_MMAP). With 1.15.1 an index of 20 MiB, flat, SQ8, HNSW or of lists, opens
    without taking memory; lists of 4-bit codes ("PQ64x4fs") are copied into blocks all the same.

    Args:
        path: only files known to be ours, see `read_index`.
        memory: by default half of what the machine has.

    Raises:
        StoreError: faiss cannot make an index of it.
    """
    room = machine_memory() // 2 if memory is None else memory
    what = "half of the machine's memory" if memory is None else "of memory"
    size = path.stat().st_size
    words = f"{format_bytes(size)}, and {format_bytes(room)} {'is ' if memory is None else ''}{what}"
    if size <= room:
        return Held(_read(path, 0), False, f"in memory: {words}")
    flags = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
    vectors = _read(path, flags)
    return Held(vectors, True, f"mapped, read from the file as it is searched: {words}", maps_of(path))


__all__ = [
    "MAX_GPU_K",
    "Choice",
    "Held",
    "check_faiss",
    "choose_kind",
    "faiss",
    "filling",
    "gpu_count",
    "lists_of",
    "make_index",
    "on_all_gpus",
    "open_index",
    "read_index",
    "remembers_additions",
    "reserve",
    "search_lists",
    "search_within",
    "write_index",
]
